"""Several processes as one run: they join, agree on the settings, and fail together."""

import contextlib
import json
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import swav_jax
from swav_jax import config as settings
from swav_jax.errors import SaidElsewhereError, UserError

HEARTBEAT_TIMEOUT = 60  # seconds after which a silent process counts as dead
JOIN_TIMEOUT = 300


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connect this process to the others; to be called before JAX looks for devices.

    Args:
      coordinator: HOST:PORT of process 0. None, as the others then are: found by JAX, under SLURM,
        Open MPI or Kubernetes.
      num_processes: in all.
      process_id: this one's number, from 0.

    Raises:
      UserError: the flags do not say enough, or the others do not come.
    """
    given = {'coordinator': coordinator, 'num_processes': num_processes, 'process_id': process_id}
    missing = [f'--{name}' for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(
            f'{" and ".join(missing)} missing: --coordinator, --num_processes and --process_id go '
            'together, or none of them where SLURM, Open MPI or Kubernetes started the processes'
        )
    if not missing and not 0 <= process_id < num_processes:
        raise UserError(
            f'--process_id={process_id}: must be from 0 to {num_processes - 1}, as '
            f'--num_processes={num_processes} says'
        )
    if coordinator is not None and not coordinator.rpartition(':')[2].isdigit():
        raise UserError(f'--coordinator={coordinator}: must be HOST:PORT of process 0')
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            initialization_timeout=JOIN_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition('\n')[0]
        if missing:
            raise UserError(
                f'--distributed finds no other processes ({reason}): start them by SLURM, Open MPI '
                'or Kubernetes, or say --coordinator=HOST:PORT, --num_processes and --process_id'
            ) from error
        raise UserError(
            f'process {process_id} of {num_processes} cannot join --coordinator={coordinator} '
            f'({reason}): start all processes within {JOIN_TIMEOUT} seconds, with one coordinator'
        ) from error


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """What one process cannot do ends all of them, and process 0 says why.

    Inside, no process must wait for another one.

    Raises:
      UserError: on process 0, with what the first process that failed has to say.
      SaidElsewhereError: on the others.
    """
    problem = ''
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1:
            raise
        problem = str(error)
    _raise_first(_gather(problem))


def check_same(config: ConfigDict) -> None:
    """Make sure that all processes have the same settings and the same code.

    Raises:
      UserError: on process 0, naming the settings that differ.
      SaidElsewhereError: on the others.
    """
    mine = {name: settings.to_dict(value) for name, value in settings.flatten(config)}
    mine |= {'version of swav_jax': swav_jax.__version__, 'version of jax': jax.__version__}
    first, *others = map(json.loads, _gather(json.dumps(mine)))
    for number, other in enumerate(others, start=1):
        differ = sorted(n for n in first.keys() | other.keys() if first.get(n) != other.get(n))
        if differ:
            shown = '; '.join(
                f'{name} is {first.get(name)} in process 0 and {other.get(name)} in {number}'
                for name in differ[:5]
            )
            _raise_first([f'processes disagree: {shown}: start all with the same command'])


def rows_of_all(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """The rows of every process, in the order of the processes; all have equally many."""
    if jax.process_count() == 1:
        return arrays
    return tuple(np.concatenate(multihost_utils.process_allgather(x)) for x in arrays)


def is_first() -> bool:
    """Whether this process, which need not have joined the others, is number 0."""
    return jax.distributed.is_initialized() and jax.process_index() == 0


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    return max(map(int, _gather(str(number))))


def _raise_first(problems: list[str]) -> None:
    for number, problem in enumerate(problems):
        if problem:
            where = f'process {number}: ' if number else ''
            raise (SaidElsewhereError if jax.process_index() else UserError)(where + problem)


def _gather(text: str) -> list[str]:
    """Every process's text, in the order of the processes."""
    mine = np.frombuffer(text.encode(), np.uint8)
    if jax.process_count() == 1:
        return [text]
    lengths = multihost_utils.process_allgather(np.array(len(mine))).ravel()
    padded = np.pad(mine, (0, max(*lengths, 1) - len(mine)))
    gathered = multihost_utils.process_allgather(padded)
    return [bytes(row[:n]).decode() for row, n in zip(gathered, lengths, strict=True)]
