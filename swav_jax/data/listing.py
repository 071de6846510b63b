"""Long listings are made once: an index of a folder or of archives is kept between runs."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swav_jax import atomic
from swav_jax.data.regular import read_regular
from swav_jax.errors import UserError

Stamps = dict[str, list[int]]
RULES = 3  # raise it when other files are listed than before, so that no old listing is used
SETTLED_S = 2.0  # the coarsest clock of a file system


def remembered(
    key: str,
    build: Callable[[], tuple[Any, Stamps]],
    cache_dir: str | None,
    is_valid: Callable[[Any], bool],
) -> Any:
    """What `build` finds, or what it found before if nothing has changed since.

    Args:
      key: says what is listed; one file in `cache_dir` belongs to it.
      build: returns the listing, of JSON's types, and the `stamp` of each folder and file that it
        was made from, taken before that was read. The listing counts as long as these stamps stay:
        a folder's changes when a file is added to it, removed or renamed.
      cache_dir: None to keep nothing.
      is_valid: whether a listing that was kept is one of this kind; it may raise for others.

    Raises:
      UserError: the cache cannot be written.
    """
    if cache_dir is None:
        return build()[0]
    key = f'{RULES} {key}'
    name = hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:16]
    path = Path(cache_dir) / f'listing-{name}.json'
    saved = _load(path, key, is_valid)
    if saved is not None:
        return saved
    started = time.time()
    listing, stamps = build()
    # What changed a moment ago may change again within a tick of the clock, unseen: such a listing
    # serves this run alone.
    settled = all(max(stamp[:2]) < (started - SETTLED_S) * 1e9 for stamp in stamps.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as part:
            content = {'key': key, 'settled': settled, 'stamps': stamps, 'listing': listing}
            part.write_text(json.dumps(content))
    except OSError as error:
        raise UserError(
            f'the list of images cannot be kept in {cache_dir} ({error.strerror}): make that '
            'folder writable or use another one'
        ) from error
    return listing


def stamp(path: str | Path) -> list[int]:
    """What changes with a folder's or a file's content: times of change, size, inode."""
    status = Path(path).stat()
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino]


def _load(path: Path, key: str, is_valid: Callable[[Any], bool]) -> Any:
    """The listing of a cache file that is whole, up to date and of the right kind; or else None."""
    try:
        saved = json.loads(read_regular(path))
        stamps, listing = saved['stamps'], saved['listing']
        if saved['key'] != key or saved['settled'] is not True or not stamps:
            return None
        current = all(stamp(file) == before for file, before in stamps.items())
        return listing if current and is_valid(listing) else None
    except Exception:  # whatever the file holds, it can be made again
        return None
