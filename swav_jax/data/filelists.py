"""Lists of image files: text in the forms that people write, and VISSL's .npy."""

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from swav_jax.data.images import FileSource
from swav_jax.data.names import EXTENSIONS, is_image, some
from swav_jax.data.regular import absolute, open_regular, read_regular
from swav_jax.errors import UserError
from swav_jax.terminal import printable

OPTIONS = ('labels', 'remove_img_path_prefix', 'new_img_path_prefix')
LOOKED_FOR = 100  # files that are looked for when a list is opened
UNKNOWN = ('', '-', '?', 'nan', 'none', 'null')  # words for a label that is not known
# Of a line that does not end with an image's name: the name, what follows it, and the rest.
LINE = re.compile(
    rf'(.*(?:{"|".join(map(re.escape, EXTENSIONS))}))["\']?\s*([,;|]|\s)\s*(.*)', re.IGNORECASE
)
LABEL_NAMES = re.compile(r'y|.*(label|class|target|categor|species).*', re.IGNORECASE)


class Listed(NamedTuple):
    """A list of images: paths, the word for each label (None: nothing), their lines, and notes."""

    paths: list[str]
    words: list[str | None]
    lines: list[int]  # counted from 1
    notes: list[str]


def open_filelist(spec: str) -> FileSource:
    """A list of image files, as text or as VISSL's .npy.

    The text has one path a line, alone or followed by its label: a whole number, or the name of its
    class; -1, nothing and `?` are unknown. Space, tab, comma, semicolon or | come between; columns
    after the label are left out. A first line that names columns, lines that begin with #, quotes
    around names and byte-order marks are understood. Relative paths begin where the list lies and
    stay below it. After a `?` and joined by `&` may follow `labels=FILE.npy`, and VISSL's
    `remove_img_path_prefix=/old/` and `new_img_path_prefix=/new/` where the images have moved.

    Raises:
      UserError: the list cannot be read, is empty or no list of paths, its labels are of several
        kinds, or none of the first images exists.
    """
    path, options = split_options(spec, OPTIONS)
    file = absolute(path)
    if file.suffix == '.npy':
        names = load_npy(file, 'US')
        names = names.astype(str) if names.dtype.kind == 'S' else names
        listed = Listed(names.tolist(), [None] * len(names), [], [])
    else:
        listed = parse(read_text(file), file.parent)
    for name in listed.paths:
        if '\0' in name or not _is_name(name):
            raise UserError(f'{file} lists {name!r}, which is no name of a file')
    if not listed.paths:
        raise UserError(f'{file} lists no images; it should hold one path a line')
    labels, class_names, notes = number_words(listed.words, listed.lines)
    if 'labels' in options:
        labels, class_names = load_labels(absolute(options['labels'])), None
    if labels is not None and len(labels) != len(listed.paths):
        raise UserError(
            f'{len(listed.paths)} images, but {len(labels)} labels: they must be as many'
        )
    paths = place(listed.paths, file, options)
    look_for(paths, file)
    notes = [f'{printable(file)}: {note}' for note in [*listed.notes, *notes]]
    return FileSource(paths, labels, class_names, notes, root=f'{file.parent}{os.sep}')


def split_options(spec: str, allowed: Sequence[str]) -> tuple[str, dict[str, str]]:
    """('path', {'key': 'value'}) of 'path?key=value&…'.

    Raises:
      UserError: a key that is not allowed.
    """
    path, _, query = spec.partition('?')
    options = dict(item.partition('=')[::2] for item in query.split('&') if item)
    for key in options:
        if key not in allowed:
            raise UserError(f'{key!r} is not known after the ?; use {", ".join(allowed)}')
    return path, options


def place(names: Sequence[str], file: Path, options: dict[str, str]) -> list[str]:
    """The whole paths of what a list names, VISSL's prefixes replaced.

    Raises:
      UserError: one leaves the folder that it should be below, or none has the prefix.
    """
    old, new = (options.get(name, '') for name in OPTIONS[1:])
    if old and not any(name.startswith(old) for name in names):
        raise UserError(
            f'no path begins with remove_img_path_prefix={old}; {names[0]} is the first'
        )
    names = [name.removeprefix(old) for name in names]
    for name in names:
        if '..' in name and (new or not name.startswith('/')) and _climbs(name):
            raise UserError(
                f'{file} lists {name}, which lies outside of {new or file.parent}: list the whole '
                'path of an image that is elsewhere'
            )
    folder = os.path.join(file.parent, '')  # noqa: PTH118
    names = [new + name for name in names]
    return [name if name.startswith(os.sep) else folder + name for name in names]


def _is_name(name: str) -> bool:
    """Whether the text can be written as bytes; of a .npy it may be any."""
    try:
        return bool(os.fsencode(name))
    except UnicodeEncodeError:
        return False


