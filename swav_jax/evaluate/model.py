"""A trained network to work with: `load('runs/demo').embed(images)`."""

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from swav_jax import config as settings
from swav_jax import methods, models, torch_weights
from swav_jax.config import saved
from swav_jax.config.file import override
from swav_jax.data import in_memory, sources
from swav_jax.data.images import Source
from swav_jax.errors import UserError, printable
from swav_jax.evaluate.extraction import Features, check_readable, extract, some_names
from swav_jax.runs import digest, encoders
from swav_jax.runs.checkpoint import Checkpoints

LOG = logging.getLogger(__name__)


@dataclass
class Model:
    """A network with its weights.

    Attributes:
      net: the module.
      variables: its `params` and `batch_stats`.
      config: the settings that it was trained with; those under `evaluate`, which may be changed,
        define how images are prepared.
      step: steps that it was trained for, or None if unknown.
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
        """Open the images that `spec` names, in any of the forms of `config.data.source`.

        Raises:
          UserError: there are none.
        """
        if not spec:
            raise UserError('no images are named: give a source, as folder:/path/to/images')
        return sources.open_source(
            spec, limit=limit, channels=self.config.data.channels, setting='source'
        )

    def extract(self, source: Source | str, **options: Any) -> Features:
        """Compute features of all images of a source; `options` are those of `extraction.extract`.

        Raises:
          UserError: there are no images.
        """
        source = self.open(source) if isinstance(source, str) else source
        options = ({} if self.has_head else {'of_head': ()}) | options
        return extract(self.net, self.variables, source, self.config, **options)

    def embed(self, images: Any) -> Features:
        """Compute features of images in memory, or of image files.

        Args:
          images: one image or several: paths, bytes of image files, PIL images, uint8 arrays; see
            `data.in_memory.open_images`. Those that cannot be read are logged, and False in
            `readable`.

        Raises:
          UserError: it is none of these, there are none, or none can be read.
        """
        source = in_memory.open_images(images, self.config.data.channels)
        found = self.extract(source)
        check_readable(found.readable, source, 1.0)
        bad = np.flatnonzero(~found.readable)
        if len(bad):
            names = some_names(source, bad)
            LOG.warning('%d of %d images cannot be read: %s', len(bad), len(source), names)
        return found

    def digest(self) -> str:
        """16 hexadecimal digits that identify the trunk's weights and statistics."""
        found = digest.digests(
            {kind: part['trunk'] for kind, part in self.variables.items() if 'trunk' in part}
        )
        text = ''.join(f'{name} {found[name]}\n' for name in sorted(found))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def need_head(self) -> None:
        """Check that there are prototypes.

        Raises:
          UserError: there are none.
        """
        if not self.has_head:
            raise UserError('these weights have no prototypes: use weights in the layout of VISSL')


def load(
    workdir: str | Path,
    *,
    step: int | None = None,
    changes: Sequence[tuple[str, str | None]] = (),
) -> Model:
    """Load the network of a run.

    Args:
      workdir: the run's folder.
      step: which checkpoint; None is the newest one that loads.
      changes: changes of the run's settings, as `config.file.override` takes them.

    Raises:
      UserError: there is none, its weights are not finite, or a change cannot be made.
    """
    workdir = Path(workdir).expanduser()
    saved.check_folder(workdir)
    checkpoints = Checkpoints(workdir / 'checkpoints')
    step, found, metadata = checkpoints.read(
        encoders.ENCODERS, step, accept=lambda about: saved.restore(about['config'])
    )
    checkpoints.close()
    config = override(saved.restore(metadata['config']), changes)
    settings.validate(config)
    methods.make(config).check()
    variables = encoders.variables(found, config.evaluate.encoder)
    net = _build(config)
    if changes:
        _check_fits(net, variables, config, step)
    _check_finite(variables, f'the checkpoint of step {step} in {printable(workdir)}')
    return Model(net, variables, config, step, True, workdir)


def load_weights(path: str | Path, config: ConfigDict) -> Model:
    """Load PyTorch weights into the network of `config`, like `torch_weights.load_into`.

    Raises:
      UserError: a setting cannot work, or the file cannot be read, is of another network, or its
        weights are not finite.
    """
    settings.validate(config)
    methods.make(config).check()
    net = _build(config)
    shapes = _shapes(net, config)
    # What the file does not fill stays NaN, so that nothing random passes for a result.
    blank = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), shapes)
    variables = torch_weights.load_into(blank, path, net.trunk)
    has_head = not any(np.isnan(x).any() for x in jax.tree.leaves(variables['params']['head']))
    parts = ('trunk', 'head') if has_head else ('trunk',)
    used = {kind: {p: x[p] for p in parts if p in x} for kind, x in variables.items()}
    _check_finite(used, printable(path))
    return Model(net, variables, config, None, has_head, None)


def _shapes(net: models.SwAVNet, config: ConfigDict) -> dict[str, Any]:
    """Shapes of the network's `params` and `batch_stats`."""
    crops = [np.zeros((2, config.evaluate.size, config.evaluate.size, config.data.channels))]
    return jax.eval_shape(lambda: net.init(jax.random.key(0), crops, train=True))


def _check_fits(
    net: models.SwAVNet, variables: dict[str, Any], config: ConfigDict, step: int
) -> None:
    """Refuse variables that are not those of this network, because settings have changed it."""
    ours, theirs = (
        {name: x.shape for name, x in digest.named({k: tree[k] for k in variables}).items()}
        for tree in (_shapes(net, config), variables)
    )
    differ = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    if differ:
        name = differ[0]
        raise UserError(
            f'the changed --config.… make another network than the checkpoint of step {step} has: '
            f'{name} is {ours.get(name, "not there")} instead of {theirs.get(name, "not there")}'
        )


def _check_finite(variables: Mapping[str, Any], where: str) -> None:
    for name, x in digest.named(variables).items():
        if not np.isfinite(np.asarray(x, np.float32)).all():
            raise UserError(f'{where} holds {name} that is not finite: use other weights')


def _build(config: ConfigDict) -> models.SwAVNet:
    return _build_once(FrozenConfigDict(config.model), config.data.channels, config.precision)


@functools.cache
def _build_once(model: FrozenConfigDict, channels: int, precision: str) -> models.SwAVNet:
    """One object per network, so that several checkpoints of a run share what is compiled."""
    return models.build(model, channels=channels, dtype=jnp.dtype(precision))
