"""Several processes as one run: joining, agreeing on the settings, failing together."""

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import swav_jax
from swav_jax import config as settings
from swav_jax.errors import SaidElsewhereError, UserError, os_error_line
from swav_jax.parallel import ending

JOIN_TIMEOUT = 100  # seconds


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connect this process to the others; call it before JAX looks for devices.

    The process ends if the others do not come within `JOIN_TIMEOUT`. Without any argument JAX finds
    the others, under SLURM, Open MPI or Kubernetes.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: total number.
      process_id: this one's number, from 0.

    Raises:
      UserError: flags are missing, cannot work, or find no other processes.
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
    if coordinator is not None:
        host, _, port = coordinator.rpartition(':')
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(f'--coordinator={coordinator}: must be HOST:PORT of process 0')
    ending.catch_aborts()
    where = f' to --coordinator={coordinator}' if coordinator else ''
    late = threading.Timer(
        JOIN_TIMEOUT,
        ending.end,
        (
            2,
            f'not all processes came{where} within {JOIN_TIMEOUT} seconds: see what the others '
            'say, of which one may have ended at once by a mistake in its command, and start all '
            'again together',
        ),
    )
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=ending.HEARTBEAT_TIMEOUT,
            initialization_timeout=2 * JOIN_TIMEOUT,  # at which JAX would abort
            shutdown_timeout_seconds=3600,  # for which process 0 may write its report
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
    finally:
        late.cancel()
    ending.watch_others()


class ApartError(Exception):
    """Another process is at another place of the program, because it has failed."""


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """End all processes when one of them fails inside, where none may wait for another.

    Raises:
      UserError: on process 0, with the message of the first process that failed.
      SaidElsewhereError: on the others.
    """
    problem = ''
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1:
            raise
        problem = str(error)
    except OSError as error:
        if jax.process_count() == 1:
            raise
        problem = os_error_line(error)
    _raise_first(_gather(problem))


def check_same_settings(config: ConfigDict) -> None:
    """Check that all processes have the same settings and versions: see `check_same`."""
    mine = {name: settings.to_dict(value) for name, value in settings.flatten(config)}
    mine |= {'version of swav_jax': swav_jax.__version__, 'version of jax': jax.__version__}
    check_same(mine, 'start all with the same command')


def check_same(mine: Mapping[str, Any], remedy: str) -> None:
    """Check that all processes have the same values, which JSON can hold, by these names.

    Raises:
      UserError: on process 0, naming those that differ.
      SaidElsewhereError: on the others.
    """
    first, *others = map(json.loads, _gather(json.dumps(mine)))
    for number, other in enumerate(others, start=1):
        differ = sorted(n for n in first.keys() | other.keys() if first.get(n) != other.get(n))
        if differ:
            shown = '; '.join(
                f'{name} is {first.get(name)} in process 0 and {other.get(name)} in {number}'
                for name in differ[:5]
            )
            _raise_first([f'processes disagree: {shown}: {remedy}'])


def rows_of_all(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the rows of all processes, in their order; all have the same number of rows."""
    if jax.process_count() == 1:
        return arrays
    return tuple(np.concatenate(multihost_utils.process_allgather(x)) for x in arrays)


def largest(number: int) -> int:
    """Return the largest of all processes' numbers."""
    return max(map(int, _gather(str(number))))


class Barriers:
    """Barriers that all processes pass in the same order, for other threads than the main one.

    A process that fails reaches a later barrier than the others. They notice at once, while a plain
    barrier would keep all of them until its timeout.
    """

    def __init__(self, name: str):
        self._name = name
        self._numbers = itertools.count()
        self._apart = False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Wait for the others.

        Args:
          key: the barrier's name.
          timeout_ms: how long, in milliseconds.

        Raises:
          ApartError: another process is at another barrier, now or at an earlier call.
        """
        client = jax_distributed.global_state.client
        if client is None:
            return
        if self._apart:
            raise ApartError
        here = next(self._numbers)
        number, me = f'swav_jax/{self._name}/{here}', jax.process_index()
        client.key_value_set(f'{number}/{me}', key)
        client.wait_at_barrier(number, timeout_ms)
        if len({where for _, where in client.key_value_dir_get(number)}) > 1:
            self._apart = True
            raise ApartError
        if here:  # all have left the one before
            client.key_value_delete(f'swav_jax/{self._name}/{here - 1}/{me}')


def _raise_first(problems: list[str]) -> None:
    for number, problem in enumerate(problems):
        if problem:
            where = f'process {number}: ' if number else ''
            raise (SaidElsewhereError if jax.process_index() else UserError)(where + problem)


def _gather(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    mine = np.frombuffer(text.encode(), np.uint8)
    if jax.process_count() == 1:
        return [text]
    lengths = multihost_utils.process_allgather(np.array(len(mine))).ravel()
    padded = np.pad(mine, (0, max(*lengths, 1) - len(mine)))
    gathered = multihost_utils.process_allgather(padded)
    return [bytes(row[:n]).decode() for row, n in zip(gathered, lengths, strict=True)]
