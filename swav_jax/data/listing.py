"""What listings of images share: notes on what they leave out, and a cache between runs."""

import collections
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from swav_jax import files
from swav_jax.errors import UserError, printable
from swav_jax.files import read_regular

Stamps = dict[str, list[int]]
RULES = 4  # raise it when other files are listed than before, so that no old listing is used
SETTLED_S = 2.0  # the coarsest clock of a file system
SHOWN = 3  # names in a line
# A reason that folders and archives share.
OTHER_FORMATS = 'left out pictures of formats that are not read; convert them to JPEG or PNG'


def some(names: Iterable[str], count: int, shown: int = SHOWN) -> str:
    """The first of `count` names in one line: "a, b, c and 12 more"."""
    first = [printable(name) for name, _ in zip(names, range(shown), strict=False)]
    more = f' and {count - len(first):,} more' if count > len(first) else ''
    return ', '.join(first) + more


class Remarks:
    """Counts names by the reason for which they are reported, and keeps the first of each."""

    def __init__(self):
        self.counts: collections.Counter[str] = collections.Counter()
        self._names: dict[str, list[str]] = collections.defaultdict(list)

    def add(self, reason: str, name: str) -> None:
        """Count a name."""
        self.counts[reason] += 1
        if self.counts[reason] <= SHOWN:
            self._names[reason].append(name)

    def names(self, reason: str) -> str:
        """The names of one reason, as `some` lists them."""
        return some(self._names[reason], self.counts[reason])

    def lines(self, root: str) -> list[str]:
        """For each reason, in order of appearance, "ROOT: REASON (12: a, b, c and 9 more)"."""
        return [
            f'{printable(root)}: {reason} ({count:,}: {self.names(reason)})'
            for reason, count in self.counts.items()
        ]


def remembered(key: str, build: Callable[[], tuple[Any, Stamps]], cache_dir: str | None) -> Any:
    """What `build` returns, or returned before if nothing has changed since.

    Args:
      key: what is listed; one file in `cache_dir` belongs to it.
      build: returns the listing, of JSON's types, and the `stamp` of each folder and file that it
        was made from, taken before that was read. The listing is valid while these stamps stay the
        same: a folder's changes when a file is added, removed or renamed.
      cache_dir: None to keep nothing.

    Raises:
      UserError: the cache cannot be written.
    """
    if cache_dir is None:
        return build()[0]
    key = f'{RULES} {key}'
    name = hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:16]
    path = Path(cache_dir) / f'listing-{name}.json'
    try:
        return _load(path, key)
    except Exception:  # missing, outdated or damaged: whatever the file holds, it can be rebuilt
        pass
    started = time.time()
    listing, stamps = build()
    # What changed a moment ago may change again within a tick of the clock, unnoticed: such a
    # listing serves this run only.
    settled = all(max(stamp[:2]) < (started - SETTLED_S) * 1e9 for stamp in stamps.values())
    content = {'key': key, 'settled': settled, 'stamps': stamps, 'listing': listing}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as part:
            part.write_text(json.dumps(content | {'checksum': _checksum(listing)}))
    except OSError as error:
        raise UserError(
            f'the list of images cannot be kept in {cache_dir} ({error.strerror}): make that '
            'folder writable or use another one'
        ) from error
    return listing


def stamp(path: str | Path) -> list[int]:
    """What changes with the content of a folder or file: times of change, size, inode."""
    status = Path(path).stat()
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino]


def _load(path: Path, key: str) -> Any:
    """The listing of a cache file; raises unless it is up to date and as it was written."""
    saved = json.loads(read_regular(path))
    listing, stamps = saved['listing'], saved['stamps']
    valid = (
        saved['key'] == key
        and saved['settled'] is True
        and saved['checksum'] == _checksum(listing)
        and stamps
        and all(stamp(file) == before for file, before in stamps.items())
    )
    if not valid:
        raise ValueError('it is outdated or was changed')
    return listing


def _checksum(listing: Any) -> str:
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
