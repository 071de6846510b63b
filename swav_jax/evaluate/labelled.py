"""Labelled images to learn from and others to test on, with the same numbers for their classes.

Classes are matched by name, and those of a pair are the classes that have images to learn from.
Test images are left out, with a note, if their class is unknown, or has no image to learn from
that can be read: they could not be judged, or never be right. If one side has names and the other
only ids, as in a list of paths and numbers, an id is a place in the other's list of classes.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from swav_jax.data.images import Source
from swav_jax.data.listing import some
from swav_jax.data.pillow import is_readable
from swav_jax.errors import UserError, printable

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
    """Two sources with the same numbers for their classes; each image is of a known class.

    Attributes:
      train: images to learn from; each of its classes has some.
      test: images to test on, of these classes.
      rows: (len(test),) indices of these in the source that `pair` got as `test`.
      notes: lines on what is left out, and on classes that only one side has.
    """

    train: Source
    test: Source
    rows: np.ndarray
    notes: tuple[str, ...] = ()


def pair(train: Source, test: Source, names: Sequence[str] = ('train', 'test')) -> Pair:
    """Match the classes of two sources. A pair is returned unchanged.

    Args:
      train: labelled images to learn from.
      test: labelled images to test on.
      names: what messages call the two.

    Raises:
      UserError: one has no labels, all of `train` is one class, or they have no class in common
        that can be learned.
    """
    names = [printable(name) for name in names]
    for source, name in zip((train, test), names, strict=True):
        if source.labels is None:
            kind = re.search(r'(?:^|=)(\w+):', name)
            remedy = _REMEDIES.get(kind and kind[1], 'put each class into its own folder')
            raise UserError(f'{name} has no labels: {remedy}')
    known = all(len(s) and s.labels.min() >= 0 for s in (train, test))
    if known and train.class_names is test.class_names:  # it is a pair, or parts of one
        return Pair(train, test, np.arange(len(test)))

    train_keys, test_keys, notes = _keys(train, test, names)
    present = np.unique(train.labels[train.labels >= 0])
    numbers = {train_keys[old]: new for new, old in enumerate(present)}
    class_names = [train.class_names[old] for old in present]
    train_labels, test_labels = (
        np.array([*(numbers.get(key, -1) for key in keys), -1], np.int32)[source.labels]
        for keys, source in ((train_keys, train), (test_keys, test))
    )
    rows = np.flatnonzero(test_labels >= 0)
    if not len(rows):
        theirs = [test.class_names[i] for i in np.unique(test.labels[test.labels >= 0])]
        raise UserError(
            f'{names[0]} and {names[1]} have no class in common ({few(class_names)} and '
            f'{few(theirs)}): give both the same class names'
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
    kept, line = learnable(train, test.take(rows), names)
    return Pair(train, test.take(rows[kept]), rows[kept], (*notes, *line))


def learnable(
    train: Source, test: Source, names: Sequence[str] = ('train', 'test')
) -> tuple[np.ndarray, list[str]]:
    """Find the images of `test` in whose class some image of `train` can be read.

    The classes of the two have been matched by `pair`.

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
    if len(kept) == len(test) or len(lost) == len(classes):  # that none is readable is found later
        return np.arange(len(test)), []
    line = f'no image of {few([train.class_names[i] for i in lost])} in {names[0]} can be read'
    if not len(kept):
        raise UserError(f'{line}, and {names[1]} has no others: repair them')
    count = f'{len(test) - len(kept):,} of {len(test):,}'
    return kept, [f'{line}: {count} images of {names[1]}, which are of these classes, are left out']


def _keys(
    train: Source, test: Source, names: Sequence[str]
) -> tuple[list[str], list[str], list[str]]:
    """What the classes of each are matched by, and a line if that is not the name."""
    sides = train.class_names, test.class_names
    numbered = [all(re.fullmatch(r'-?[0-9]+', name) for name in side) for side in sides]

    def plain(name):
        # A letter can be encoded in several ways, and file systems differ in which they keep.
        return str(int(name)) if all(numbered) else unicodedata.normalize('NFC', name)

    keys = [[plain(name) for name in side] for side in sides]
    keys = [k if len(set(k)) == len(k) else side for k, side in zip(keys, sides, strict=True)]
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


def few(names: Sequence[str]) -> str:
    """The first names as text, and how many more there are."""
    return some(names, len(names), SHOWN)
