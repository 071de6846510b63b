"""Features of images in eval mode: of the trunk, embeddings and prototype scores."""

import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict, FrozenConfigDict
from rich.progress import track

from swav_jax import augment
from swav_jax.data import pipeline
from swav_jax.data.images import Source
from swav_jax.data.listing import some
from swav_jax.errors import UserError
from swav_jax.evaluate import labelled
from swav_jax.models import SwAVNet

_CHECKED_ROWS = 8192  # of memory maps, at a time
_PIXELS_SIDE = 64

Allocate = Callable[[str, tuple[int, ...]], np.ndarray]


@dataclass
class Features:
    """Features of N images in the order of their source, float32 on the host.

    Attributes:
      trunk: (N, F) pooled features of the trunk.
      embeddings: (N, D) projections, of length 1 with `config.model.head.normalize_feats`; None
        for a network without a head.
      scores: (N, K) for each prototype head.
      labels: (N,) int32 indices into the source's `class_names`, -1 if unknown; or None.
      readable: (N,) bool; False for an image that could not be decoded, whose features are those of
        a gray picture.
      nearest: (N,) int32 for each prototype head, the prototype with the largest score.
    """

    trunk: np.ndarray
    embeddings: np.ndarray | None
    scores: tuple[np.ndarray, ...]
    labels: np.ndarray | None
    readable: np.ndarray
    nearest: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return len(self.trunk)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name; the scores of head i are `scores{i}`."""
        named = {'trunk': self.trunk, 'embeddings': self.embeddings, 'labels': self.labels}
        named |= {f'scores{i}': scores for i, scores in enumerate(self.scores)}
        named['readable'] = self.readable
        return {name: array for name, array in named.items() if array is not None}


def extract(
    net: SwAVNet,
    variables: Any,
    source: Source,
    config: ConfigDict,
    mesh: Mesh | None = None,
    *,
    of_head: Collection[str] = ('embeddings', 'scores'),
    progress: bool = False,
    allocate: Allocate = lambda name, shape: np.empty(shape, np.float32),
) -> Features:
    """Compute features of every image of a source.

    Each image is resized and cropped according to `config.evaluate`. Each of several processes
    reads its share of the images, and all return the whole result.

    Args:
      net: the network.
      variables: its `params` and `batch_stats`.
      source: N images.
      config: all settings; `data` and `evaluate` are used.
      mesh: the devices (default: all).
      of_head: what to compute beside the trunk's features: 'embeddings', 'scores', 'nearest'.
      progress: whether to show a progress bar.
      allocate: returns the float32 array of a given name and shape that gets a result.

    Raises:
      UserError: `config.evaluate.size` is larger than `config.evaluate.resize`.
    """
    devices = jax.local_devices() if mesh is None else mesh.local_devices
    share = np.array_split(np.arange(len(source)), jax.process_count())[jax.process_index()]
    mine = source if len(share) == len(source) else source.take(share)
    rows = -(-_rows(len(mine), config.evaluate.batch_size) // len(devices)) * len(devices)
    batches = _results(net, variables, mine, config, devices, rows, of_head)
    if progress:
        batches = track(batches, 'features', total=-(-len(mine) // rows))

    found, readable, done = {}, np.zeros(len(mine), bool), 0
    for results, weight in batches:
        place = slice(done, done + len(weight))
        for name, output in results.items():
            if name not in found:
                shape = len(mine), *output.shape[1:]
                is_float = output.dtype.kind == 'f'
                found[name] = allocate(name, shape) if is_float else np.empty(shape, output.dtype)
            found[name][place] = output
        readable[place] = weight > 0
        done += len(weight)
    found['readable'] = readable
    if jax.process_count() > 1:
        found = _gather(found, len(source))
    scores, nearest = (
        tuple(found[f'{kind}{i}'] for i in range(len(found)) if f'{kind}{i}' in found)
        for kind in ('scores', 'nearest')
    )
    embeddings = found.get('embeddings')
    return Features(found['trunk'], embeddings, scores, source.labels, found['readable'], nearest)


class _Pixels(nn.Module):
    """A trunk whose features are the pixels."""

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return x.reshape(len(x), -1)


def pixels(source: Source, config: ConfigDict, mesh: Mesh | None = None) -> Features:
    """The pixels of each image as its features: what a network without any layer would give.

    They are in [0, 1], of the part of an image that `extract` sees, in the size of the canvas, at
    most 64 × 64: a trunk that is given fewer does not lower what it is compared with.
    """
    size = min(config.data.canvas_size, _PIXELS_SIDE)
    resize = round(config.evaluate.resize * size / config.evaluate.size)
    raw = config.copy_and_resolve_references().unlock()
    raw.evaluate.update(size=size, resize=resize, feature_grid=1)
    raw.data.update(mean=(0.0,) * config.data.channels, std=(1.0,) * config.data.channels)
    return extract(SwAVNet(_Pixels(), None), {}, source, raw, mesh, of_head=())


def embed(net: SwAVNet, variables: Any, images: np.ndarray) -> np.ndarray:
    """Embeddings (N, D) of normalised images (N, S, S, channels), in eval mode."""
    return np.asarray(_embed(net, jax.tree.map(local, variables), images))


@functools.partial(jax.jit, static_argnames='net')
def _embed(net, variables, images):
    return net.apply(variables, images, method='embed')[0]


def _rows(count: int, most: int) -> int:
    """Rows of a batch of `count` images: one of few sizes, because each one is compiled."""
    return next((rows for rows in (8, 64, 512) if count <= rows <= most), most)


def _results(
    net: SwAVNet,
    variables: Any,
    source: Source,
    config: ConfigDict,
    devices: Any,
    rows: int,
    of_head: Collection[str],
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yield the results and weights of each batch, without the rows that fill up the last one."""
    mesh = Mesh(np.array(devices), ('image',))
    variables = jax.device_put(jax.tree.map(local, variables), NamedSharding(mesh, P()))
    batches = pipeline.eval_batches(
        source,
        canvas_size=config.data.canvas_size,
        channels=config.data.channels,
        resize=config.evaluate.resize,
        size=config.evaluate.size,
        batch_size=rows,
    )
    # Only the settings that are used, so that a change of others compiles nothing.
    look = FrozenConfigDict({name: config.data[name] for name in ('mean', 'std')})
    settings = dict(
        size=config.evaluate.size,
        grid=config.evaluate.feature_grid,
        data=look,
        of_head=frozenset(of_head),
    )
    sharding = NamedSharding(mesh, P('image'))
    pending = None  # fetched a batch later, so that the host decodes while the devices compute
    for batch in batches:
        pictures = {name: batch[name] for name in ('image', 'size', 'boxes')}
        results = _look(net, variables, jax.device_put(pictures, sharding), **settings)
        done, pending = pending, (results, batch)
        if done is not None:
            yield _fetch(*done)
    if pending is not None:
        yield _fetch(*pending)


