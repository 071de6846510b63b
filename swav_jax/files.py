"""Files: written whole or not at all, and read only if they are regular."""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_LONGEST = 240  # bytes of a name, of the 255 that file systems take


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what is written there replaces it if nothing fails.

    An OSError that names no file, such as that of a full disk, gets `path`'s name.
    """
    # Processes on other machines, perhaps with the same number, write here, too.
    name = path.name if len(os.fsencode(path.name)) < _LONGEST else path.name[:20]
    temporary = path.with_name(f'.{name}.{secrets.token_hex(4)}')
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.filename is None or os.fsdecode(error.filename) == str(temporary):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: re.Pattern) -> None:
    """Delete the temporary files that killed writers left of files whose names match `names`.

    No process may be writing one of these files.
    """
    for path in folder.iterdir():
        found = re.fullmatch(r'\.(.+)\.[0-9a-f]+', path.name)
        if found and names.fullmatch(found[1]):
            with contextlib.suppress(OSError):
                path.unlink()


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
