"""Lists of image files: text in the forms that people write, and VISSL's .npy."""

import contextlib
import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from swav_jax.data.images import FileSource
from swav_jax.data.listing import some
from swav_jax.data.names import EXTENSIONS, absolute, is_image, split_options
from swav_jax.errors import UserError, printable
from swav_jax.files import open_regular, read_regular

OPTIONS = ('labels', 'remove_img_path_prefix', 'new_img_path_prefix')
LOOKED_FOR = 100  # files of which one must exist when a list is opened
UNKNOWN = ('', '-', '?', 'nan', 'none', 'null')  # words for an unknown label
LABEL_NAMES = re.compile(r'y|.*(label|class|target|categor|species).*', re.IGNORECASE)
# Lines that do not end with an image's name: that name, a separator, and the rest.
REST = r'\s*(?P<mark>[,;|]|\s)\s*(?P<rest>.*)'
QUOTED = re.compile(rf'(["\'])(?P<name>.+?)\1(?:{REST})?')
PLAIN = re.compile(
    rf'(?P<name>.*(?:{"|".join(map(re.escape, EXTENSIONS))}))["\']?{REST}', re.IGNORECASE
)


class _Line(NamedTuple):
    name: str
    label: str | None  # None where nothing is written
    more: bool = False  # whether it has further columns


def open_filelist(spec: str) -> FileSource:
    """A list of image files, as text or as VISSL's .npy.

    The text has one path a line, alone or followed by its label: a whole number, or the name of its
    class; -1, nothing and `?` are unknown. Space, tab, comma, semicolon or | separate them; further
    columns are ignored. A first line that names columns, lines that begin with #, quotes around
    names and byte-order marks are understood. Relative paths start from the list's folder and stay
    below it. After a `?`, joined by `&`, may follow `labels=FILE.npy`, and VISSL's
    `remove_img_path_prefix=/old/` and `new_img_path_prefix=/new/` for images that were moved.

    Raises:
      UserError: the list cannot be read, is empty or no list of paths, its labels are of several
        kinds, or none of the first images exists.
    """
    path, options = split_options(spec, OPTIONS)
    file = absolute(path)
    labels, class_names, notes = None, None, []
    if file.suffix == '.npy':
        names = _load_npy(file, 'US').astype(str).tolist()
    else:
        lines, numbers, notes = _parse(_read_text(file), file.parent)
        names = [line.name for line in lines]
        labels, class_names, more = _number_words([line.label for line in lines], numbers)
        notes += more
    for name in names:
        if not _is_name(name):
            raise UserError(f'{file} lists {name!r}, which is not a name of a file')
    if not names:
        raise UserError(f'{file} lists no images; it should hold one path a line')
    if 'labels' in options:
        labels, class_names = _load_labels(absolute(options['labels'])), None
    if labels is not None and len(labels) != len(names):
        raise UserError(f'{len(names)} images, but {len(labels)} labels: they must be as many')
    paths = _place(names, file, options)
    first = paths[:LOOKED_FOR]
    if not any(map(os.path.isfile, first)):
        raise UserError(
            f'none of the first {len(first)} images that {file} lists is a file; the first would '
            f'be {first[0]}: relative paths start from the folder of the list, and '
            '?remove_img_path_prefix=/old/&new_img_path_prefix=/new/ replaces where images were'
        )
    notes = [f'{printable(file)}: {note}' for note in notes]
    return FileSource(paths, labels, class_names, notes, root=f'{file.parent}{os.sep}')