@functools.partial(jax.jit, static_argnames=('net', 'size', 'grid', 'data', 'of_head'))
def _look(net, variables, batch, *, size, grid, data, of_head):
    def everything(net, images):
        found = {'trunk': net.features(images, grid=grid)}
        if of_head:
            embeddings, scores = net.embed(images)  # XLA runs the trunk once
            if 'embeddings' in of_head:
                found['embeddings'] = embeddings
            for i, head in enumerate(scores):
                if 'scores' in of_head:
                    found[f'scores{i}'] = head
                if 'nearest' in of_head:
                    found[f'nearest{i}'] = jnp.argmax(head, -1).astype(jnp.int32)
        return found

    images = augment.center_crop(batch, size=size, data=data)
    return net.apply(variables, images, method=everything)


def _fetch(
    results: dict[str, jax.Array], batch: pipeline.Batch
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    real = batch['index'] >= 0
    return {name: np.asarray(x)[real] for name, x in results.items()}, batch['weight'][real]


def local(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """This process's copy of an array that is replicated over all processes."""
    return x if getattr(x, 'is_fully_addressable', True) else x.addressable_data(0)


def _gather(found: dict[str, np.ndarray], total: int) -> dict[str, np.ndarray]:
    """Concatenate the processes' shares, which differ by one row at most."""
    counts = [len(s) for s in np.array_split(np.arange(total), jax.process_count())]

    def gather(x):
        filled = np.concatenate([x, np.zeros((max(counts) - len(x), *x.shape[1:]), x.dtype)])
        shares = multihost_utils.process_allgather(filled)
        return np.concatenate([share[:n] for share, n in zip(shares, counts, strict=True)])

    return {name: gather(x) for name, x in found.items()}


def check(found: Features, source: Source, config: ConfigDict) -> list[str]:
    """Refuse features of `source` that mean nothing; returns a line if images are left out.

    Raises:
      UserError: too many images cannot be read, or a feature is not finite.
    """
    notes = check_readable(found.readable, source, config.data.max_bad_fraction)
    if bad := not_finite(found):
        raise UserError(
            f'the network makes of images numbers that are not finite ({", ".join(bad)}): its '
            f'weights are damaged, or their products too large for config.precision='
            f'{config.precision!r}'
        )
    return notes


def check_readable(readable: np.ndarray, source: Source, max_bad_fraction: float) -> list[str]:
    """Refuse images if too many are not `readable` (N,); returns a line on those that are not.

    Raises:
      UserError: none or too few can be read.
    """
    bad = np.flatnonzero(~readable)
    if not len(bad):
        return []
    names = some_names(source, bad)
    if len(bad) == len(source):
        raise UserError(f'none of {len(source):,} images can be read: {names}')
    count = f'{len(bad):,} of {len(source):,} images cannot be read'
    if len(bad) > max_bad_fraction * len(source):
        raise UserError(
            f'{count}, more than config.data.max_bad_fraction={max_bad_fraction} allows: {names}; '
            'repair or remove them, or allow more'
        )
    return [f'{count} and do not count: {names}']


def some_names(source: Source, rows: np.ndarray) -> str:
    """The names of the first of some images, and how many more there are."""
    return some((source.name(int(i)) for i in rows), len(rows), labelled.SHOWN)


def not_finite(found: Features) -> list[str]:
    """Names of the features that are not finite for some readable image."""
    bad = []
    for name, array in found.arrays().items():
        if array.dtype.kind == 'f':
            for start in range(0, len(array), _CHECKED_ROWS):
                rows = slice(start, start + _CHECKED_ROWS)
                if not np.isfinite(array[rows][found.readable[rows]]).all():
                    bad.append(name)
                    break
    return bad
