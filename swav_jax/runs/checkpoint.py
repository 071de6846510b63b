"""Checkpoints of a run: saved in the background, verified when read.

This is the only file that knows orbax. Orbax writes a checkpoint into a temporary folder and
renames it when all of it is on disk, so a process that dies leaves the previous checkpoints as they
were. What it does not do is notice a bit that changed on disk: the chunks that hold the arrays
carry no checksum. Each array therefore gets a digest, taken on the devices before it is written and
again after it was read, which covers the whole way there and back and does not depend on how the
array is sharded. The first checkpoint that a process saves is read back, since what fails on it, a
file system or a path, fails on all.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from orbax.checkpoint import checkpoint_managers

from swav_jax.data.regular import open_regular
from swav_jax.errors import SaidElsewhereError, UserError
from swav_jax.parallel import distributed
from swav_jax.runs import digest, refusals
from swav_jax.terminal import printable

# Orbax looks for files by patterns (`*`, `[1]`), TensorStore takes paths for URLs and text (`gs:/`,
# a backslash, bytes that are no UTF-8): a path of other characters is given to them as a link.
_PLAIN = re.compile(r'[\w ./,=+@~-]*')
_LONGEST = 1000  # bytes of a path, to which they add some hundred
_SMALLEST = 100_000  # bytes of a checkpoint's files
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
    in the folder, so a second program may read the checkpoints of a run that goes on.
    """

    def __init__(self, directory: Path | str, *, keep: int = 2, keep_every_steps: int = 0):
        self._directory = Path(directory).absolute()
        self._shown = printable(self._directory)
        self._policies = [checkpoint_managers.LatestN(keep)]
        if keep_every_steps:
            self._policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
        self._manager: ocp.CheckpointManager | None = None
        self._remove_link: Callable[[], Any] = lambda: None
        self._damaged: list[int] = []
        self._tidy = False
        self._needed_bytes = 0
        self._opened: int | None = None
        self._close_folder: Callable[[], Any] = lambda: None
        self._first_saved: int | None = None
        self._last_saved: int | None = None
        self._read_back = False

    def save(self, step: int, state: Any, metadata: dict) -> None:
        """Begin to save `state`; returns as soon as the arrays may be changed or donated.

        Args:
            step: how many steps were made; a step that is already saved is left as it is.
            state: a pytree of `jax.Array`, each on any number of devices.
            metadata: what JSON can hold; `restore` hands it back.

        Raises:
            UserError: the disk is full, now or while the previous checkpoint was written; the
                folder was deleted or moved meanwhile; the first checkpoint cannot be read back.
        """
        with self._explained():
            self._finish_save()
            if not self._tidy:
                self._tidy_up()
            if not _on_all_processes(self._is_there()):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._directory)
            if step in self._manager.all_steps():
                return
            self._needed_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            content = {'step': step, 'arrays': _describe(state), 'metadata': metadata}
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    metadata=ocp.args.JsonSave(content | {'sha256': _sha256(content)}),
                ),
            )
            if self._first_saved is None:
                self._first_saved = step
            self._last_saved = step

    def restore(
        self, like: Any, accept: Callable[[dict], None] = lambda metadata: None
    ) -> tuple[Any, dict] | None:
        """Read the newest checkpoint that loads; damaged ones are named in the log.

        Args:
            like: the state's pytree, of arrays or `jax.ShapeDtypeStruct`. Their shardings say where
                the arrays go (the first device where there is none), which may be another number
                of devices than the run had that saved them.
            accept: is shown the metadata before the arrays, and may raise a UserError. Whatever
                else it raises makes the checkpoint a damaged one.

        Returns:
            The state and the metadata that were saved, or None where no checkpoint is.

        Raises:
            UserError: the checkpoint holds other arrays than `like` does, or none of them loads.
        """
        wanted = jax.tree.map(_placed, like)

        def arguments(step, content):
            accept(content['metadata'])
            self._check_fit(step, content['arrays'], wanted)
            return ocp.args.StandardRestore(wanted)

        found = self._newest_that_loads(ocp.StandardCheckpointHandler, arguments)
        return found and found[1:]

    def read(
        self,
        parts: Collection[str],
        step: int | None = None,
        accept: Callable[[dict], None] = lambda metadata: None,
    ) -> tuple[int, dict[str, Any], dict]:
        """Read parts of a state without knowing the rest: what an evaluation or an export needs.

        Args:
            parts: names of fields of the state that are nested dicts of arrays, as 'params'.
            step: which checkpoint; None is the newest one that loads.
            accept: as in `restore`.

        Returns:
            The step, the parts with their arrays on the first device, and the metadata.

        Raises:
            UserError: there is no such checkpoint, or none that loads.
        """
        have = self._steps()
        if not have or step not in (None, *have):
            wanted = 'any checkpoint' if step is None else f'a checkpoint of step {step}'
            steps = f'only of {", ".join(map(str, have))}' if have else 'it is empty'
            raise UserError(f'{self._shown} does not hold {wanted}, {steps}')

        def arguments(step, content):
            accept(content['metadata'])
            saved = content['arrays']
            self._check_described(step, saved)
            wanted = _nested({n: x for n, x in saved.items() if n.partition('/')[0] in parts})
            return ocp.args.PyTreeRestore(
                wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            )

        steps = None if step is None else [step]
        return self._newest_that_loads(ocp.PyTreeCheckpointHandler, arguments, steps)

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, sound or not, or None."""
        return max(self._steps(), default=None)

    def metadata(self, step: int) -> dict:
        """Metadata that was saved with a step.

        Raises:
            UserError: it is not what was written.
        """
        return self._described(step)['metadata']

    def arrays(self, step: int) -> dict[str, dict]:
        """Dtype, shape and digest of each array of a step's state, by its path.

        Raises:
            UserError: they are not what was written.
        """
        return self._described(step)['arrays']

    def wait(self) -> None:
        """Wait until the last `save` is on disk.

        Raises:
            UserError: the disk is full, and the previous checkpoint is intact; or the first one
                cannot be read back.
        """
        with self._explained():
            self._finish_save()

    def close(self) -> None:
        """Wait as `wait` does, then end the threads that write."""
        with self._explained():
            try:
                self._finish_save()
            finally:
                if self._manager is not None:
                    self._manager.close()
                self._remove_link()
                self._close_folder()
                self._opened = None

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After a failure wait for the save in flight; else `close` was called, and has raised."""
        if kind is None or self._manager is None:
            return

        def wait() -> None:
            with contextlib.suppress(Exception):  # the failure that led here is what counts
                self._manager.wait_until_finished()

        # Without a word to other processes, which may be gone, or not know of the failure.
        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        waiting.join(None if jax.process_count() == 1 else _LONGEST_WAIT)

    def _steps(self) -> list[int]:
        """Steps of all folders that have the name of a checkpoint, sound or not, in order."""
        if not self._directory.exists():
            return []
        return sorted(
            int(entry.name)
            for entry in os.scandir(self._directory)
            if re.fullmatch('0|[1-9][0-9]*', entry.name) and entry.is_dir()
        )

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    @functools.cached_property
    def plain_path(self) -> Path:
        """The folder by a name that orbax and TensorStore take as it stands.

        Raises:
            UserError: there is none.
        """
        real = os.path.realpath(self._directory)
        if _is_plain(real):
            return Path(real)
        folder = tempfile.mkdtemp(prefix='swav_jax-')
        self._remove_link = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        if not _is_plain(folder):
            raise UserError(
                f'{self._shown}: checkpoints cannot be kept in a path of such characters when that '
                f'of temporary files ({printable(folder)}) has such ones, too: name another folder '
                'or set TMPDIR'
            )
        link = Path(folder) / 'checkpoints'
        link.symlink_to(real)
        return link

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
                problem = self._compare(self._first_saved)
            except Exception as error:
                problem = _first_line(error)
        if not _on_all_processes(problem is None):
            if problem is None:
                raise SaidElsewhereError
            raise UserError(
                f'{printable(self._path(self._first_saved))} was saved and cannot be read back '
                f'({problem}): checkpoints of this run would be lost. Try another --workdir, on '
                'another disk'
            )

    def _compare(self, step: int) -> str | None:
        """What differs between a checkpoint on disk and what was saved, with little memory."""
        content = self._content(step)
        saved = content['arrays']
        tree = self._stored(step)
        leaves, structure = jax.tree.flatten(tree)
        names = list(digest.named(tree))
        group, size = [], 0
        for place in range(len(names)):
            group.append(place)
            size += leaves[place].size * leaves[place].dtype.itemsize
            if size < _READ_AT_ONCE and place + 1 < len(names):
                continue
            wanted = structure.unflatten(
                x if i in group else ocp.PLACEHOLDER for i, x in enumerate(leaves)
            )
            args = ocp.args.PyTreeRestore(
                wanted,
                restore_args=jax.tree.map(
                    lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
                ),
            )
            found = jax.tree.leaves(
                self._read(step, 'state', ocp.PyTreeCheckpointHandler(), args),
            )
            for i in group:
                if digest.of_numpy(found[i]) != saved[names[i]]['digest']:
                    return f'{names[i]} is not what was written'
            group, size = [], 0
        missing = saved.keys() - set(names)
        return f'{min(missing)} is missing' if missing else None

    def _stored(self, step: int) -> Any:
        """The arrays that a step's folder holds, as a tree of `jax.ShapeDtypeStruct`."""
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
        found = handler.metadata(epath.Path(self.plain_path) / str(step) / 'state')
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found.tree)

    def _read(self, step: int, item: str, handler: Any, args: Any) -> Any:
        """Read an item without the other processes, which orbax's manager would wait for.

        The damage may be in a part of a file that only some of them read.
        """
        with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as reader:
            return reader.restore(self.plain_path / str(step) / item, args=args)

    def _check_files(self, step: int) -> None:
        """Raise what orbax would not: it takes a folder that may not be entered for an empty one.

        Of a named pipe it would wait for what comes through.
        """

        def refuse(error):
            raise error

        for folder, _, names in os.walk(self._path(step), onerror=refuse):
            for path in (Path(folder, name) for name in names):
                open_regular(path).close()

    def _content(self, step: int) -> dict:
        self._check_files(step)
        content = self._read(step, 'metadata', ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
        if content.pop('sha256', None) != _sha256(content) or not _is_well_formed(content):
            raise ValueError('its metadata is not what was written')
        if content.get('step', step) != step:
            raise ValueError(f'it is that of step {content["step"]}')
        return content

    def _described(self, step: int) -> dict:
        try:
            return self._content(step)
        except Exception as error:  # a damaged file fails in as many ways as it has bytes
            path = printable(self._path(step))
            raise UserError(
                f'{path} cannot be read ({_first_line(error)}): put a sound copy in its place, or '
                'move it away'
            ) from error

    def _newest_that_loads(
        self,
        make_handler: Callable[[], Any],
        arguments: Callable[[int, dict], Any],
        steps: list[int] | None = None,
    ) -> tuple[int, Any, dict] | None:
        """(step, state, metadata) of the newest of `steps` (all) that is sound; None of none."""
        steps = sorted(self._steps() if steps is None else steps, reverse=True)
        self._damaged = []
        for step in steps:
            try:
                return step, *self._load(step, make_handler, arguments)
            except _DamagedError as error:
                path = printable(self._path(step))
                absl_logging.warning('checkpoint %s is damaged, skipped: %s', path, error)
                self._damaged.append(step)
                self._tidy = False
        if steps:
            raise UserError(
                f'no checkpoint of step {", ".join(map(str, steps))} in {self._shown} loads: '
                'put a sound copy in its place, or move the folder away to begin a new run'
            )
        return None

    def _load(
        self, step: int, make_handler: Callable[[], Any], arguments: Callable[[int, dict], Any]
    ) -> tuple[Any, dict]:
        """One checkpoint, or `_DamagedError` on all processes if any of them cannot read it.

        Raises:
            UserError: a process is kept from the files; others, as `arguments` says.
        """
        problem, kind = '', _SOUND
        try:
            content = self._content(step)
            saved = content['arrays']
            state = self._read(step, 'state', make_handler(), arguments(step, content))
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # not the file's fault
            raise
        except Exception as error:  # a damaged file fails in as many ways as it has bytes
            problem, kind = _first_line(error), _DAMAGED
            if refused := refusals.find(error, refusals.NO_ACCESS):
                problem, kind = refused, _KEPT_AWAY
        worst = distributed.largest(kind)
        if worst == _KEPT_AWAY:
            raise UserError(
                f'{printable(self._path(step))} cannot be read '
                f'({problem or "by another process"}): give its files to the user who runs this'
            )
        if worst == _DAMAGED:
            raise _DamagedError(problem or 'another process cannot read it')
        for name, found in digest.digests(state).items():
            if found != saved[name]['digest']:
                raise _DamagedError(f'{name} is not what was written')
        return state, content['metadata']

    def _check_described(self, step: int, saved: dict[str, dict]) -> None:
        if {name: _shape_of(x) for name, x in saved.items()} != _shapes(self._stored(step)):
            raise ValueError('its metadata tells of other arrays than it holds')

    def _check_fit(self, step: int, saved: dict[str, dict], like: Any) -> None:
        """Refuse a checkpoint that holds other arrays than `like` does."""
        wanted = _shapes(like)
        there = {name: _shape_of(x) for name, x in saved.items()}
        if there != wanted:
            self._check_described(step, saved)
        for name in sorted(wanted.keys() | saved.keys()):
            here, that = wanted.get(name, 'nothing'), there.get(name, 'nothing')
            if here != that:
                raise UserError(
                    f'{printable(self._path(step))} holds {that} as {name} where this run needs '
                    f'{here}: '
                    'resume with the config that it was made with, or take another --workdir'
                )

    def _tidy_up(self) -> None:
        """Set damaged checkpoints aside and delete what an interrupted save left behind.

        Done before the first save and not when the folder is opened: a reader must not touch it.
        """
        problem = None
        if jax.process_index() == 0:
            try:
                self._directory.mkdir(exist_ok=True)  # not its parents: the run's folder was there
                for step in self._damaged:
                    aside = self._directory / f'damaged-{step}'
                    shutil.rmtree(aside, ignore_errors=True)
                    self._path(step).rename(aside)
                self._delete_temporaries()
            except OSError as error:
                problem = error
        if not _on_all_processes(problem is None):
            raise problem or SaidElsewhereError
        if self._manager is None:
            self._manager = ocp.CheckpointManager(
                self.plain_path,
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
        if self._opened is None:
            self._opened = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            self._close_folder = weakref.finalize(self, os.close, self._opened)

    def _delete_temporaries(self) -> None:
        for path in self._directory.glob('*.orbax-checkpoint-tmp*'):
            for _ in range(20):
                shutil.rmtree(path, ignore_errors=True)
                if not path.exists():
                    break
                time.sleep(0.1)  # after a failed write other threads may still write into it

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what a file system refuses, however it shows, into one line that says what helps."""
        try:
            yield
        except (UserError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            if not self._is_there():
                self._remove_remains()
                raise UserError(
                    f'{self._shown} is gone: it was moved or deleted while the run went on, or is '
                    'no folder. Put it back, then start again'
                ) from error
            if reason := refusals.find(error, refusals.NO_SPACE):
                raise UserError(self._no_space(reason)) from error
            if reason := refusals.find(error, refusals.OF_WRITERS) or refusals.status(error):
                raise UserError(
                    f'no checkpoint can be written into {self._shown}, or no old one removed '
                    f'({reason}): give it and what it holds to the user who runs this, or name '
                    'another --workdir'
                ) from error
            if isinstance(error, distributed.ApartError):
                raise UserError(
                    f'another process could not write its part of a checkpoint into {self._shown}: '
                    'see what it says, then start all of them again'
                ) from error
            raise

    def _is_there(self) -> bool:
        """Whether the folder is there, and is the one that the first save found or made."""
        try:
            there = self._directory.stat()
            return self._opened is None or os.path.samestat(there, os.fstat(self._opened))
        except OSError:
            return False

    def _remove_remains(self) -> None:
        """Delete what a save that was on its way made anew where the folder no longer is."""
        folder = self._directory.parent
        if jax.process_index() == 0 and not os.path.lexists(folder / 'lock'):
            self._delete_temporaries()
            if self._last_saved is not None:
                shutil.rmtree(self._path(self._last_saved), ignore_errors=True)
            with contextlib.suppress(OSError):
                for path in (self._directory, folder):
                    path.rmdir()

    def _no_space(self, reason: str) -> str:
        if jax.process_index() == 0:
            self._delete_temporaries()
        steps = self._steps()
        # The arrays; small ones take less than their files, of which each fills whole blocks.
        needed = max(
            [self._needed_bytes, _SMALLEST, *(_size_on_disk(self._path(step)) for step in steps)]
        )
        there = self._directory if self._directory.exists() else self._directory.parent
        free = shutil.disk_usage(there).free
        return (
            f'no space for a checkpoint in {self._shown} ({reason}): it needs up to '
            f'{_size(needed)}, {_size(free)} are free; checkpoints on disk: {steps or "none"}, '
            'intact. Make room or lower config.checkpoint.keep, then start again'
        )


def _size(count: int) -> str:
    return f'{count / 1e6:,.1f} MB' if count >= 1e5 else f'{count / 1e3:.0f} kB'


def _size_on_disk(folder: Path) -> int:
    """Bytes of the blocks that a folder's files fill."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob('*'))


def _first_line(error: Exception) -> str:
    text = f'it lacks {error}' if isinstance(error, KeyError) else str(error)
    return printable(text.strip().partition('\n')[0][:120]) or type(error).__name__


_SOUND, _DAMAGED, _KEPT_AWAY = range(3)


def _on_all_processes(condition: bool) -> bool:
    """Whether it holds on all of them."""
    return not distributed.largest(int(not condition))


def _alone() -> ocp.options.MultiprocessingOptions:
    """What lets a process read without the others."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'reader {me}'
    )


def _is_plain(path: str) -> bool:
    return len(os.fsencode(path)) < _LONGEST and bool(_PLAIN.fullmatch(path))


def _is_well_formed(content: Any) -> bool:
    """Whether a checkpoint's description has the shape that `save` gave it."""
    if not isinstance(content, dict):
        return False
    arrays, metadata = content.get('arrays'), content.get('metadata')
    return (
        isinstance(metadata, dict)
        and isinstance(arrays, dict)
        and all(
            isinstance(array, dict)
            and isinstance(array.get('dtype'), str)
            and isinstance(array.get('digest'), str)
            and isinstance(array.get('shape'), list)
            and all(type(length) is int and 0 <= length < 2**40 for length in array['shape'])
            for array in arrays.values()
        )
    )


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, 'sharding', None) or _first_device()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _nested(arrays: dict[str, dict]) -> dict[str, Any]:
    """Described arrays, named by their paths, as nested dicts of shapes on the first device."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, leaf = name.split('/')
        branch = functools.reduce(lambda branch, key: branch.setdefault(key, {}), folders, tree)
        dtype = jnp.dtype(array['dtype'])
        branch[leaf] = jax.ShapeDtypeStruct(array['shape'], dtype, sharding=_first_device())
    return tree


def _describe(state: Any) -> dict[str, dict]:
    found = digest.digests(state)
    return {
        name: {'dtype': leaf.dtype.name, 'shape': list(leaf.shape), 'digest': found[name]}
        for name, leaf in digest.named(state).items()
    }


def _shapes(like: Any) -> dict[str, str]:
    return {name: f'{x.dtype.name}{list(x.shape)}' for name, x in digest.named(like).items()}


def _shape_of(array: dict) -> str:
    return f'{array["dtype"]}{array["shape"]}'


def _sha256(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
