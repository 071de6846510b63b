"""Images in tar shards, as webdataset writes them.

Opening them makes an index of byte ranges; an image is then one seek and one read, in any order.
Names inside an archive are text to be shown, never paths to be opened.
"""

import itertools
import os
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from swav_jax.data.images import RangeSource
from swav_jax.data.listing import remembered, stamp
from swav_jax.data.names import EXTENSIONS, Remarks, is_hidden, is_image, is_other_picture
from swav_jax.data.regular import absolute, open_regular
from swav_jax.errors import UserError
from swav_jax.terminal import printable

MAX_SHARDS = 100_000
BLOCK = 512
MAX_PADDING = 2**22  # zeros after which no further archive is looked for
PACKED = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ': 'xz', b'\x28\xb5\x2f\xfd': 'zstd'}
KEY = re.compile(r'((?:.*/|)[^./]+)[.]([^/]*)', re.DOTALL)  # webdataset's base_plus_ext

HIDDEN = 'left out hidden members'
EXTRA = (
    'left out further images of a sample: of x.jpg, x.png and x.seg.png the first plain one counts'
)
LINKS = 'left out linked images whose target is not in the same shard'
NO_FILES = 'left out what is named as an image but is no whole file (sparse, a device)'
OTHERS = 'left out pictures of formats that are not read; convert them to JPEG or PNG'
SEVERAL = 'samples of several images, each of which counts'
Entry = tuple[int, int, str, int]  # first byte, bytes, name, label or -1


