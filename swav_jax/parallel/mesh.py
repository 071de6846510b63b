"""Devices as a mesh ('group', 'member'), and arrays laid over it.

A row of the mesh is a SyncBatchNorm group: BatchNorm reduces over 'member', everything else over
both axes.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from swav_jax.errors import UserError

AXES = ('group', 'member')
BATCH = PartitionSpec(AXES)  # axis 0 split over all replicas
REPLICATED = PartitionSpec()


def make_mesh(sync_bn: Mapping, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of devices, in rows that share BatchNorm's statistics.

    Args:
      sync_bn: `config.model.sync_bn`. group_size 0: one row; n: rows of n devices; -1: a row per
        process. `enabled=False`: rows of one device.
      devices: default: all devices of all processes. They are sorted by process, so that a process
        holds consecutive rows of a batch.

    Raises:
      UserError: the group size does not divide the number of devices.
    """
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    local = sum(d.process_index == devices[0].process_index for d in devices)
    shape = mesh_shape(sync_bn, len(devices), local)
    # A mesh from an array has axes of type Auto, which flax.linen's backward pass needs.
    return Mesh(np.array(devices).reshape(shape), AXES)


def mesh_shape(sync_bn: Mapping, num_devices: int, num_local: int) -> tuple[int, int]:
    """Return (groups, members) of a mesh of devices, `num_local` of them in each process.

    Raises:
      UserError: the group size does not divide the number of devices.
    """
    size = sync_bn['group_size'] if sync_bn['enabled'] else 1
    size = {0: num_devices, -1: num_local}.get(size, size)
    if size < 1 or num_devices % size:
        raise UserError(
            f'config.model.sync_bn.group_size={sync_bn["group_size"]} does not divide '
            f'the {num_devices} devices: use a divisor, 0 for all, -1 for those of a process'
        )
    return num_devices // size, size


def put(mesh: Mesh, tree, spec: PartitionSpec = REPLICATED):
    """Put host arrays, equal on all processes, on the mesh as global arrays split by `spec`."""
    sharding = NamedSharding(mesh, spec)

    def put_leaf(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put_leaf, tree)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Put this process's rows of a batch on the mesh as global arrays, split along axis 0."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Inside `shard_map`: cast arrays to vary over all the axes over which any of them varies.

    Call it before a function with a custom backward pass: the gradients that it returns then have
    the types of its arguments, and the transpose of the cast sums those of replicated arguments.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    axes = frozenset().union(*varying)
    return [
        lax.pcast(a, tuple(axes - own), to='varying')
        for a, own in zip(arrays, varying, strict=True)
    ]
