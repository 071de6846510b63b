"""Images in tar shards, in webdataset's layout.

Opening them makes an index of byte ranges; reading an image is then one seek and one read, in any
order. Names inside an archive are only shown, never opened as paths.
"""

import itertools
import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from swav_jax.data.images import RangeSource
from swav_jax.data.listing import OTHER_FORMATS, Remarks, Stamps, remembered, stamp
from swav_jax.data.names import EXTENSIONS, absolute, is_hidden, is_image, is_other_picture
from swav_jax.errors import UserError, printable
from swav_jax.files import open_regular

MAX_SHARDS = 100_000
BLOCK = 512
MAX_PADDING = 2**22  # zeros after which no further archive is looked for
PACKED = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ': 'xz', b'\x28\xb5\x2f\xfd': 'zstd'}
KEY = re.compile(r'((?:.*/|)[^./]+)[.]([^/]*)', re.DOTALL)  # webdataset's base_plus_ext
RANGE = re.compile(r'\{(\d{1,18})\.\.(\d{1,18})(?:\.\.-?(\d{1,18}))?\}')
# Reasons for remarks.
HIDDEN = 'left out hidden members'
EXTRA = (
    'left out further images of a sample: of x.jpg, x.png and x.seg.png the first plain one counts'
)
LINKS = 'left out linked images whose target is not in the same shard'
NO_FILES = 'left out what is named as an image but is not a whole file (sparse, a device)'
SEVERAL = 'samples of several images, each of which counts'
Entry = tuple[int, int, str, int]  # first byte, bytes, name, label or -1
Note = Callable[[str, str], None]  # adds a remark: the reason, the member's name


def open_webdataset(pattern: str, cache_dir: str | None) -> RangeSource:
    """Uncompressed tar shards, numbered like /path/{000..123}.tar; see `expand_braces`.

    Samples are webdataset's: the key is the name up to the first dot of its last part, the rest is
    the member's extension, in any case. The image of a sample is its first member with a plain
    image extension such as `jpg`; where there is none, all members that end with one
    (`IMG_2020.01.02.png`) are images. `KEY.cls`, a whole number, is the label of `KEY`; without it,
    or with -1, an image is unlabelled. Links to members of the same shard are followed. What is
    left out is reported in `notes`.

    Raises:
      UserError: a shard is missing or is not a whole tar file, a label is not a number, or
        there is no image.
    """
    path = absolute(pattern)
    if os.path.isfile(path):  # noqa: PTH113 (whatever braces it has)
        files = [str(path)]
    else:
        files = expand_braces('::'.join(str(absolute(part)) for part in pattern.split('::')))
    for file in files:
        try:
            open_regular(file).close()
        except FileNotFoundError as error:
            raise UserError(
                f'there is no shard {file}; write a range of numbers as /path/{{000..123}}.tar'
            ) from error

    def build() -> tuple[dict[str, Any], Stamps]:
        stamps, entries, remarks = {}, [], Remarks()
        for number, file in enumerate(files):
            stamps[file] = stamp(file)
            entries += [[number, *entry] for entry in _index(file, remarks)]
        title = files[0] if len(files) == 1 else f'{len(files)} shards {pattern}'
        return {'entries': entries, 'notes': remarks.lines(title)}, stamps

    found = remembered(f'webdataset:{files}', build, cache_dir)
    entries, notes = found['entries'], [printable(note) for note in found['notes']]
    if not entries:
        raise UserError(
            f'no images in {len(files)} shards (looked for {" ".join(EXTENSIONS)})'
            f'{"".join(f"; {note}" for note in notes)}'
        )
    labels = np.array([entry[4] for entry in entries], np.int64)
    if 0 < (missing := int((labels == -1).sum())) < len(labels):
        notes.append(
            f'{printable(pattern)}: {missing:,} of {len(labels):,} images have no label (no .cls, '
            'or -1) and count as unlabelled'
        )
    ranges = np.array([entry[:3] for entry in entries], np.int64)
    return RangeSource(files, ranges, [entry[3] for entry in entries], labels, notes=notes)