def _climbs(name: str) -> bool:
    """Whether a path below a folder leaves it through its parent."""
    return f'{os.path.normpath(name.lstrip(os.sep))}{os.sep}'.startswith(f'..{os.sep}')


def look_for(paths: Sequence[str], file: Path) -> None:
    """Make sure that one of the first images is there, as those of a list of other places are not.

    Raises:
      UserError: none of them is.
    """
    first = paths[:LOOKED_FOR]
    if not any(map(os.path.isfile, first)):
        raise UserError(
            f'none of the first {len(first)} images that {file} lists is a file; the first would '
            f'be {first[0]}: relative paths begin where the list lies, and '
            '?remove_img_path_prefix=/old/&new_img_path_prefix=/new/ tells where images have moved'
        )


def read_text(file: Path) -> str:
    """The text of a list: UTF-8 with or without a mark, or UTF-16 with one.

    Bytes of names that are no UTF-8 are kept, as Python keeps those of file names.

    Raises:
      UserError: it cannot be read or is no text.
    """
    try:
        data = read_regular(file)
        if data.startswith((b'\xff\xfe', b'\xfe\xff')):
            text = data.decode('utf-16')
        else:
            text = data.removeprefix(b'\xef\xbb\xbf').decode('utf-8', 'surrogateescape')
        if '\0' in text:
            raise ValueError
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or 'not UTF-8 text'
        raise UserError(f'{file} cannot be read ({reason})') from error
    return text


def parse(text: str, folder: Path) -> Listed:
    """What the lines of a list say; `folder` is where it lies."""
    lines = [line.strip() for line in re.split(r'\r\n|\n|\r', text)]
    numbers = [
        i for i, x in enumerate(lines) if x and not (x[0] == '#' and not (folder / x).is_file())
    ]
    lines = [lines[i] for i in numbers]
    notes = []
    columns = None
    if len(lines) > 1 and not _has_image(lines[0]) and _has_image(lines[1]):
        columns = _columns(lines[0], lines[1])
        if columns or re.fullmatch(r'[\w .-]+', lines[0]):
            notes.append(
                f'the first line, {printable(lines[0])}, is taken for the names of columns'
            )
            lines, numbers = lines[1:], numbers[1:]
    found = [(columns and _by_columns(line, *columns)) or _by_name(line) for line in lines]
    if not any(_has_image(line) for line in lines):
        # Names without an ending: the last number of each line is a label if all have one.
        ends = [re.fullmatch(r'(.*\S)[\s,;|]+([+-]?\d+)', line) for line in lines]
        if ends and all(ends):
            found = [(end[1], end[2], False) for end in ends]
    if more := sum(1 for _, _, others in found if others):
        which = 'but those of path and label' if columns else 'after the label'
        notes.append(f'columns {which} are left out ({more:,} lines)')
    names, words = [name for name, _, _ in found], [word for _, word, _ in found]
    return Listed(names, words, [i + 1 for i in numbers], notes)


def _has_image(line: str) -> bool:
    return is_image(line.strip('"\'')) or LINE.fullmatch(line) is not None


def _by_name(line: str) -> tuple[str, str | None, bool]:
    """(name, label or None, whether more columns follow) of a line."""
    for mark in (None, ','):  # most lists, and much faster
        first, *last = line.rsplit(mark, 1)
        if last and last[0].isdecimal() and is_image(first) and first[0] not in '"\'':
            return first, last[0], False
    quoted = re.fullmatch(r'(["\'])(.+?)\1\s*(?:[\s,;|]\s*(.*))?', line)
    if quoted:
        name, mark, rest = quoted[2], line[quoted.end(2) + 1 :].strip()[:1], quoted[3]
    elif not is_image(line) and (parts := LINE.fullmatch(line)):
        name, mark, rest = parts.groups()
    else:
        return line, None, False
    if rest is None:
        return name, None, False
    rest = re.sub(r'\s+#.*', '', f' {rest}').strip()
    mark = mark if mark in ',;|' and mark else '\t' if '\t' in rest else None
    cells = _cells(rest, mark) if mark else rest.split()
    cells = [cell.strip('"\'') for cell in cells] or ['']
    # What has no separator but spaces may be the name of a class: "golden retriever".
    if mark is None and len(cells) > 1 and not _is_number(cells[0]):
        cells = [rest.strip('"\'')]
    return name, cells[0], len(cells) > 1


def _columns(header: str, first: str) -> tuple[str, int, int, int | None] | None:
    """(separator, columns, that of the path, that of the label or None), if the line names any."""
    for mark in ',\t;|':
        names, cells = _cells(header, mark), _cells(first, mark)
        if len(names) > 1 and len(names) == len(cells):
            images = [i for i, cell in enumerate(cells) if is_image(cell)]
            if images:
                others = [i for i in range(len(names)) if i not in images]
                labels = [i for i in others if LABEL_NAMES.fullmatch(names[i])]
                after = [i for i in others if i > images[0]]
                return mark, len(names), images[0], next(iter([*labels, *after, *others]), None)
    return None


