"""The interface of a trunk: what the rest of the package knows of it."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax


class Trunk(nn.Module, abc.ABC):
    """Images to pooled features.

    Attributes:
      settings: a dataclass of swav_jax/config/trunks.py.
      remat: 'none', 'block' or 'stage': what the backward pass computes again.
      conv, norm: modules with dtype and synchronisation already set.
      torch_blocks: a regular expression; the names of its blocks in PyTorch begin with it and a
        dot, in any layout.
    """

    settings: Any
    remat: str
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    torch_blocks: ClassVar[str]

    @abc.abstractmethod
    def __call__(self, x: jax.Array, train: bool, grid: int = 1) -> jax.Array:
        """Images (N, H, W, channels) → features, float32 or wider.

        Args:
          x: images.
          train: whether to use and record the batch's statistics.
          grid: 1: features (N, F) of the whole image; otherwise those of grid × grid parts of it,
            (N, F · grid²), in the order of torch.nn.AdaptiveAvgPool2d. Only evaluations ask for it
            (`config.evaluate.feature_grid`); a trunk may do without.
        """

    @staticmethod
    @abc.abstractmethod
    def torch_name(modules: Sequence[str], layout: str) -> str:
        """The name in PyTorch of a module, given by the names that lead to it.

        Args:
          modules: as ('layer1_0', 'conv1').
          layout: one of `torch_weights.LAYOUTS`.
        """