def expand_braces(pattern: str) -> list[str]:
    """Expand braces like bash: 'a{08..10}b' is 'a08b', 'a09b', 'a10b'; of several, all pairs.

    Known are ranges of numbers, also backwards and with a step as {0..10..2}, lists as {train,val},
    and both inside lists; other braces stay. `::` separates patterns, like in webdataset.

    Raises:
      UserError: they are more than 100,000 names.
    """
    parts = pattern.split('::')
    if max(map(len, parts)) > 4096:
        raise UserError('no path is longer than 4,096 characters')
    try:
        return _bounded(name for part in parts for name in _expand(part))
    except RecursionError as error:
        raise UserError(f'{pattern} has braces within braces too often') from error


def _bounded(names: Iterable[str]) -> list[str]:
    found = list(itertools.islice(names, MAX_SHARDS + 1))
    if len(found) > MAX_SHARDS:
        raise UserError(f'these are more than {MAX_SHARDS:,} shards')
    return found


def _expand(pattern: str) -> list[str]:
    parts: list[Sequence[str]] = []
    at = 0
    while at < len(pattern):
        choices, end = _choices(pattern, at) if pattern[at] == '{' else (None, at)
        if choices is None:
            end = pattern.find('{', at + 1)
            end = len(pattern) if end < 0 else end
            choices = [pattern[at:end]]
        parts.append(choices)
        at = end
    return _bounded(map(''.join, itertools.product(*parts)))


def _choices(pattern: str, start: int) -> tuple[list[str] | None, int]:
    """What the brace at `start` stands for, None for itself; and where its end is."""
    if found := RANGE.match(pattern, start):
        first, last, step = int(found[1]), int(found[2]), max(int(found[3] or 1), 1)
        numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        padded = any(len(end) > 1 and end[0] == '0' for end in found.group(1, 2))
        width = max(len(found[1]), len(found[2])) if padded else 0
        return _bounded(str(i).zfill(width) for i in numbers), found.end()
    depth, edges = 0, [start]  # of the list's items
    for at in range(start, len(pattern)):
        depth += {'{': 1, '}': -1}.get(pattern[at], 0)
        if not depth or (depth == 1 and pattern[at] == ','):
            edges.append(at)
        if not depth:
            break
    if depth or len(edges) == 2:
        return None, start
    items = [pattern[a + 1 : b] for a, b in itertools.pairwise(edges)]
    return _bounded(name for item in items for name in _expand(item)), at + 1


class Member(NamedTuple):
    """A file in a tar file; `target` is what a link points to, else None."""

    name: str
    start: int
    count: int
    target: str | None = None


def _index(file: str, remarks: Remarks) -> list[Entry]:
    """The images of a tar file, in its order, each with its label."""

    def note(reason: str, name: str) -> None:
        remarks.add(reason, f'{file}/{name}')

    try:
        with open_regular(file) as stream:
            magic = stream.read(BLOCK)
            for begin, kind in PACKED.items():
                if magic.startswith(begin):
                    raise UserError(
                        f'{file} is compressed ({kind}); unpack it, because an image in the middle '
                        'cannot be read otherwise'
                    )
            samples = _samples(list(_members(stream, note)), note)
            return sorted(x for sample in samples for x in _entries(sample, file, stream, note))
    # A damaged header can make tarfile fail in any way: a name of 1 TB, links to themselves.
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, MemoryError,
            RecursionError) as error:  # fmt: skip
        raise UserError(
            f'{file} is not a whole, uncompressed tar file ({error}); copy or make it again'
        ) from error


