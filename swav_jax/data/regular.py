"""Paths that users write, and opening only what is a regular file: a pipe would block for ever."""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from swav_jax.errors import UserError


def absolute(path: str) -> Path:
    """The absolute path that a user means, ~ expanded.

    Raises:
      UserError: the text is no path.
    """
    try:
        if '\0' in path:
            raise RuntimeError('it holds a zero byte')
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f'{path!r} is no path ({error})') from error


def split_options(spec: str, allowed: Sequence[str]) -> tuple[str, dict[str, str]]:
    """('path', {'key': 'value'}) of 'path?key=value&…'.

    Raises:
      UserError: a key is not allowed.
    """
    path, _, query = spec.partition('?')
    options = dict(item.partition('=')[::2] for item in query.split('&') if item)
    for key in options:
        if key not in allowed:
            raise UserError(f'{key!r} is not known after the ?; use {", ".join(allowed)}')
    return path, options


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file, or a link to one, to read it without a buffer.

    Raises:
      OSError: it is missing, cannot be read, or is a folder, a pipe, a socket or a device.
    """
    # Without O_NONBLOCK, opening a pipe waits for somebody to write to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, 'it is a folder', str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, 'it is a pipe, socket or device, not a file', str(path))
        return os.fdopen(descriptor, 'rb', buffering=0)
    except OSError:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, most: int | None = None) -> bytes:
    """All bytes of a regular file.

    Raises:
      OSError: see `open_regular`; or it holds more than `most` bytes.
    """
    with open_regular(path) as file:
        if most is not None and os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
        return file.readall()
