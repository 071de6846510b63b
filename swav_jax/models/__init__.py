"""The network of a run: a trunk, found by its settings, and SwAV's head."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from swav_jax.config import trunks
from swav_jax.errors import UserError
from swav_jax.models.conv import Conv
from swav_jax.models.head import ACTIVATIONS, SwAVHead
from swav_jax.models.norm import BatchNorm
from swav_jax.models.regnet import RegNet
from swav_jax.models.remat import scan_passes
from swav_jax.models.resnet import ResNet
from swav_jax.models.trunk import Trunk

# The module of each trunk, by the type of its settings.
TRUNKS: dict[type, type[Trunk]] = {trunks.ResNet: ResNet, trunks.RegNet: RegNet}


class SwAVNet(nn.Module):
    """A trunk and SwAV's head; parameters under 'trunk' and 'head'."""

    trunk: nn.Module
    head: nn.Module

    def __call__(
        self, crops: list[jax.Array], train: bool, recompute_passes: bool = False
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Embed all crops: one trunk pass for each entry of the list, then one head pass over all.

        BatchNorm in the trunk uses the statistics of one resolution at a time, and its running
        statistics move once for each, in order. BatchNorm in the head uses those of all crops.

        Args:
          crops: for each resolution, images (n_g·B, S_g, S_g, channels).
          train: use and record the batch's statistics (`mutable=['batch_stats']`).
          recompute_passes: keep only the result of a trunk pass; the backward pass computes the
            rest again, and so holds the activations of one pass at a time. Equal shapes are
            compiled once.

        Returns:
          embeddings (V·B, D) with V = Σ n_g, and for each prototype head scores (V·B, K).
        """
        if recompute_passes:
            features = jnp.concatenate(scan_passes(self.trunk, crops, train))
        else:
            features = jnp.concatenate([self.trunk(images, train) for images in crops])
        return self.head(features, train)

    def features(self, images: jax.Array, train: bool = False, grid: int = 1) -> jax.Array:
        """Trunk features (N, F · grid²) of images (N, H, W, channels); see `Trunk`.

        Raises:
          UserError: this trunk has no features of parts of an image.
        """
        if grid == 1:
            return self.trunk(images, train)
        if 'grid' not in inspect.signature(type(self.trunk).__call__).parameters:
            raise UserError(
                f'config.evaluate.feature_grid={grid}: {type(self.trunk).__name__} has no features '
                'of parts of an image: use 1'
            )
        return self.trunk(images, train, grid)

    def embed(self, images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Embeddings (N, D) and scores (N, K) of images (N, H, W, channels), in eval mode."""
        return self.head(self.trunk(images, False), False)


def build(
    model_config: ConfigDict,
    *,
    channels: int = 3,
    dtype: Any = jnp.float32,
    axis_names: tuple[str, ...] | None = None,
    mesh_axes: tuple[str, ...] | None = None,
) -> SwAVNet:
    """The network that `config.model` describes.

    Args:
      model_config: `config.model`.
      channels: of the images.
      dtype: of convolutions, linear layers and activations; parameters, statistics, features,
        embeddings and scores are float32, or float64 if this is float64.
      axis_names: mesh axes over which BatchNorm shares its statistics; None shares nothing.
      mesh_axes: all axes of the `shard_map` that the network trains in, over which running
        statistics are kept equal; None is `axis_names`.

    Raises:
      UserError: a setting makes no network.
    """
    axis_names = tuple(axis_names or ())
    mesh_axes = axis_names if mesh_axes is None else tuple(mesh_axes)
    conv = partial(Conv, dtype=dtype)
    norm = partial(BatchNorm, dtype=dtype, axis_names=axis_names, mesh_axes=mesh_axes)
    settings = trunks.parse(model_config.trunk)
    trunk = TRUNKS[type(settings)](settings, remat=model_config.remat, conv=conv, norm=norm)
    _check_head(model_config.head, trunk, channels)
    return SwAVNet(trunk, _build_head(model_config.head, norm=norm, dtype=dtype))


def trunk_class(section: Mapping[str, Any]) -> type[Trunk]:
    """The class of the trunk that `config.model.trunk` describes, of this or an earlier version.

    Raises:
      UserError: there is no such trunk, or a setting makes no network.
    """
    return TRUNKS[type(trunks.parse(trunks.adopt(section)))]


def feature_width(trunk: nn.Module, channels: int) -> int:
    """Width F of the features that a trunk computes of images with `channels` channels."""
    image = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    features, _ = jax.eval_shape(
        lambda image: trunk.init_with_output(jax.random.key(0), image, False), image
    )
    return features.shape[-1]


def _check_head(head: ConfigDict, trunk: nn.Module, channels: int) -> None:
    first, *others = head.dims
    if not others:
        raise UserError(
            f'config.model.head.dims is {tuple(head.dims)}: give at least two widths, the '
            "trunk's (or 0 to have it inferred) and that of the embeddings"
        )
    if first and first != (width := feature_width(trunk, channels)):
        raise UserError(
            f'config.model.head.dims begins with {first}, but the trunk puts out {width} '
            f'features: begin it with {width}, or with 0 to have it inferred'
        )
    if head.activation_name.lower() not in ACTIVATIONS:
        raise UserError(
            f'config.model.head.activation_name is {head.activation_name!r}: '
            f'choose one of {", ".join(ACTIVATIONS)}'
        )


def _build_head(head: ConfigDict, *, norm: Any, dtype: Any) -> SwAVHead:
    return SwAVHead(
        dims=tuple(head.dims[1:]),
        num_clusters=tuple(head.num_clusters),
        use_bn=head.use_bn,
        use_bias=head.use_bias,
        skip_last_bn=head.skip_last_bn,
        normalize_feats=head.normalize_feats,
        activation_name=head.activation_name.lower(),
        weight_norm_prototypes=head.use_weight_norm_prototypes,
        norm=norm,
        dtype=dtype,
    )
