"""Classes of images to learn from and to test on are matched by name; what is left out is said."""

import numpy as np
import pytest
from pictures import encode, picture

from swav_jax.data.images import ArraySource
from swav_jax.data.in_memory import ItemSource
from swav_jax.errors import UserError
from swav_jax.evaluate.labelled import learnable, pair

CATS = ['bird', 'cat', 'dog']


def source(labels, names=None):
    return ArraySource('x', np.zeros((len(labels), 1, 1, 1), np.uint8), labels, names)


def labelled(made):
    return [made.class_names[label] for label in made.labels]


@pytest.mark.parametrize(
    ('train', 'test', 'train_classes', 'test_classes', 'rows', 'said'),
    [
        # As torchvision would number them, and with one class missing on either side.
        (([0, 1, 2], CATS), ([0, 2, 1], CATS), 'bird cat dog', 'bird dog cat', [0, 1, 2], []),
        (
            ([0, 1, 2], CATS),
            ([0, 1], ['cat', 'dog']),
            'bird cat dog',
            'cat dog',
            [0, 1],
            ['test has no images of classes of train: bird'],
        ),
        (
            ([0, 0, 1], ['cat', 'dog']),
            ([0, 1, 2, 0], CATS),
            'cat cat dog',
            'cat dog',
            [1, 2],
            ['test: 2 of 4 images are left out, of classes without images in train: bird'],
        ),
        # A class folder without images to learn from is as good as none.
        (
            ([0, 2], CATS),
            ([0, 1, 2], CATS),
            'bird dog',
            'bird dog',
            [0, 2],
            ['test: 1 of 3 images are left out, of classes without images in train: cat'],
        ),
        # One class renamed.
        (
            ([0, 1, 2], CATS),
            ([0, 1, 2], ['bird', 'kitten', 'dog']),
            'bird cat dog',
            'bird dog',
            [0, 2],
            ['of classes without images in train: kitten', 'classes of train: cat'],
        ),
        # -1 is not a class, and not the last one.
        (
            ([0, -1, 2, 1], CATS),
            ([-1, 0, -1], CATS),
            'bird dog cat',
            'bird',
            [1],
            ['train: 1 of 4 images have no label', 'test: 2 of 3', 'classes of train: cat, dog'],
        ),
        # Ids of any size; written in several ways as names of folders.
        (
            ([7, 2**40, -5], None),
            ([-5, 7, 7, 2**40], None),
            f'7 {2**40} -5',
            f'-5 7 7 {2**40}',
            [0, 1, 2, 3],
            [],
        ),
        (([0, 1], ['007', '08']), ([8, 7], None), '007 08', '08 007', [0, 1], []),
        # Ids are places in the other's list of classes, as in VISSL's label files.
        (
            ([1, 0, 2], CATS),
            ([2, 0, 2], None),
            'cat bird dog',
            'dog bird dog',
            [0, 1, 2],
            ['test has numbers for classes', 'of train, 0 for bird', 'classes of train: cat'],
        ),
        (
            ([2, 0], None),
            ([0, 1, 2], CATS),
            '2 0',
            '0 2',
            [0, 2],
            ['train has numbers for classes', 'without images in train: cat'],
        ),
        # The same letter as macOS and as Linux write it.
        (([0, 1], ['a', 'caf\u00e9']), ([1], ['a', 'cafe\u0301']), 'a café', 'café', [0], ['a']),
    ],
)
def test_classes_are_matched_by_name(train, test, train_classes, test_classes, rows, said):
    made = pair(source(*train), source(*test))
    assert ' '.join(labelled(made.train)) == train_classes
    assert ' '.join(labelled(made.test)) == test_classes
    assert made.rows.tolist() == rows
    assert made.train.class_names is made.test.class_names
    text = '\n'.join(made.notes)
    assert bool(said) == bool(text) and all(part in text for part in said), text
    again = pair(made.train.take([0]), made.test)
    assert (again.train.labels.tolist(), again.notes) == (made.train.labels[:1].tolist(), ())
    assert again.test is made.test, 'a part of a pair stays one'


@pytest.mark.parametrize(
    ('train', 'test', 'message'),
    [
        (([0, 1], ['a', 'b']), ([0, 1], ['c', 'd']), r'no class in common (a, b and c, d)'),
        (([0, 1], ['a', 'b']), ([1, 2], None), r'no class in common (a, b and 1, 2)'),
        (([0, 1], ['a', 'b']), ([-1, 0], None), ''),  # place 0
        (([0, 0], ['a', 'b']), ([0], ['a']), 'all images of train are of one class, a'),
        ((None,), ([0], ['a']), 'train has no labels: put each class into its own folder'),
        (([0, 1], ['a', 'b']), ([-1], None), 'test has no labels'),
        (([0, 1], ['a\x1b[2J', 'b']), ([0], ['[red]\n']), r'(a\x1b[2J, b and [red]\n)'),
        ((list(range(9)), list('abcdefghi')), ([0], 'x'), '(a, b, c, d, e and 4 more and x)'),
    ],
)
def test_what_cannot_be_matched_is_refused_in_one_line(train, test, message):
    if train[0] is None:
        train = ([-1, -1], None)
        for name, remedy in (
            ('filelist:/x.txt', 'write its label, 0 or more, behind each path'),
            ('--train=webdataset:/x.tar', 'in a .cls member'),
            ('--train=torchvision:STL10:/x:unlabeled', 'name a split'),
            ('--train=folder:/x', 'put each class into its own folder'),
        ):
            with pytest.raises(UserError, match=f'{name} has no labels: .*{remedy}'):
                pair(source(*train), source(*test), (name, 'test'))
    if not message:
        pair(source(*train), source(*test))
        return
    with pytest.raises(UserError) as caught:
        pair(source(*train), source(*test))
    assert message in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('bad', 'test', 'rows', 'said'),
    [
        ((), [0, 1, 2], [0, 1, 2], ''),
        ((0,), [0, 1, 2], [0, 1, 2], ''),  # one of two
        (
            (0, 1),
            [0, 1, 2, 0],
            [1, 2],
            'no image of bird in train can be read: 2 of 4 images of te',
        ),
        ((0, 1, 2, 3), [2, 0], [0], 'no image of bird, cat in train can be read: 1 of 2 images'),
        ((0, 1, 2, 3, 4, 5), [2, 0], [0, 1], ''),  # which is said of all of them
        ((0, 1), [1, 2], [0, 1], ''),
        ((0, 1), [0, 0], None, 'no image of bird in train can be read, and test has no others'),
    ],
)
def test_classes_that_cannot_be_learned_are_left_out(bad, test, rows, said):
    """A class is in the folder, but none of its images can be read: as good as none."""
    whole = encode(picture(4, 4), 'PNG')
    train = ItemSource([b'no image' if i in bad else whole for i in range(6)])
    train = train.relabel(np.repeat([0, 1, 2], 2).astype(np.int32), CATS)
    if rows is None:
        with pytest.raises(UserError, match=said):
            pair(train, source(test, CATS))
        return
    made = pair(train, source(test, CATS))
    assert len(made.train) == 6, 'unreadable images are counted later'
    assert made.rows.tolist() == rows and labelled(made.test) == [CATS[test[i]] for i in rows]
    assert said in '\n'.join(made.notes) and ('read' in '\n'.join(made.notes)) == bool(said)
    assert learnable(made.train, made.test)[0].tolist() == list(range(len(rows)))
