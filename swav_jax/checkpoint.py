"""Checkpoints of a run: saved in the background, verified when read.

This is the only file that knows orbax. Orbax writes a checkpoint into a temporary folder and
renames it when all of it is on disk, so a process that dies leaves the previous checkpoints as they
were. What it does not do is notice a bit that changed on disk: the chunks that hold the arrays
carry no checksum. Each array therefore gets a digest, taken on the devices before it is written and
again after it was read, which covers the whole way there and back and does not depend on how the
array is sharded.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from swav_jax import digest
from swav_jax.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


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
        _quiet_orbax()
        self._directory = Path(directory).absolute()
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_every_steps:
            policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                create=False,  # whoever only looks leaves no empty folder behind
            ),
            item_handlers={
                'state': ocp.StandardCheckpointHandler(),
                'metadata': ocp.JsonCheckpointHandler(),
            },
        )
        self._damaged: list[int] = []
        self._tidy = False
        self._needed_bytes = 0

    def save(self, step: int, state: Any, metadata: dict) -> None:
        """Begin to save `state`; returns as soon as the arrays may be changed or donated.

        Args:
            step: how many steps were made; a step that is already saved is left as it is.
            state: a pytree of `jax.Array`, each on any number of devices.
            metadata: what JSON can hold; `restore` hands it back.

        Raises:
            UserError: the disk is full, now or while the previous checkpoint was written.
        """
        with self._explained():
            self._manager.wait_until_finished()
            if not self._tidy:
                self._tidy_up()
            if step in self._manager.all_steps():
                return
            self._needed_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            content = {'arrays': _describe(state), 'metadata': metadata}
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    metadata=ocp.args.JsonSave(content | {'sha256': _sha256(content)}),
                ),
            )

    def restore(
        self, like: Any, accept: Callable[[dict], None] = lambda metadata: None
    ) -> tuple[Any, dict] | None:
        """Read the newest checkpoint that loads; damaged ones are named in the log.

        Args:
            like: the state's pytree, of arrays or `jax.ShapeDtypeStruct`. Their shardings say where
                the arrays go (the first device where there is none), which may be another number
                of devices than the run had that saved them.
            accept: is shown the metadata before the arrays, and may raise a UserError.

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
        self, parts: Collection[str], step: int | None = None
    ) -> tuple[int, dict[str, Any], dict]:
        """Read parts of a state without knowing the rest: what an evaluation or an export needs.

        Args:
            parts: names of fields of the state that are nested dicts of arrays, as 'params'.
            step: which checkpoint; None is the newest one that loads.

        Returns:
            The step, the parts with their arrays on the first device, and the metadata.

        Raises:
            UserError: there is no such checkpoint, or none that loads.
        """
        have = sorted(self._manager.all_steps())
        if not have or step not in (None, *have):
            wanted = 'any checkpoint' if step is None else f'a checkpoint of step {step}'
            steps = f'only of {", ".join(map(str, have))}' if have else 'it is empty'
            raise UserError(f'{self._directory} does not hold {wanted}, {steps}')

        def arguments(step, content):
            saved = content['arrays']
            wanted = _nested({n: x for n, x in saved.items() if n.partition('/')[0] in parts})
            return ocp.args.PyTreeRestore(
                wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            )

        steps = None if step is None else [step]
        return self._newest_that_loads(ocp.PyTreeCheckpointHandler, arguments, steps)

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def metadata(self, step: int) -> dict:
        """Metadata that was saved with a step.

        Raises:
            ValueError: it is not what was written.
        """
        return self._content(step)['metadata']

    def arrays(self, step: int) -> dict[str, dict]:
        """Dtype, shape and digest of each array of a step's state, by its path.

        Raises:
            ValueError: they are not what was written.
        """
        return self._content(step)['arrays']

    def wait(self) -> None:
        """Wait until the last `save` is on disk.

        Raises:
            UserError: the disk is full; the previous checkpoint is intact.
        """
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then end the threads that write."""
        with self._explained():
            self._manager.close()

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _read(self, step: int, item: str, handler: Any, args: Any) -> Any:
        """Read an item without the other processes, which orbax's manager would wait for.

        The damage may be in a part of a file that only some of them read.
        """
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'reader {me}'
        )
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            return reader.restore(self._path(step) / item, args=args)

    def _content(self, step: int) -> dict:
        content = self._read(step, 'metadata', ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
        if content.pop('sha256', None) != _sha256(content):
            raise ValueError('its metadata is not what was written')
        return content

    def _newest_that_loads(
        self,
        make_handler: Callable[[], Any],
        arguments: Callable[[int, dict], Any],
        steps: list[int] | None = None,
    ) -> tuple[int, Any, dict] | None:
        """(step, state, metadata) of the newest of `steps` (all) that is sound; None of none."""
        steps = sorted(self._manager.all_steps() if steps is None else steps, reverse=True)
        self._damaged = []
        for step in steps:
            try:
                return step, *self._load(step, make_handler, arguments)
            except _DamagedError as error:
                path = self._path(step)
                absl_logging.warning('checkpoint %s is damaged, skipped: %s', path, error)
                self._damaged.append(step)
                self._tidy = False
        if steps:
            raise UserError(
                f'no checkpoint of step {", ".join(map(str, steps))} in {self._directory} loads: '
                'put a sound copy in its place, or move the folder away to begin a new run'
            )
        return None

    def _load(
        self, step: int, make_handler: Callable[[], Any], arguments: Callable[[int, dict], Any]
    ) -> tuple[Any, dict]:
        """One checkpoint, or `_DamagedError` on all processes if any of them cannot read it."""
        problem = None
        try:
            content = self._content(step)
            saved = content['arrays']
            state = self._read(step, 'state', make_handler(), arguments(step, content))
        except (UserError, jax.errors.JaxRuntimeError):  # not the file's fault
            raise
        except Exception as error:  # a damaged file fails in as many ways as it has bytes
            problem = str(error).strip().partition('\n')[0][:120]
        if not _on_all_processes(problem is None):
            raise _DamagedError(problem or 'another process cannot read it')
        for name, found in digest.digests(state).items():
            if found != saved[name]['digest']:
                raise _DamagedError(f'{name} is not what was written')
        return state, content['metadata']

    def _check_fit(self, step: int, saved: dict[str, dict], like: Any) -> None:
        """Refuse a checkpoint that holds other arrays than `like` does."""
        wanted = _shapes(like)
        for name in sorted(wanted.keys() | saved.keys()):
            here, there = wanted.get(name, 'nothing'), _shape_of(saved.get(name))
            if here != there:
                raise UserError(
                    f'{self._path(step)} holds {there} as {name} where this run needs {here}: '
                    'resume with the config that it was made with, or take another --workdir'
                )

    def _tidy_up(self) -> None:
        """Set damaged checkpoints aside and delete what an interrupted save left behind.

        Done before the first save and not when the folder is opened: a reader must not touch it.
        """
        if jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            for step in self._damaged:
                aside = self._directory / f'damaged-{step}'
                shutil.rmtree(aside, ignore_errors=True)
                self._path(step).rename(aside)
            self._delete_temporaries()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices('checkpoints tidied up')
        self._manager.reload()
        self._damaged, self._tidy = [], True

    def _delete_temporaries(self) -> None:
        for path in self._directory.glob('*.orbax-checkpoint-tmp*'):
            for _ in range(20):
                shutil.rmtree(path, ignore_errors=True)
                if not path.exists():
                    break
                time.sleep(0.1)  # after a failed write other threads may still write into it

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn a full disk, in whatever way it shows, into one line that says what is needed."""
        try:
            yield
        except Exception as error:
            if not _is_about_space(error):
                raise
            if jax.process_index() == 0:
                self._delete_temporaries()
            self._manager.reload()
            steps = self._manager.all_steps()
            # The arrays; small ones take less than their files, of which each fills whole blocks.
            needed = max([self._needed_bytes, *(_size_on_disk(self._path(step)) for step in steps)])
            raise UserError(
                f'no space for a checkpoint in {self._directory}: it needs up to '
                f'{needed / 1e6:,.1f} MB, '
                f'{shutil.disk_usage(self._directory).free / 1e6:,.1f} MB are free; checkpoints on '
                f'disk: {steps or "none"}, intact. Make room or lower '
                'config.checkpoint.keep, then start again'
            ) from error


