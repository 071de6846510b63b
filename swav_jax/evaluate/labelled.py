"""Labelled images to learn from and others to test on, with one numbering of their classes.

Classes are matched by name. The classes are those that have images to learn from. A test image of
another class could never be classified right, nor one of a class of which no image to learn from
can be read, and one of an unknown class never be judged: all are left out, and the notes say how
many. Where one side has names and the other only ids, as in a list of paths and numbers, the ids
are places in the other's list of classes.
"""

import argparse
import dataclasses
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from swav_jax.data.images import Source
from swav_jax.data.pillow import is_readable
from swav_jax.errors import UserError
from swav_jax.terminal import printable

SHOWN = 5  # names in a line
# How images of each kind of source get labels.
_REMEDIES = {
    'filelist': 'write its label, 0 or more, behind each path',
    'webdataset': 'give each image its label in a .cls member',
    'torchvision': 'name a split with labels',
    'tfds': 'name a dataset with labels',
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two sources that number their classes alike, each image of a known class.

    Attributes:
      train: images to learn from; each of its classes has some.
      test: images to test on, of these classes.
      rows: (len(test),) which images of the source that was given `test` holds.
      notes: lines that say what was left out, and which classes only one side has.
    """

    train: Source
    test: Source
    rows: np.ndarray
    notes: tuple[str, ...] = ()


def pair(train: Source, test: Source, names: Sequence[str] = ('train', 'test')) -> Pair:
    """Match the classes of two sources. A pair stays as it is.

    Args:
      train: labelled images to learn from.
      test: labelled images to test on.
      names: what messages call the two.

    Raises:
      UserError: one has no labels, or they have no class in common that can be learned, or all of
        `train` is one class.
    """
    names = [printable(name) for name in names]
    for source, name in zip((train, test), names, strict=True):
        if source.labels is None:
            kind = re.search(r'(?:^|=)(\w+):', name)
            remedy = _REMEDIES.get(kind and kind[1], 'put each class into its own folder')
            raise UserError(f'{name} has no labels: {remedy}')
    if _is_pair(train, test):
        return Pair(train, test, np.arange(len(test)))

    counts = np.bincount(train.labels[train.labels >= 0], minlength=len(train.class_names))
    train_keys, test_keys, notes = _keys(train, test, names)
    order = np.flatnonzero(counts)
    numbers = {train_keys[old]: new for new, old in enumerate(order)}
    class_names = [train.class_names[old] for old in order]
    train_labels = _renumber(train.labels, [numbers.get(key, -1) for key in train_keys])
    test_labels = _renumber(test.labels, [numbers.get(key, -1) for key in test_keys])
    rows = np.flatnonzero(test_labels >= 0)
    if not len(rows):
        raise UserError(
            f'{names[0]} and {names[1]} have no class in common ({few(class_names)} and '
            f'{few(_present(test))}): give both the same class names'
        )
    if len(class_names) < 2:
        raise UserError(
            f'all images of {names[0]} are of one class, {few(class_names)}: there is nothing to '
            'tell apart; name images of several classes'
        )
    for source, name in zip((train, test), names, strict=True):
        if unknown := np.count_nonzero(source.labels < 0):
            notes.append(
                f'{name}: {unknown:,} of {len(source):,} images have no label and are left out'
            )
    of_others = (test.labels >= 0) & (test_labels < 0)
    if of_others.any():
        others = [test.class_names[i] for i in np.unique(test.labels[of_others])]
        notes.append(
            f'{names[1]}: {np.count_nonzero(of_others):,} of {len(test):,} images are left out, of '
            f'classes without images in {names[0]}: {few(others)}'
        )
    only = sorted(set(range(len(class_names))) - set(test_labels[rows].tolist()))
    if only:
        missing = few([class_names[i] for i in only])
        notes.append(f'{names[1]} has no images of classes of {names[0]}: {missing}')
    train = train.relabel(train_labels, class_names).take(np.flatnonzero(train_labels >= 0))
    test = test.relabel(test_labels, class_names)
    kept, said = learnable(train, test.take(rows), names)
    return Pair(train, test.take(rows[kept]), rows[kept], (*notes, *said))


def learnable(
    train: Source, test: Source, names: Sequence[str] = ('train', 'test')
) -> tuple[np.ndarray, list[str]]:
    """Which images of `test` are not of a class of `train` none of whose images can be read.

    Args:
      train, test: as `pair` matches them.
      names: what messages call the two.

    Returns:
      Their indices, and a line on the others if there are any.

    Raises:
      UserError: there are none.
    """
    order = np.argsort(train.labels, kind='stable')
    classes, first = np.unique(train.labels[order], return_index=True)
    with ThreadPoolExecutor() as threads:
        can = threads.map(
            lambda rows: any(is_readable(train, int(i)) for i in rows), np.split(order, first[1:])
        )
        lost = classes[~np.fromiter(can, bool)]
    kept = np.flatnonzero(~np.isin(test.labels, lost))
    if len(kept) == len(test) or len(lost) == len(classes):  # that none can be read is said later
        return np.arange(len(test)), []
    line = f'no image of {few([train.class_names[i] for i in lost])} in {names[0]} can be read'
    if not len(kept):
        raise UserError(f'{line}, and {names[1]} has no others: repair them')
    count = f'{len(test) - len(kept):,} of {len(test):,}'
    return kept, [f'{line}: {count} images of {names[1]}, which are of these classes, are left out']


def _is_pair(train: Source, test: Source) -> bool:
    """Whether `pair` made them, or parts of what it made."""
    known = all(len(s) and s.labels.min() >= 0 for s in (train, test))
    return train.class_names is test.class_names and known


def _renumber(labels: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    return np.array([*numbers, -1], np.int32)[labels]


def _present(source: Source) -> list[str]:
    return [source.class_names[i] for i in np.unique(source.labels[source.labels >= 0])]


def _keys(
    train: Source, test: Source, names: Sequence[str]
) -> tuple[list[str], list[str], list[str]]:
    """What the classes of both are matched by, and lines that say it where it is not the name."""
    sides = train.class_names, test.class_names
    numbered = [all(re.fullmatch(r'-?[0-9]+', name) for name in side) for side in sides]
    # One letter can be written in several ways, and file systems differ in which they keep.
    plain = (lambda name: str(int(name))) if all(numbered) else _normal_form
    keys = [_distinct([plain(name) for name in side], side) for side in sides]
    if numbered[0] == numbered[1] or set(keys[0]) & set(keys[1]):
        return *keys, []
    ids, other = (0, 1) if numbered[0] else (1, 0)
    places = [int(name) for name in sides[ids]]
    if not all(0 <= place < len(keys[other]) for place in places):
        return *keys, []
    keys[ids] = [keys[other][place] for place in places]
    return *keys, [
        f'{names[ids]} has numbers for classes: they are taken as places in the list of classes of '
        f'{names[other]}, 0 for {printable(sides[other][0])}'
    ]


def _normal_form(name: str) -> str:
    return unicodedata.normalize('NFC', name)


def _distinct(keys: list[str], names: list[str]) -> list[str]:
    """The keys, unless they would make one class of two."""
    return keys if len(set(keys)) == len(keys) else names


def few(names: Sequence[str], count: int | None = None) -> str:
    """The first names of a list, of `count` if it is cut, as text; and how many more there are."""
    more = (len(names) if count is None else count) - SHOWN
    return ', '.join(map(printable, names[:SHOWN])) + (f' and {more:,} more' if more > 0 else '')


def say(notes: Iterable[str]) -> None:
    """Print lines to stderr."""
    for note in notes:
        print(f'note: {printable(note)}', file=sys.stderr)


def add_flags(made: argparse.ArgumentParser) -> None:
    """Add the flags that name labelled images to learn from and others to test on."""
    made.add_argument('--train', help='labelled images (default: config.evaluate.train_source)')
    made.add_argument('--test', help='others to test on (default: config.evaluate.test_source)')


def open_pair(model, arguments: argparse.Namespace) -> tuple[Source, Source]:
    """The images of --train and --test, as `pair` matches them; says what it leaves out.

    Raises:
      UserError: there are none, or they cannot be matched.
    """
    evaluate, opened, names = model.config.evaluate, [], []
    for flag, default in (('train', evaluate.train_source), ('test', evaluate.test_source)):
        spec = getattr(arguments, flag) or default
        if not spec:
            raise UserError(f'--{flag} is missing: name labelled images, as folder:/path/{flag}')
        opened.append(model.open(spec, arguments.limit))
        names.append(f'--{flag}={spec}')
        say(f'{names[-1]}: {note}' for note in opened[-1].notes)
    made = pair(*opened, names)
    say(made.notes)
    return made.train, made.test