def _is_name(name: str) -> bool:
    """Whether a file can have this name; a .npy can hold any text."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return bool(encoded) and b'\0' not in encoded


def _place(names: Sequence[str], file: Path, options: dict[str, str]) -> list[str]:
    """The whole paths of a list's names, VISSL's prefixes replaced."""
    old, new = (options.get(name, '') for name in OPTIONS[1:])
    if old and not any(name.startswith(old) for name in names):
        raise UserError(
            f'no path begins with remove_img_path_prefix={old}; {names[0]} is the first'
        )
    names = [name.removeprefix(old) for name in names]
    for name in names:
        if '..' in name and (new or not name.startswith('/')):
            inside = os.path.normpath(name.lstrip(os.sep))
            if f'{inside}{os.sep}'.startswith(f'..{os.sep}'):
                raise UserError(
                    f'{file} lists {name}, which lies outside of {new or file.parent}: list the '
                    'whole path of an image that is elsewhere'
                )
    folder = os.path.join(file.parent, '')  # noqa: PTH118
    names = [new + name for name in names]
    return [name if name.startswith(os.sep) else folder + name for name in names]


def _read_text(file: Path) -> str:
    """The text of a list: UTF-8 with or without a mark, or UTF-16 with one.

    Names that are not UTF-8 keep their bytes, as in Python's file names.
    """
    data = read_regular(file)
    try:
        if data.startswith((b'\xff\xfe', b'\xfe\xff')):
            text = data.decode('utf-16')
        else:
            text = data.removeprefix(b'\xef\xbb\xbf').decode('utf-8', 'surrogateescape')
    except UnicodeError:
        text = '\0'
    if '\0' in text:
        raise UserError(f'{file} cannot be read (not UTF-8 text)')
    return text


def _parse(text: str, folder: Path) -> tuple[list[_Line], list[int], list[str]]:
    """The images of a list in `folder`, the numbers of their lines, and notes."""
    lines = [line.strip() for line in re.split(r'\r\n|\n|\r', text)]
    numbers = [
        i for i, x in enumerate(lines) if x and not (x[0] == '#' and not (folder / x).is_file())
    ]
    lines = [lines[i] for i in numbers]
    notes = []
    columns = None
    if len(lines) > 1 and not _has_image(lines[0]) and _has_image(lines[1]):
        columns = _find_columns(lines[0], lines[1])
        if columns or re.fullmatch(r'[\w .-]+', lines[0]):
            notes.append(f'the first line, {printable(lines[0])}, is read as the names of columns')
            lines, numbers = lines[1:], numbers[1:]
    found = [(columns and _split_columns(line, *columns)) or _split(line) for line in lines]
    if not any(_has_image(line) for line in lines):
        # Names without an ending: the last number of each line is a label if all have one.
        ends = [re.fullmatch(r'(.*\S)[\s,;|]+([+-]?\d+)', line) for line in lines]
        if ends and all(ends):
            found = [_Line(end[1], end[2]) for end in ends]
    if more := sum(line.more for line in found):
        which = 'but those of path and label' if columns else 'after the label'
        notes.append(f'columns {which} are left out ({more:,} lines)')
    return found, [i + 1 for i in numbers], notes


def _has_image(line: str) -> bool:
    return is_image(line.strip('"\'')) or PLAIN.fullmatch(line) is not None


def _split(line: str) -> _Line:
    """Split a line after the name of its image."""
    for mark in (None, ','):  # most lists, and much faster
        first, *last = line.rsplit(mark, 1)
        if last and last[0].isdecimal() and is_image(first) and first[0] not in '"\'':
            return _Line(first, last[0])
    found = QUOTED.fullmatch(line) or (None if is_image(line) else PLAIN.fullmatch(line))
    if not found:
        return _Line(line, None)
    name, mark, rest = found.group('name', 'mark', 'rest')
    if rest is None:
        return _Line(name, None)
    rest = re.sub(r'\s+#.*', '', f' {rest}').strip()
    if mark.isspace():
        mark = '\t' if '\t' in rest else None
    cells = _cells(rest, mark) if mark else rest.split()
    cells = [cell.strip('"\'') for cell in cells] or ['']
    # With spaces as the only separator, it may be the name of a class: "golden retriever".
    if mark is None and len(cells) > 1 and not _is_number(cells[0]):
        cells = [rest.strip('"\'')]
    return _Line(name, cells[0], len(cells) > 1)


def _find_columns(header: str, first: str) -> tuple[str, int, int, int | None] | None:
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


def _split_columns(line: str, mark: str, count: int, path: int, label: int | None) -> _Line | None:
    """Split a line at its separators; None if it has more or fewer than `count` columns."""
    cells = _cells(line, mark)
    if len(cells) != count:
        return None
    return _Line(
        cells[path], None if label is None else cells[label], count > 1 + (label is not None)
    )


def _cells(line: str, mark: str) -> list[str]:
    try:
        (cells,) = csv.reader([line], delimiter=mark, skipinitialspace=True)
    except csv.Error:  # a cell too long to be one
        cells = [line]
    return [cell.strip() for cell in cells]


def _is_number(word: str) -> bool:
    return re.fullmatch(r'[+-]?\d+(\.0*)?', word) is not None


def _number_words(
    words: Sequence[str | None], lines: Sequence[int]
) -> tuple[np.ndarray | None, list[str] | None, list[str]]:
    """Labels (len,), the classes' names unless the labels are numbers, and notes.

    Args:
      words: the written labels; None for nothing.
      lines: their line numbers, for messages.
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
    values = {name: i for i, name in enumerate(names)}
    for word in numbers:
        digits = word.partition('.')[0]
        if len(digits) > 20 or int(digits) >= 2**64:
            shown = digits[:20] + '…' * (len(digits) > 20)
            raise UserError(
                f'line {line(word)}: the label {shown} does not fit 64 bits: number the classes '
                'from 0'
            )
        values[word] = int(digits)
    notes = []
    if missing := sum(word not in values for word in words):
        notes.append(f'{missing:,} of {len(words):,} images have no label and count as unlabelled')
    labels = [values.get(word, -1) for word in words]
    for kind in (np.int64, np.uint64):
        with contextlib.suppress(OverflowError):
            return np.array(labels, kind), names or None, notes
    raise UserError(
        'labels must fit 64 bits: above 2^63 - 1 none may be negative or missing; number the '
        'classes from 0'
    )


def _load_labels(file: Path) -> np.ndarray:
    """Labels of a .npy file: whole numbers of any type, NaN for an unknown one."""
    labels = _load_npy(file, 'iubf')
    if labels.dtype.kind == 'f':
        whole = np.isfinite(labels) & (np.abs(labels) < 2**53) & (labels == np.trunc(labels))
        unknown = np.isnan(labels)
        if not (whole | unknown).all():
            at = (whole | unknown).argmin()
            raise UserError(f'{file} holds {labels[at]}, which is not a whole number')
        labels = np.where(unknown, -1, labels)
    return labels.astype(np.int64) if labels.dtype.kind in 'bf' else np.array(labels)


def _load_npy(file: Path, kinds: str) -> np.ndarray:
    """A one-dimensional array of a .npy file whose dtype is one of `kinds`.

    Arrays of Python objects are refused: loading them could run code.
    """
    open_regular(file).close()
    try:
        # A map of the file, because a header with sizes beyond the file's cannot be mapped.
        array = np.load(file, allow_pickle=False, mmap_mode='r')
    except Exception as error:  # numpy has many for a damaged header
        raise UserError(
            f'{file} cannot be read (not a .npy array, or one of Python objects); save a list as '
            'numpy.save(file, numpy.array(list))'
        ) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise UserError(f'{file} holds several arrays; save one with numpy.save')
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise UserError(f'{file} holds {array.dtype} {array.shape}, not a list of the right kind')
    return array
