"""Checkpoints of a run: saved in the background, verified when read.

This is the only file that knows orbax. Orbax writes a checkpoint into a temporary folder and
renames it when all of it is on disk, so a process that dies leaves the previous checkpoints as they
were. But it does not notice a bit that changed on disk: the chunks that hold the arrays
carry no checksum. Each array therefore gets a digest, computed on the devices before it is written
and again after it is read; it does not depend on the sharding. The first checkpoint that a process
saves is read back, since a file system or a path that fails for one checkpoint fails for all.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from orbax.checkpoint import checkpoint_managers

from swav_jax.errors import SaidElsewhereError, UserError, printable
from swav_jax.parallel import distributed
from swav_jax.runs import description, digest, disk_errors
from swav_jax.runs.checkpoint_folder import CheckpointFolder

_READ_AT_ONCE = 2**28  # bytes, of a checkpoint that is read back
_LONGEST_WAIT = 60  # seconds for which one of several processes that fails finishes a save


class _DamagedError(Exception):
    """A checkpoint is not what was written."""


class Checkpoints:
    """The checkpoints in one folder.

    Args:
      directory: the folder; `save` makes it if it is missing.
      keep: how many of the newest checkpoints stay.
      keep_every_steps: checkpoints of steps that this divides stay for good (0: none).

    All processes of a run call every method, with the same arguments. Only `save` changes what is
    in the folder, so a second program may read the checkpoints of a run in progress.
    """

    def __init__(self, directory: Path | str, *, keep: int = 2, keep_every_steps: int = 0):
        self._folder = CheckpointFolder(directory)
        self._policies = [checkpoint_managers.LatestN(keep)]
        if keep_every_steps:
            self._policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
        self._manager: ocp.CheckpointManager | None = None
        self._damaged: list[int] = []
        self._tidy = False
        self._first_saved: int | None = None
        self._read_back = False

    def save(self, step: int, state: Any, metadata: dict) -> None:
        """Begin to save `state`; returns as soon as the arrays may be changed or donated.

        Args:
          step: steps done; a step that is already saved is left as it is.
          state: a pytree of `jax.Array`, each on any number of devices.
          metadata: what JSON can hold; `restore` returns it.

        Raises:
          UserError: the disk is full, now or while the previous checkpoint was written; the folder
            was deleted or moved meanwhile; the first checkpoint cannot be read back.
        """
        with self._folder.explained():
            self._finish_save()
            if not self._tidy:
                self._tidy_up()
            if not _on_all_processes(self._folder.is_there()):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._folder.path)
            if step in self._manager.all_steps():
                return
            self._folder.saving(step, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    metadata=ocp.args.JsonSave(description.describe(step, state, metadata)),
                ),
            )
            if self._first_saved is None:
                self._first_saved = step

    def restore(
        self, like: Any, accept: Callable[[dict], None] = lambda metadata: None
    ) -> tuple[Any, dict] | None:
        """Read the newest checkpoint that loads; damaged ones are named in the log.

        Args:
          like: the state's pytree, of arrays or `jax.ShapeDtypeStruct`. Their shardings say where
            the arrays go (the first device where there is none), which may be another number of
            devices than the run had that saved them.
          accept: gets the metadata before the arrays are read, and may raise a UserError. Whatever
            else it raises makes the checkpoint a damaged one.

        Returns:
          The state and the metadata that were saved, or None without any checkpoint.

        Raises:
          UserError: the checkpoint holds other arrays than `like` does, or none of them loads.
        """
        wanted = jax.tree.map(_placed, like)

        def choose(step, content):
            accept(content['metadata'])
            self._check_fit(step, content, wanted)
            return wanted

        found = self._newest_that_loads(self._folder.steps(), choose)
        return found and found[1:]

    def read(
        self,
        parts: Collection[str],
        step: int | None = None,
        accept: Callable[[dict], None] = lambda metadata: None,
    ) -> tuple[int, dict[str, Any], dict]:
        """Read parts of a state without knowing the rest: what an evaluation or an export needs.

        Args:
          parts: paths in the state to nested dicts of arrays, as 'params' or 'method/params'.
          step: which checkpoint; None is the newest one that loads.
          accept: as in `restore`.

        Returns:
          The step, the parts with their arrays on the first device, and the metadata.

        Raises:
          UserError: there is no such checkpoint, or none that loads.
        """
        have = self._folder.steps()
        if not have or step not in (None, *have):
            wanted = 'any checkpoint' if step is None else f'a checkpoint of step {step}'
            steps = f'only of {", ".join(map(str, have))}' if have else 'it is empty'
            raise UserError(f'{self._folder.shown} does not hold {wanted}, {steps}')

        def choose(step, content):
            accept(content['metadata'])
            self._check_described(step, content)
            wanted = tuple(f'{part}/' for part in parts)
            arrays = {n: x for n, x in content['arrays'].items() if f'{n}/'.startswith(wanted)}
            return description.nested(arrays, _first_device())

        return self._newest_that_loads(have if step is None else [step], choose)

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, sound or not, or None."""
        return max(self._folder.steps(), default=None)

    def metadata(self, step: int) -> dict:
        """Return the metadata of a step; raise a UserError if they are damaged."""
        return self._described(step)['metadata']

    def arrays(self, step: int) -> dict[str, dict]:
        """Return dtype, shape and digest of each array of a step, by its path, like `metadata`."""
        return self._described(step)['arrays']

    def wait(self) -> None:
        """Wait until the last `save` is on disk; raises what `save` raises."""
        with self._folder.explained():
            self._finish_save()

    def close(self) -> None:
        """Wait like `wait`, then end the threads that write."""
        with self._folder.explained():
            try:
                self._finish_save()
            finally:
                if self._manager is not None:
                    self._manager.close()
                self._folder.close()

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After a failure wait for the save in flight; else `close` was called, and has raised."""
        if kind is None or self._manager is None:
            return

        def wait() -> None:
            with contextlib.suppress(Exception):  # the failure that led here is what counts
                self._manager.wait_until_finished()

        # Without a barrier: other processes may be gone, or not know of the failure.
        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        waiting.join(None if jax.process_count() == 1 else _LONGEST_WAIT)

    # Writing

    def _tidy_up(self) -> None:
        """Prepare the folder for the first save; a reader must not touch it."""
        problem = None
        if jax.process_index() == 0:
            try:
                self._folder.tidy_up(self._damaged)
            except OSError as error:
                problem = error
        if not _on_all_processes(problem is None):
            raise problem or SaidElsewhereError
        if self._manager is None:
            self._manager = ocp.CheckpointManager(
                self._folder.plain,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=checkpoint_managers.AnyPreservationPolicy(self._policies),
                    create=False,
                    # A process would wait for folders that another one cannot make.
                    async_options=ocp.AsyncOptions(
                        barrier_sync_fn=distributed.Barriers('checkpoints'),
                        create_directories_asynchronously=False,
                    ),
                ),
                item_handlers={
                    'state': ocp.StandardCheckpointHandler(),
                    'metadata': ocp.JsonCheckpointHandler(),
                },
            )
        self._manager.reload()
        self._damaged, self._tidy = [], True
        self._folder.hold()

    def _finish_save(self) -> None:
        """Wait for the last save; once, read the first one back."""
        if self._manager is None:
            return
        self._manager.wait_until_finished()
        if self._first_saved is None or self._read_back:
            return
        self._read_back, problem = True, None
        if jax.process_index() == 0:  # which sees what all have written
            try:
                problem = self._difference(self._first_saved)
            except Exception as error:
                problem = _first_line(error)
        if not _on_all_processes(problem is None):
            if problem is None:
                raise SaidElsewhereError
            raise UserError(
                f'{self._shown(self._first_saved)} was saved and cannot be read back ({problem}): '
                'checkpoints of this run would be lost. Try another --workdir, on another disk'
            )

    def _difference(self, step: int) -> str | None:
        """What differs between a checkpoint on disk and what was saved, with little memory."""
        saved, tree = self._content(step)['arrays'], self._stored(step)
        stored, structure = digest.named(tree), jax.tree.structure(tree)
        for group in _groups(stored):
            wanted = structure.unflatten(
                x if name in group else ocp.PLACEHOLDER for name, x in stored.items()
            )
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            found = digest.named(self._read_state(step, wanted, restore_args))
            for name in group:
                if digest.of_numpy(found[name]) != saved[name]['digest']:
                    return f'{name} is not what was written'
        missing = saved.keys() - stored.keys()
        return f'{min(missing)} is missing' if missing else None

    # Reading

    def _newest_that_loads(
        self, steps: list[int], choose: Callable[[int, dict], Any]
    ) -> tuple[int, Any, dict] | None:
        """(step, state, metadata) of the newest of `steps` that is sound; None without any step.

        `choose` gets a step and its description, and returns a tree of the arrays to read.
        """
        newest_first = sorted(steps, reverse=True)
        self._damaged = []
        for step in newest_first:
            try:
                return step, *self._load(step, choose)
            except _DamagedError as error:
                shown = self._shown(step)
                absl_logging.warning('checkpoint %s is damaged, skipped: %s', shown, error)
                self._damaged.append(step)
                self._tidy = False
        if steps:
            raise UserError(
                f'no checkpoint of step {", ".join(map(str, newest_first))} in '
                f'{self._folder.shown} loads: put a sound copy in its place, or move the folder '
                'away to begin a new run'
            )
        return None

    def _load(self, step: int, choose: Callable[[int, dict], Any]) -> tuple[Any, dict]:
        """Read a checkpoint; `_DamagedError` on all processes if any of them cannot read it."""
        problem, kind = '', _SOUND
        try:
            content = self._content(step)
            wanted = choose(step, content)
            restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
            state = self._read_state(step, wanted, restore_args)
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # not the file's fault
            raise
        except Exception as error:  # a damaged file fails in as many ways as it has bytes
            problem, kind = _first_line(error), _DAMAGED
            if refused := disk_errors.find(error, disk_errors.NO_ACCESS):
                problem, kind = refused, _KEPT_AWAY
        worst = distributed.largest(kind)
        if worst == _KEPT_AWAY:
            raise UserError(
                f'{self._shown(step)} cannot be read ({problem or "by another process"}): give its '
                'files to the user who runs this'
            )
        if worst == _DAMAGED:
            raise _DamagedError(problem or 'another process cannot read it')
        for name, found in digest.digests(state).items():
            if found != content['arrays'][name]['digest']:
                raise _DamagedError(f'{name} is not what was written')
        return state, content['metadata']

    def _content(self, step: int) -> dict:
        """A checkpoint's description."""
        self._folder.check_files(step)
        args = ocp.args.JsonRestore()
        return description.check(
            self._read_item(step, 'metadata', ocp.JsonCheckpointHandler(), args), step
        )

    def _described(self, step: int) -> dict:
        try:
            return self._content(step)
        except Exception as error:  # a damaged file fails in as many ways as it has bytes
            raise UserError(
                f'{self._shown(step)} cannot be read ({_first_line(error)}): put a sound copy in '
                'its place, or move it away'
            ) from error

    def _stored(self, step: int) -> Any:
        """The arrays that a step's folder holds, as a tree of `jax.ShapeDtypeStruct`."""
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
        found = handler.metadata(epath.Path(self._folder.plain) / str(step) / 'state')
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found.tree)

    def _read_state(self, step: int, wanted: Any, restore_args: Any) -> Any:
        args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        return self._read_item(step, 'state', ocp.PyTreeCheckpointHandler(), args)

    def _read_item(self, step: int, item: str, handler: Any, args: Any) -> Any:
        """Read an item alone: another process may fail where this one finds no damage."""
        with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as reader:
            return reader.restore(self._folder.plain / str(step) / item, args=args)

    def _check_described(self, step: int, content: dict) -> None:
        if description.described_shapes(content) != description.shapes(self._stored(step)):
            raise ValueError('its metadata describes other arrays than it holds')

    def _check_fit(self, step: int, content: dict, like: Any) -> None:
        """Refuse a checkpoint that holds other arrays than `like` does."""
        needed, there = description.shapes(like), description.described_shapes(content)
        if there != needed:
            self._check_described(step, content)
        for name in sorted(needed.keys() | there.keys()):
            here, that = needed.get(name, 'nothing'), there.get(name, 'nothing')
            if here != that:
                raise UserError(
                    f'{self._shown(step)} holds {that} as {name} where this run needs {here}: '
                    'resume with the config that it was made with, or take another --workdir'
                )

    def _shown(self, step: int) -> str:
        return printable(self._folder.path / str(step))


def _groups(arrays: dict[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    """Names of arrays, in groups of about `_READ_AT_ONCE` bytes."""
    group, size = [], 0
    for name, x in arrays.items():
        group.append(name)
        size += x.size * x.dtype.itemsize
        if size >= _READ_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _first_line(error: Exception) -> str:
    text = f'it lacks {error}' if isinstance(error, KeyError) else str(error)
    return printable(text.strip().partition('\n')[0][:120]) or type(error).__name__


_SOUND, _DAMAGED, _KEPT_AWAY = range(3)


def _on_all_processes(condition: bool) -> bool:
    return not distributed.largest(int(not condition))


def _alone() -> ocp.options.MultiprocessingOptions:
    """Options with which a process reads without the others."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'reader {me}'
    )


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, 'sharding', None) or _first_device()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