def open_webdataset(pattern: str, cache_dir: str | None) -> RangeSource:
    """Uncompressed tar shards, numbered as in /path/{000..123}.tar; see `expand_braces`.

    Members belong together as webdataset has it: a sample's key is the name up to the first dot of
    its last part, the rest is the member's extension, in any case. The image of a sample is its
    member with a plain extension of images, such as `jpg`; where there is none, all members whose
    extension ends so (`IMG_2020.01.02.png`) are images. `KEY.cls`, a whole number, is the label of
    `KEY`; without one, or with -1, an image is unlabelled. Links to members of the same shard are
    followed. What is left out is said in `notes`.

    Raises:
      UserError: a shard is missing or is no whole tar file, a label is no number, or there is no
        image.
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
        except OSError as error:
            raise UserError(f'{file} cannot be read ({error.strerror})') from error

    def build() -> tuple[dict[str, Any], dict[str, list[int]]]:
        stamps, entries, remarks = {}, [], Remarks()
        for number, file in enumerate(files):
            stamps[file] = stamp(file)
            entries += [[number, *entry] for entry in index_tar(file, remarks)]
        title = files[0] if len(files) == 1 else f'{len(files)} shards {pattern}'
        return {'entries': entries, 'notes': remarks.lines(title)}, stamps

    def is_valid(found: Any) -> bool:
        return all(
            all(type(x) is int for x in (number, start, count, label))
            and 0 <= number < len(files) and min(start, count) >= 0 and type(name) is str
            for number, start, count, name, label in found['entries']
        ) and all(type(note) is str for note in found['notes'])  # fmt: skip

    found = remembered(f'webdataset:{files}', build, cache_dir, is_valid)
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
    """What bash makes of braces: 'a{08..10}b' is 'a08b', 'a09b', 'a10b'; of several, all pairs.

    Known are ranges of numbers, also backwards and with a step as {0..10..2}, lists as {train,val},
    and both inside of lists; other braces stay. `::` separates patterns, as webdataset has it.

    Raises:
      UserError: they are more than 100,000 names.
    """
    parts = pattern.split('::')
    if max(map(len, parts)) > 4096:
        raise UserError('no path is longer than 4,096 characters')
    try:
        return _bounded(pattern, (name for part in parts for name in _expand(part)))
    except RecursionError as error:
        raise UserError(f'{pattern} has braces within braces too often') from error


def _bounded(pattern: str, names: Iterable[str]) -> list[str]:
    found = list(itertools.islice(names, MAX_SHARDS + 1))
    if len(found) > MAX_SHARDS:
        raise UserError(f'{pattern} names more than {MAX_SHARDS:,} shards')
    return found


def _expand(pattern: str) -> list[str]:
    parts: list[Sequence[str]] = []
    at = literal = 0
    while at < len(pattern):
        end = _closing(pattern, at) if pattern[at] == '{' else None
        choices = None if end is None else _choices(pattern[at + 1 : end])
        if choices is None:
            at += 1
            continue
        parts += [[pattern[literal:at]], choices]
        at = literal = end + 1
    parts.append([pattern[literal:]])
    return _bounded(pattern, map(''.join, itertools.product(*parts)))


def _closing(pattern: str, start: int) -> int | None:
    """Where the brace that opens at `start` closes."""
    depth = 0
    for at in range(start, len(pattern)):
        depth += {'{': 1, '}': -1}.get(pattern[at], 0)
        if not depth:
            return at
    return None


def _choices(inside: str) -> list[str] | None:
    """What stands for {inside}; None if this is neither a range nor a list."""
    found = re.fullmatch(r'(\d{1,18})\.\.(\d{1,18})(?:\.\.-?(\d{1,18}))?', inside)
    if found:
        first, last, step = int(found[1]), int(found[2]), max(int(found[3] or 1), 1)
        numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        padded = any(len(end) > 1 and end[0] == '0' for end in found.group(1, 2))
        width = max(len(found[1]), len(found[2])) if padded else 0
        return _bounded(f'{{{inside}}}', (str(i).zfill(width) for i in numbers))
    items, depth = [''], 0
    for letter in inside:
        depth += {'{': 1, '}': -1}.get(letter, 0)
        if letter == ',' and not depth:
            items.append('')
        else:
            items[-1] += letter
    if len(items) == 1:
        return None
    return _bounded(f'{{{inside}}}', (name for item in items for name in _expand(item)))


class Member(NamedTuple):
    """A file in a tar file; `target` is what a link points to, else None."""

    name: str
    start: int
    count: int
    target: str | None = None


def index_tar(file: str, remarks: Remarks) -> list[Entry]:
    """The images of a tar file, in its order, each with its label.

    Raises:
      UserError: it is no tar file, is cut short or damaged, or a label is no number.
    """
    try:
        with open_regular(file) as stream:
            magic = stream.read(BLOCK)
            for begin, kind in PACKED.items():
                if magic.startswith(begin):
                    raise UserError(
                        f'{file} is compressed ({kind}); unpack it, as an image in the middle '
                        'cannot be read otherwise'
                    )
            members = list(read_members(file, stream, remarks))
            samples = group(members, file, remarks)
            return label(samples, file, stream)
    # A damaged header can make tarfile fail in any way: a name of 1 TB, links to themselves.
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, MemoryError,
            RecursionError) as error:  # fmt: skip
        raise UserError(
            f'{file} is no whole, uncompressed tar file ({error}); copy or make it again'
        ) from error


def read_members(file: str, stream: BinaryIO, remarks: Remarks) -> Iterator[Member]:
    """The members of one or, one after another in the same file, several archives.

    Raises:
      ValueError: there is none, or one does not end with two blocks of zeros, or goes backwards.
    """
    at, size = 0, stream.seek(0, 2)
    if not size:
        raise ValueError('it is empty')
    while at < size:
        stream.seek(at)
        with tarfile.open(fileobj=stream, mode='r:') as archive:
            for member in archive:
                archive.members = []  # they would be kept for nothing
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
                    remarks.add(NO_FILES, f'{file}/{name}')
            at = archive.offset
        stream.seek(at)
        if stream.read(2 * BLOCK) != bytes(2 * BLOCK):
            raise ValueError(f'it has no end mark at byte {at}: cut short or damaged')
        padding = stream.read(MAX_PADDING)
        more = len(padding) - len(padding.lstrip(b'\0'))
        at = size if more == len(padding) else at + 2 * BLOCK + more // BLOCK * BLOCK


def group(members: Sequence[Member], file: str, remarks: Remarks) -> list[dict[str, Member]]:
    """Samples in the archive's order: members by their extension in small letters."""
    whole = {posixpath.normpath(x.name): x for x in members if x.target is None}
    links = {posixpath.normpath(x.name): x.target for x in members if x.target is not None}
    samples: list[dict[str, Member]] = []
    latest: dict[str, dict[str, Member]] = {}
    for member in members:
        name = member.name
        base = name.rpartition('/')[2]
        found = KEY.fullmatch(name)
        extension = found[2].lower() if found else ''
        if any(is_hidden(part) for part in name.split('/') if part not in ('.', '..')):
            if is_image(name):
                remarks.add(HIDDEN, f'{file}/{name}')
            continue
        if is_other_picture(base):
            remarks.add(OTHERS, f'{file}/{name}')
        if not found or not (is_image(base) or base.lower().endswith('.cls')):
            continue
        target = member.target
        for _ in range(16):  # links to links
            target = links.get(target, target)
        if target is not None:
            if target not in whole:
                remarks.add(LINKS, f'{file}/{name}')
                continue
            member = member._replace(start=whole[target].start, count=whole[target].count)
        sample = latest.get(found[1])
        if sample is None or extension in sample:  # the same name again begins another sample
            sample = latest[found[1]] = {}
            samples.append(sample)
        sample[extension] = member
    for sample in samples:
        plain = [extension for extension in sample if f'.{extension}' in EXTENSIONS]
        for extension in [x for x in sample if plain and x != plain[0] and not x.endswith('cls')]:
            remarks.add(EXTRA, f'{file}/{sample.pop(extension).name}')
        if len(images := [x for x in sample if not x.endswith('cls')]) > 1:
            remarks.add(SEVERAL, f'{file}/{sample[images[0]].name}')
    return samples


def label(samples: Sequence[dict[str, Member]], file: str, stream: BinaryIO) -> list[Entry]:
    """The images of samples, in the archive's order, with the numbers that their .cls hold."""
    entries = []
    for sample in samples:
        numbers = {
            extension.removesuffix('cls'): read_number(file, sample.pop(extension), stream)
            for extension in [x for x in sample if x.endswith('cls')]
        }
        for extension, x in sample.items():
            # IMG_2020.01.02.cls belongs to IMG_2020.01.02.png; IMG_2020.cls to all of the sample.
            own = extension.rpartition('.')[0]
            number = numbers.get(f'{own}.' if own else '', numbers.get('', -1))
            entries.append((x.start, x.count, x.name, number))
    return sorted(entries)


def read_number(file: str, member: Member, stream: BinaryIO) -> int:
    """The label that a member of a few bytes holds.

    Raises:
      UserError: it holds no whole number of 64 bits.
    """
    stream.seek(member.start)
    text = stream.read(min(member.count, 40)).decode('latin1').strip()
    if re.fullmatch(r'[+-]?\d{1,19}(\.0*)?', text) and member.count <= 40:
        number = int(text.partition('.')[0])
        if -(2**63) <= number < 2**63:
            return number
    raise UserError(f'{file}/{member.name} holds {text!r}, not a label as 7')
