"""Writing files whole or not at all."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

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