def _by_columns(
    line: str, mark: str, count: int, path: int, label: int | None
) -> tuple[str, str | None, bool] | None:
    """As `_by_name`, of a line of cells; None if they are more or fewer than the columns."""
    cells = _cells(line, mark)
    if len(cells) != count:
        return None
    word = None if label is None else cells[label]
    return cells[path], word, count > 1 + (label is not None)


def _cells(line: str, mark: str) -> list[str]:
    try:
        (cells,) = csv.reader([line], delimiter=mark, skipinitialspace=True)
    except csv.Error:  # a cell too long to be one
        cells = [line]
    return [cell.strip() for cell in cells]


def _is_number(word: str) -> bool:
    return re.fullmatch(r'[+-]?\d+(\.0*)?', word) is not None


def number_words(
    words: Sequence[str | None], lines: Sequence[int]
) -> tuple[np.ndarray | None, list[str] | None, list[str]]:
    """Labels (len,), the classes' names unless the labels are numbers, and notes.

    Args:
      words: what is written as labels; None is nothing.
      lines: where, for messages.

    Raises:
      UserError: numbers and names, or numbers that are not whole or not of 64 bits.
    """
    known = {x for x in words if x is not None and x.lower() not in UNKNOWN}
    if not known:
        return None, None, []
    numbers = {word for word in known if _is_number(word)}
    names = sorted(known - numbers)

    def line(word: str) -> int:
        return lines[words.index(word)]

    if names and (numbers - {'-1'} or re.fullmatch(r'[+-]?\d*\.\d+(e[+-]?\d+)?', names[0])):
        word = min(numbers, default='')
        raise UserError(
            f'labels must be whole numbers or names of classes, but {some(names, len(names))} '
            f'{"stands beside " + word if word else "is neither"} (line {line(names[0])})'
        )
    if names:
        values = {name: i for i, name in enumerate(names)} | dict.fromkeys(numbers, -1)
    else:
        values = {}
        for word in numbers:
            digits = word.partition('.')[0]
            if len(digits) > 20 or int(digits) >= 2**64:
                shown = digits[:20] + '…' * (len(digits) > 20)
                raise UserError(
                    f'line {line(word)}: the label {shown} does not fit 64 bits: number the '
                    'classes from 0'
                )
            values[word] = int(digits)
    notes = []
    if missing := sum(word not in values for word in words):
        notes.append(f'{missing:,} of {len(words):,} images have no label and count as unlabelled')
    smallest, largest = min([-1 if missing else 0, *values.values()]), max(values.values())
    if smallest < -(2**63) or (smallest < 0 and largest >= 2**63):
        raise UserError(
            'labels must fit 64 bits: above 2^63 - 1 none may be negative or missing; number the '
            'classes from 0'
        )
    kind = np.int64 if largest < 2**63 else np.uint64
    return np.array([values.get(word, -1) for word in words], kind), names or None, notes


def load_labels(file: Path) -> np.ndarray:
    """Labels of a .npy file: whole numbers of any type.

    Raises:
      UserError: the file cannot be read or holds something else.
    """
    labels = load_npy(file, 'iubf')
    if labels.dtype.kind == 'f':
        whole = np.isfinite(labels) & (np.abs(labels) < 2**53) & (labels == np.trunc(labels))
        unknown = np.isnan(labels)
        if not (whole | unknown).all():
            at = (whole | unknown).argmin()
            raise UserError(f'{file} holds {labels[at]}, which is no whole number')
        labels = np.where(unknown, -1, labels)
    return labels.astype(np.int64) if labels.dtype.kind in 'bf' else np.array(labels)


def load_npy(file: Path, kinds: str) -> np.ndarray:
    """A one-dimensional array of a .npy file whose dtype is one of `kinds`.

    Arrays of Python objects are refused: loading them could run code.

    Raises:
      UserError: the file is missing or holds something else.
    """
    try:
        with open_regular(file):
            # A map of the file, as sizes that the file has not cannot be mapped.
            array = np.load(file, allow_pickle=False, mmap_mode='r')
    except Exception as error:  # numpy has many for a damaged header
        reason = getattr(error, 'strerror', None) or 'not a .npy array, or one of Python objects'
        raise UserError(
            f'{file} cannot be read ({reason}); save a list as numpy.save(file, numpy.array(list))'
        ) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise UserError(f'{file} holds several arrays; save one with numpy.save')
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise UserError(f'{file} holds {array.dtype} {array.shape}, not a list of the right kind')
    return array
