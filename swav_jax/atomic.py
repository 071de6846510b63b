"""Files that are whole or not there."""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what is written there takes its place when all went well."""
    # Processes on other machines, which may have this one's number, write here, too.
    temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}')
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
