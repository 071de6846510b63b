"""The folder of a run."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from swav_jax import atomic
from swav_jax import config as settings
from swav_jax.errors import UserError


def open_workdir(workdir: str | Path) -> Path:
    """The folder of the run, made if it is missing.

    Raises:
      UserError: it cannot be written.
    """
    path = Path(workdir).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f'--workdir={workdir} cannot be written ({error.strerror}): name another folder'
        ) from error
    return path


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keep other runs out of the folder; process 0 does, for all.

    The kernel holds the lock and drops it when the process ends, however it ends, so that the file
    `lock` that is left behind locks nothing. Its text only says who holds the lock.

    Raises:
      UserError: a living run holds it.
    """
    if jax.process_index() > 0:
        yield
        return
    with (workdir / 'lock').open('a+') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks: better to train without than not at all.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                raise UserError(
                    f'--workdir={workdir} is in use by {file.read() or "another run"}: wait for '
                    'it, stop it, or name another folder'
                ) from error
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield


def write_config(config: ConfigDict, workdir: Path) -> None:
    """Put the settings into config.json, once whole."""
    if jax.process_index() == 0:
        with atomic.replacing(workdir / 'config.json') as path:
            path.write_text(json.dumps(settings.to_dict(config), indent=2) + '\n')
