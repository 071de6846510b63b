"""Long listings are made once: an index of a folder or of archives is kept between runs."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from swav_jax import atomic
from swav_jax.errors import UserError


def remembered(
    key: str, build: Callable[[], tuple[Any, Sequence[str]]], cache_dir: str | None
) -> Any:
    """What `build` finds, or what it found before if nothing has changed since.

    Args:
      key: says what is listed; one file in `cache_dir` belongs to it.
      build: returns the listing, of JSON's types, and the folders and files that it was made
        from. The listing counts as long as each of these has the same size and time of change:
        a folder's changes when a file is added to it, removed or renamed.
      cache_dir: None to keep nothing.

    Raises:
      UserError: the cache cannot be written.
    """
    if cache_dir is None:
        return build()[0]
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = Path(cache_dir) / f'listing-{name}.json'
    saved = _load(path)
    if saved is not None and saved['key'] == key:
        return saved['listing']
    listing, watched = build()
    stamps = {file: _stamp(file) for file in watched}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as part:
            part.write_text(json.dumps({'key': key, 'stamps': stamps, 'listing': listing}))
    except OSError as error:
        raise UserError(
            f'the list of images cannot be kept in {cache_dir} ({error.strerror}): make that '
            'folder writable or use another one'
        ) from error
    return listing


def _load(path: Path) -> dict[str, Any] | None:
    """The cache file's content if it is whole and up to date."""
    try:
        saved = json.loads(path.read_text())
        current = all(_stamp(file) == stamp for file, stamp in saved['stamps'].items())
        return saved if current and {'key', 'listing'} <= saved.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _stamp(path: str) -> list[int]:
    status = Path(path).stat()
    return [status.st_mtime_ns, status.st_size]