def _members(stream: BinaryIO, note: Note) -> Iterator[Member]:
    """The members of one or, one after another in the same file, several archives."""
    at, size = 0, stream.seek(0, 2)
    if not size:
        raise ValueError('it is empty')
    while at < size:
        stream.seek(at)
        with tarfile.open(fileobj=stream, mode='r:') as archive:
            for member in archive:
                archive.members = []  # tarfile would keep all of them
                if member.offset < at or member.size < 0:
                    raise ValueError(f'damaged at byte {at}')
                at = member.offset_data
                name = member.name
                if member.islnk() or member.issym():
                    target = member.linkname
                    if member.issym():
                        target = posixpath.join(posixpath.dirname(name), target)
                    yield Member(name, 0, 0, posixpath.normpath(target))
                elif member.isreg() and not member.issparse():
                    yield Member(name, member.offset_data, member.size)
                elif is_image(name) and not member.isdir():
                    note(NO_FILES, name)
            at = archive.offset
        stream.seek(at)
        if stream.read(2 * BLOCK) != bytes(2 * BLOCK):
            raise ValueError(f'it has no end mark at byte {at}: cut short or damaged')
        padding = stream.read(MAX_PADDING)
        more = len(padding) - len(padding.lstrip(b'\0'))
        at = size if more == len(padding) else at + 2 * BLOCK + more // BLOCK * BLOCK


def _samples(members: Sequence[Member], note: Note) -> list[dict[str, Member]]:
    """The images and labels of each sample by their extension in small letters."""
    whole = {posixpath.normpath(x.name): x for x in members if x.target is None}
    links = {posixpath.normpath(x.name): x.target for x in members if x.target is not None}
    samples: list[dict[str, Member]] = []
    latest: dict[str, dict[str, Member]] = {}
    for member in members:
        name, target = member.name, member.target
        if any(is_hidden(part) for part in name.split('/') if part not in ('.', '..')):
            if is_image(name):
                note(HIDDEN, name)
            continue
        if is_other_picture(name):
            note(OTHER_FORMATS, name)
        found = KEY.fullmatch(name)
        if not found or not name.lower().endswith((*EXTENSIONS, '.cls')):
            continue
        for _ in range(16):  # links to links
            target = links.get(target, target)
        if target is not None:
            if target not in whole:
                note(LINKS, name)
                continue
            member = member._replace(start=whole[target].start, count=whole[target].count)
        key, extension = found[1], found[2].lower()
        if key not in latest or extension in latest[key]:  # the same name begins another sample
            latest[key] = {}
            samples.append(latest[key])
        latest[key][extension] = member
    return samples


def _entries(sample: dict[str, Member], file: str, stream: BinaryIO, note: Note) -> Iterator[Entry]:
    """The images of a sample with the labels that its .cls members hold."""
    images = [extension for extension in sample if not extension.endswith('cls')]
    plain = [extension for extension in images if f'.{extension}' in EXTENSIONS]
    if plain:
        for extension in images:
            if extension != plain[0]:
                note(EXTRA, sample[extension].name)
        images = plain[:1]
    elif len(images) > 1:
        note(SEVERAL, sample[images[0]].name)
    labels = {
        extension.removesuffix('cls'): _read_label(file, member, stream)
        for extension, member in sample.items()
        if extension.endswith('cls')
    }
    for extension in images:
        # IMG_2020.01.02.cls belongs to IMG_2020.01.02.png; IMG_2020.cls to all of the sample.
        own, dot, _ = extension.rpartition('.')
        member = sample[extension]
        yield member.start, member.count, member.name, labels.get(own + dot, labels.get('', -1))


def _read_label(file: str, member: Member, stream: BinaryIO) -> int:
    """The label in a member of a few bytes: a whole number of 64 bits."""
    stream.seek(member.start)
    text = stream.read(min(member.count, 40)).decode('latin1').strip()
    if re.fullmatch(r'[+-]?\d{1,19}(\.0*)?', text) and member.count <= 40:
        number = int(text.partition('.')[0])
        if -(2**63) <= number < 2**63:
            return number
    raise UserError(f'{file}/{member.name} holds {text!r}, not a label such as 7')