@functools.cache
def _quiet_orbax() -> None:
    """Leave it to exceptions to say what failed.

    Of one failed read or write orbax logs several traces of a page each, and the coroutines that it
    drops print more of them to stderr, at any time later.
    """
    absl_logging.get_absl_logger().addFilter(
        lambda record: 'orbax' not in record.pathname or record.levelname != 'ERROR'
    )
    logging.getLogger('asyncio').addFilter(lambda record: 'orbax' not in record.getMessage())
    hook = sys.unraisablehook

    def all_but_abandoned_coroutines(unraisable: Any) -> None:
        coroutine = repr(getattr(unraisable.object, 'cr_code', None))
        if 'orbax' not in coroutine and str(unraisable.exc_value) != 'Event loop is closed':
            hook(unraisable)

    sys.unraisablehook = all_but_abandoned_coroutines


def _size_on_disk(folder: Path) -> int:
    """Bytes of the blocks that a folder's files fill."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob('*'))


def _is_about_space(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, is the file system's refusal to store more."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return True
        if any(os.strerror(code) in str(error) for code in _NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _on_all_processes(condition: bool) -> bool:
    """Whether it holds on all of them."""
    if jax.process_count() == 1:
        return condition
    return bool(np.all(multihost_utils.process_allgather(np.array(condition))))


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


def _shape_of(array: dict | None) -> str:
    return f'{array["dtype"]}{array["shape"]}' if array else 'nothing'


def _sha256(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
