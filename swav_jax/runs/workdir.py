"""The folder of a run."""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax import files
from swav_jax.errors import UserError, os_error_line, printable
from swav_jax.runs.disk_errors import NO_SPACE
from swav_jax.runs.rows import put_aside_if_no_json

_LONGEST_NAME = 300  # bytes of the longest path below the folder
# Files that a run writes into its folder by `files.replacing`.
_OWN = re.compile(
    r'(metrics|events)\.jsonl|(config|summary|listing-[0-9a-f]+)\.json|bad_images\.txt|report\.html'
    r'|(loss|prototypes|map)\.png'
)


def open_workdir(workdir: str | Path) -> Path:
    """Return the folder of the run, which is made if it is missing.

    Raises:
      UserError: it cannot be written.
    """
    shown = printable(workdir)
    path = Path(workdir).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        longest = os.pathconf(path, 'PC_PATH_MAX')
    except OSError as error:
        raise UserError(
            f'--workdir={shown} cannot be written ({error.strerror}): name another folder'
        ) from error
    if len(os.fsencode(path)) + _LONGEST_NAME > longest:
        raise UserError(
            f'--workdir={shown} is too long a path for the files below it: name a shorter one, of '
            f'at most {longest - _LONGEST_NAME:,} bytes'
        )
    return path


@contextlib.contextmanager
def explained(workdir: Path) -> Iterator[None]:
    """Turn an OSError of a file below the folder of a run into a UserError."""
    try:
        yield
    except OSError as error:
        path = error.filename
        if error.errno in NO_SPACE or (
            isinstance(path, str | bytes | os.PathLike)
            and Path(os.fsdecode(path)).is_relative_to(workdir)
        ):
            raise explanation(error, workdir) from error
        raise


def explanation(error: OSError, workdir: Path) -> UserError:
    """Return the error line for an OSError of a file below the folder of a run."""
    shown = printable(workdir)
    path = printable(os.fsdecode(error.filename)) if error.filename else shown
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.lexists(workdir / 'lock'):
        return UserError(
            f'--workdir={shown} is gone: it was moved or deleted during the run. Put it '
            'back and start the same command again, or name another folder'
        )
    if error.errno in NO_SPACE:
        return UserError(
            f'no space for {path} ({error.strerror}): make room, then start the same command '
            'again; the run resumes from its last checkpoint'
        )
    return UserError(os_error_line(error))


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Lock the folder against other runs; process 0 does it for all.

    The kernel holds the lock and drops it when the process ends, however it ends, so the file
    `lock` that stays behind locks nothing. Its text only names the process.

    Raises:
      UserError: another run holds the lock.
    """
    if jax.process_index() > 0:
        yield
        return
    path = workdir / 'lock'
    # Without O_NONBLOCK, opening a named pipe would hang.
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            raise UserError(f'{printable(path)} is not a file: move it away')
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks: then train without one.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = os.read(lock, 200).decode(errors='replace')
                raise UserError(
                    f'--workdir={printable(workdir)} is in use by '
                    f'{printable(holder) or "another run"}: wait for it, stop it, or name another '
                    'folder'
                ) from error
        try:
            os.ftruncate(lock, 0)
            os.write(lock, f'process {os.getpid()} on {socket.gethostname()}'.encode())
        except OSError as error:
            error.filename = str(path)
            raise
        files.remove_leftovers(workdir, _OWN)
        yield
    finally:
        os.close(lock)


def write_config(config: ConfigDict, workdir: Path) -> str | None:
    """Write the settings into config.json.

    Returns:
      A line about a damaged config.json that was renamed, or None.
    """
    if jax.process_index() > 0:
        return None
    aside = put_aside_if_no_json(workdir / 'config.json')
    with files.replacing(workdir / 'config.json') as path:
        path.write_text(json.dumps(settings.to_dict(config), indent=2) + '\n')
    return aside
