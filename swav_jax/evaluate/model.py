"""A trained network to work with: `load('runs/demo').embed(images)`."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from swav_jax import config as settings
from swav_jax import models, torch_weights
from swav_jax.checkpoint import Checkpoints
from swav_jax.data import sources
from swav_jax.data.images import ArraySource, FileSource, Source
from swav_jax.errors import UserError
from swav_jax.evaluate.features import Features, extract
from swav_jax.precision import COMPUTE_DTYPES


@dataclass
class Model:
    """A network with its weights.

    Attributes:
      net: the module.
      variables: its `params` and `batch_stats`.
      config: the settings that it was trained with; those under `evaluate` say how images are
        prepared, and may be changed.
      step: steps that it was trained for, or None where that is not known.
      has_head: whether the weights have a projection and prototypes.
      workdir: the run's folder, or None.
    """

    net: models.SwAVNet
    variables: dict[str, Any]
    config: ConfigDict
    step: int | None
    has_head: bool
    workdir: Path | None

    def open(self, spec: str, limit: int = 0) -> Source:
        """The images that `spec` names, in any of the forms of `config.data.source`.

        Raises:
          UserError: there are none.
        """
        if not spec:
            raise UserError('no images are named: give a source, as folder:/path/to/images')
        return sources.open_source(
            spec, limit=limit, channels=self.config.data.channels, setting='source'
        )

    def extract(self, source: Source | str, **options: Any) -> Features:
        """Features of all images of a source; `options` as in `features.extract`."""
        source = self.open(source) if isinstance(source, str) else source
        return extract(
            self.net,
            self.variables,
            source,
            self.config,
            **{'has_head': self.has_head} | options,
        )

    def embed(self, images: np.ndarray | Sequence[str | Path]) -> Features:
        """Features of images in memory, or of image files.

        Args:
          images: uint8 (N, height, width, channels) or, of gray images, (N, height, width); or
            paths of files.

        Raises:
          UserError: the array is none of images.
        """
        if isinstance(images, np.ndarray):
            images = images[..., None] if images.ndim == 3 else images
            if images.ndim != 4 or images.dtype != np.uint8 or 0 in images.shape:
                raise UserError(
                    f'images are {images.dtype}{list(images.shape)}: give uint8 (N, height, width, '
                    'channels), levels 0 to 255'
                )
            return self.extract(ArraySource('images', images))
        return self.extract(FileSource([str(path) for path in images]))

    def need_head(self) -> None:
        """Make sure that there are prototypes.

        Raises:
          UserError: there are none.
        """
        if not self.has_head:
            raise UserError('these weights have no prototypes: use weights in the layout of VISSL')


def load(workdir: str | Path, *, step: int | None = None) -> Model:
    """The network of a run.

    Args:
      workdir: the run's folder.
      step: which checkpoint; None is the newest one that loads.

    Raises:
      UserError: there is none.
    """
    workdir = Path(workdir).expanduser()
    if not (workdir / 'checkpoints').is_dir():
        raise UserError(f'--workdir={workdir} holds no checkpoints: name the folder of a run')
    checkpoints = Checkpoints(workdir / 'checkpoints')
    step, variables, metadata = checkpoints.read(('params', 'batch_stats'), step)
    checkpoints.close()
    config = restore_config(metadata['config'])
    return Model(_build(config), variables, config, step, True, workdir)


def load_weights(path: str | Path, config: ConfigDict) -> Model:
    """The network of `config` with PyTorch weights: see `torch_weights.load_into`.

    Raises:
      UserError: the file cannot be read, or is of another network.
    """
    settings.validate(config, needs_source=False)
    net = _build(config)
    crops = [np.zeros((2, config.evaluate.size, config.evaluate.size, config.data.channels))]
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), crops, train=True))
    # What the file does not fill stays NaN, so that nothing random passes for a result.
    blank = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), shapes)
    params, batch_stats = torch_weights.load_into(blank['params'], blank['batch_stats'], path)
    has_head = not any(np.isnan(x).any() for x in jax.tree.leaves(params['head']))
    variables = {'params': params, 'batch_stats': batch_stats}
    return Model(net, variables, config, None, has_head, None)


def restore_config(saved: Mapping[str, Any]) -> ConfigDict:
    """The settings that `config.to_dict` made plain; new ones have their defaults."""
    config = settings.default()
    with config.unlocked():
        config.update(_tuples(saved))
    return config


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, Mapping):
        return {key: _tuples(x) for key, x in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _build(config: ConfigDict) -> models.SwAVNet:
    return _build_once(FrozenConfigDict(config.model), config.data.channels, config.precision)


@functools.cache
def _build_once(model: FrozenConfigDict, channels: int, precision: str) -> models.SwAVNet:
    """One object for one network, so that several checkpoints of a run share what is compiled."""
    return models.build(model, channels=channels, dtype=COMPUTE_DTYPES[precision])
