"""The folder of a run's checkpoints: its content, whether it still exists, what it refuses.

Orbax reads paths as patterns (`*`, `[1]`), TensorStore as URLs and text (`gs:/`, a backslash, bytes
that are not UTF-8). Instead of a path with other characters than `_PLAIN` they get a link to it.
"""

import contextlib
import functools
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from swav_jax.errors import UserError, printable
from swav_jax.files import open_regular
from swav_jax.parallel import distributed
from swav_jax.runs import disk_errors

_PLAIN = re.compile(r'[\w ./,=+@~-]*')
_LONGEST = 1000  # bytes of a path, to which orbax and TensorStore add some hundred
_SMALLEST = 100_000  # bytes of a checkpoint's files


class CheckpointFolder:
    """A folder with a subfolder for each checkpoint, whose name is the step.

    Args:
      path: the folder, which need not exist.

    Attributes:
      path: absolute.
      shown: the path as text that can be printed.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path).absolute()
        self.shown = printable(self.path)
        self._file: int | None = None  # the open folder, which stays the same when it is moved
        self._close_file: Callable[[], Any] = lambda: None
        self._remove_link: Callable[[], Any] = lambda: None
        self._saving: tuple[int | None, int] = None, 0

    def steps(self) -> list[int]:
        """Steps of all subfolders that have the name of a checkpoint, sound or not, in order."""
        if not self.path.exists():
            return []
        return sorted(
            int(entry.name)
            for entry in os.scandir(self.path)
            if re.fullmatch('0|[1-9][0-9]*', entry.name) and entry.is_dir()
        )

    @functools.cached_property
    def plain(self) -> Path:
        """The folder by a name that orbax and TensorStore take as it stands.

        Raises:
          UserError: the folder of temporary files has no such name either.
        """
        real = os.path.realpath(self.path)
        if _is_plain(real):
            return Path(real)
        folder = tempfile.mkdtemp(prefix='swav_jax-')
        self._remove_link = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        if not _is_plain(folder):
            raise UserError(
                f'{self.shown}: checkpoints cannot be kept in a path with such characters if the '
                f'path of temporary files ({printable(folder)}) has some as well: name another '
                'folder or set TMPDIR'
            )
        link = Path(folder) / 'checkpoints'
        link.symlink_to(real)
        return link

    def check_files(self, step: int) -> None:
        """Open every file of a checkpoint.

        Orbax reads a folder without permission as an empty one, and hangs on a named pipe.

        Raises:
          OSError: a file or a folder cannot be read.
        """

        def refuse(error):
            raise error

        for folder, _, names in os.walk(self.path / str(step), onerror=refuse):
            for name in names:
                open_regular(Path(folder, name)).close()

    def tidy_up(self, damaged: Iterable[int]) -> None:
        """Make the folder, set damaged checkpoints aside, delete what interrupted saves left."""
        self.path.mkdir(exist_ok=True)  # not its parents: the run's folder was there
        for step in damaged:
            aside = self.path / f'damaged-{step}'
            shutil.rmtree(aside, ignore_errors=True)
            (self.path / str(step)).rename(aside)
        self._delete_temporaries()

    def hold(self) -> None:
        """Remember which folder it is: `is_there` is false for another one in its place."""
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            self._close_file = weakref.finalize(self, os.close, self._file)

    def is_there(self) -> bool:
        """Whether the folder exists, and is the one that `hold` found."""
        try:
            there = self.path.stat()
            return self._file is None or os.path.samestat(there, os.fstat(self._file))
        except OSError:
            return False

    def saving(self, step: int, num_bytes: int) -> None:
        """Remember the step and the size of the checkpoint that is about to be written."""
        self._saving = step, num_bytes

    def close(self) -> None:
        """Let go of the folder, and remove the link to it."""
        self._remove_link()
        self._close_file()
        self._file = None

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what the file system refuses, in any exception, into one line with a remedy.

        Raises:
          UserError: the folder is gone, the disk is full, a file cannot be written.
        """
        try:
            yield
        except (UserError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            if line := self._explanation(error):
                raise UserError(line) from error
            raise

    def _explanation(self, error: Exception) -> str | None:
        if not self.is_there():
            self._remove_remains()
            return (
                f'{self.shown} is gone: it was moved or deleted during the run, or is not a '
                'folder. Put it back, then start again'
            )
        if reason := disk_errors.find(error, disk_errors.NO_SPACE):
            return self._no_space(reason)
        if reason := disk_errors.find(error, disk_errors.OF_WRITERS) or disk_errors.status(error):
            return (
                f'no checkpoint can be written into {self.shown}, or no old one removed '
                f'({reason}): give it and what it holds to the user who runs this, or name '
                'another --workdir'
            )
        if isinstance(error, distributed.ApartError):
            return (
                f'another process could not write its part of a checkpoint into {self.shown}: '
                'see its output, then start all of them again'
            )
        return None

    def _no_space(self, reason: str) -> str:
        if jax.process_index() == 0:
            self._delete_temporaries()
        steps = self.steps()
        # The arrays; small ones take less than their files, each of which fills whole blocks.
        on_disk = [_size_on_disk(self.path / str(step)) for step in steps]
        needed = max(self._saving[1], _SMALLEST, *on_disk)
        free = shutil.disk_usage(self.path if self.path.exists() else self.path.parent).free
        return (
            f'no space for a checkpoint in {self.shown} ({reason}): it needs up to '
            f'{_size(needed)}, {_size(free)} are free; checkpoints on disk: {steps or "none"}, '
            'intact. Make room or lower config.checkpoint.keep, then start again'
        )

    def _delete_temporaries(self) -> None:
        for path in self.path.glob('*.orbax-checkpoint-tmp*'):
            for _ in range(20):
                shutil.rmtree(path, ignore_errors=True)
                if not path.exists():
                    break
                time.sleep(0.1)  # after a failed write other threads may still write into it

    def _remove_remains(self) -> None:
        """Delete what a save in flight made again where the folder no longer is."""
        folder, step = self.path.parent, self._saving[0]
        if jax.process_index() == 0 and not os.path.lexists(folder / 'lock'):
            self._delete_temporaries()
            if step is not None:
                shutil.rmtree(self.path / str(step), ignore_errors=True)
            with contextlib.suppress(OSError):
                for path in (self.path, folder):
                    path.rmdir()


def _is_plain(path: str) -> bool:
    return len(os.fsencode(path)) < _LONGEST and bool(_PLAIN.fullmatch(path))


def _size_on_disk(folder: Path) -> int:
    """Bytes of the blocks that a folder's files fill."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob('*'))


def _size(count: int) -> str:
    return f'{count / 1e6:,.1f} MB' if count >= 1e5 else f'{count / 1e3:.0f} kB'
