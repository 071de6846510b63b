"""Micro-batches with which a batch fits the memory of the devices."""

from collections.abc import Iterator

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax import optim
from swav_jax.commands.cost import Cost, cost

USABLE = 0.75  # of a device's memory: what JAX takes of a GPU (XLA_PYTHON_CLIENT_MEM_FRACTION)


def proposal(
    config: ConfigDict,
    sizes: settings.Sizes,
    schedule: optim.Schedule,
    mesh: AbstractMesh,
    found: Cost,
    memory: float,
) -> Iterator[str]:
    """Yield lines: as few micro-batches as fit, for the same batch on the same devices.

    Args:
      config, sizes, schedule, mesh, found: the run, its devices and their cost.
      memory: bytes of a device.
    """
    usable, rows = USABLE * memory, config.data.batchsize_per_replica
    own = sizes.batch_size // mesh.size
    changed = config.copy_and_resolve_references()
    for turns in (n for n in range(1, own + 1) if own % n == 0):
        # A trace takes many seconds: only of what may fit.
        if turns < own and least(found, rows, own // turns) > usable:
            continue
        if own // turns != rows:
            rows = own // turns
            changed.train.micro_batches, changed.data.batchsize_per_replica = turns, rows
            found = cost(changed, sizes, schedule, mesh)
        if found.memory <= usable:
            break
    in_all = f'{size(usable)} that JAX uses of {size(memory)} a device'
    if found.memory > usable:
        yield (
            f'memory: one image at a time takes {size(found.memory)}, more than the {in_all}: use '
            "config.precision='bfloat16', config.model.remat='block', config.sharding='zero' or "
            'more devices'
        )
        return
    members = list(mesh.shape.values())[1]
    yield f'as few micro-batches as fit: {size(found.memory)} of the {in_all}'
    yield f'  --config.train.micro_batches={turns}'
    yield f'  --config.data.batchsize_per_replica={rows}'
    of_one = f'{found.repeated:.2f} times the FLOPs of a batch at once'
    yield f'  BatchNorm over {members * rows:,} images, {of_one}'


def least(found: Cost, rows: int, rows_then: int) -> float:
    """Bytes that micro-batches of `rows_then` take at least, from the cost of those of `rows`."""
    of_several = found.outputs + found.gradients / 2  # what a batch at once does not have
    return found.memory - of_several + (found.kept + found.crops) * (rows_then / rows - 1)


def size(count: float) -> str:
    """Bytes as a text, as 17.3 GB."""
    for unit, size in (('GB', 1e9), ('MB', 1e6)):
        if count >= size:
            return f'{count / size:,.3g} {unit}'
    return f'{count / 1e3:,.3g} kB'
