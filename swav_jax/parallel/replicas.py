"""Replicas of a batch: on which device, and in which turn, each row is computed.

With M micro-batches (`config.train.micro_batches`) on N devices a batch has M·N replicas.
Micro-batch m of device d is replica m·N + d, with the rows, the crops, the random numbers and the
BatchNorm group that this replica would have on M·N devices. On the devices the rows of a batch lie
in the order of `device_rows`; checkpoints have those of a method's state in that of the replicas.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from swav_jax.parallel.mesh import AXES, BATCH

# The batch of `data.pipeline` (rows along axis 0), or its crops (along axis 1).
Images = Mapping[str, jax.Array] | Sequence[jax.Array]


def device_rows(batch_size: int, num_devices: int, micro_batches: int) -> np.ndarray:
    """Rows of a batch, int64 (batch_size,), in the order of the devices: first all of device 0."""
    return _swap(np.arange(batch_size), 0, micro_batches, num_devices)


def to_devices(x: jax.Array, spec: P, num_devices: int, micro_batches: int) -> jax.Array:
    """Bring the axis of `x` that `spec` splits from the order of replicas to that of devices."""
    return _swap(x, spec.index(AXES), micro_batches, num_devices) if AXES in spec else x


def to_replicas(x: jax.Array, spec: P, num_devices: int, micro_batches: int) -> jax.Array:
    """Undo `to_devices`."""
    return _swap(x, spec.index(AXES), num_devices, micro_batches) if AXES in spec else x


def _swap(x, axis: int, slow: int, fast: int):
    """Swap two numbers of which an index is made: (slow, fast, row) → (fast, slow, row)."""
    parts = x.reshape(*x.shape[:axis], slow, fast, -1, *x.shape[axis + 1 :])
    return parts.swapaxes(axis, axis + 1).reshape(x.shape)


def images_spec(images: Images) -> P:
    """How images are split over the devices."""
    return BATCH if isinstance(images, Mapping) else P(None, AXES)


def micro_batches(images: Images, count: int) -> Images:
    """Cut a device's images into micro-batches, along a new axis 0."""
    if isinstance(images, Mapping):
        return {name: x.reshape(count, -1, *x.shape[1:]) for name, x in images.items()}
    parts = (x.reshape(len(x), count, -1, *x.shape[2:]) for x in images)
    return [jnp.moveaxis(x, 1, 0) for x in parts]
