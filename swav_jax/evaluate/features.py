"""What a network makes of images: trunk features, embeddings and prototype scores, in eval mode."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict, FrozenConfigDict

from swav_jax import augment
from swav_jax.data import pipeline
from swav_jax.data.sources import Source
from swav_jax.models import SwAVNet


@dataclass
class Features:
    """Of N images, in the order of their source; float32 on the host.

    Attributes:
      trunk: (N, F) pooled features of the trunk.
      embeddings: (N, D) projections, of length 1 unless the head leaves them as they are.
      scores: for each prototype head (N, K).
      labels: (N,) int32, or None.
      readable: (N,) bool; False for an image that could not be decoded, whose features are those of
        a gray picture.
    """

    trunk: np.ndarray
    embeddings: np.ndarray
    scores: tuple[np.ndarray, ...]
    labels: np.ndarray | None
    readable: np.ndarray

    def __len__(self) -> int:
        return len(self.trunk)


def extract(
    net: SwAVNet, variables: Any, source: Source, config: ConfigDict, mesh: Mesh | None = None
) -> Features:
    """Features of every image of a source, on all devices.

    Each image is resized and cropped as `config.evaluate` says. With several processes each reads
    its share of the images, and all get the whole result.

    Args:
      net: the network.
      variables: its `params` and `batch_stats`.
      source: N images.
      config: all settings, of which `data` and `evaluate` are read.
      mesh: whose devices to use (default: all).

    Raises:
      UserError: `config.evaluate.size` is larger than `config.evaluate.resize`.
    """
    devices = jax.local_devices() if mesh is None else mesh.local_devices
    share = np.array_split(np.arange(len(source)), jax.process_count())[jax.process_index()]
    parts = list(_batches(net, variables, source.take(share), config, devices))
    found = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    if jax.process_count() > 1:
        found = _gather(found, len(source))
    trunk, embeddings, scores, readable = found
    return Features(trunk, embeddings, scores, source.labels, readable)


def _batches(
    net: SwAVNet, variables: Any, source: Source, config: ConfigDict, devices: Any
) -> Iterator[tuple]:
    """(trunk, embeddings, scores, readable) of one batch after another, less what fills it up."""
    mesh = Mesh(np.array(devices), ('image',))
    rows = -(-config.evaluate.batch_size // len(devices)) * len(devices)
    variables = jax.device_put(jax.tree.map(_local, variables), NamedSharding(mesh, P()))
    batches = pipeline.eval_batches(
        source,
        canvas_size=config.data.canvas_size,
        channels=config.data.channels,
        resize=config.evaluate.resize,
        size=config.evaluate.size,
        batch_size=rows,
    )
    look = functools.partial(
        _look, net, size=config.evaluate.size, data=FrozenConfigDict(config.data)
    )
    sharding = NamedSharding(mesh, P('image'))
    pending = None  # fetched one batch late: the host decodes while the devices compute
    for batch in batches:
        pictures = {name: batch[name] for name in ('image', 'size', 'boxes')}
        done, pending = pending, (look(variables, jax.device_put(pictures, sharding)), batch)
        if done is not None:
            yield _fetch(*done)
    if pending is not None:
        yield _fetch(*pending)


@functools.partial(jax.jit, static_argnames=('net', 'size', 'data'))
def _look(net, variables, batch, *, size, data):
    def everything(net, images):
        trunk = net.features(images)
        return trunk, *net.head(trunk, False)

    images = augment.center_crop(batch, size=size, data=data)
    return net.apply(variables, images, method=everything)


def _fetch(outputs: tuple, batch: pipeline.Batch) -> tuple:
    real = batch['index'] >= 0
    outputs = jax.tree.map(lambda x: np.asarray(x)[real], outputs)
    return *outputs, batch['weight'][real] > 0


def _local(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """A replicated array of all processes as one of this process."""
    return x if getattr(x, 'is_fully_addressable', True) else x.addressable_data(0)


def _gather(found: Any, total: int) -> Any:
    """Put the processes' shares, which differ by one row at most, behind each other."""
    counts = [len(s) for s in np.array_split(np.arange(total), jax.process_count())]

    def gather(x):
        filled = np.concatenate([x, np.zeros((max(counts) - len(x), *x.shape[1:]), x.dtype)])
        shares = multihost_utils.process_allgather(filled)
        return np.concatenate([share[:n] for share, n in zip(shares, counts, strict=True)])

    return jax.tree.map(gather, found)
