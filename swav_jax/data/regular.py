"""Opening what must be a file: a pipe would block for ever, a device never end."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from swav_jax.errors import UserError


def absolute(path: str) -> Path:
    """The absolute path that a user means, ~ expanded.

    Raises:
      UserError: no path can be written so.
    """
    try:
        if '\0' in path:
            raise RuntimeError('it holds a zero byte')
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f'{path!r} is no path ({error})') from error


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, or a link to one, opened to be read, without a buffer.

    Raises:
      OSError: it is missing, cannot be read, or is a folder, a pipe, a socket or a device.
    """
    status = os.stat(path)  # noqa: PTH116
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, 'it is a folder', str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, 'it is a pipe, socket or device, not a file', str(path))
    return open(path, 'rb', buffering=0)  # noqa: PTH123


def read_regular(path: str | Path) -> bytes:
    """All bytes of a regular file; raises as `open_regular` does."""
    with open_regular(path) as file:
        return file.readall()
