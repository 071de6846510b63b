"""Lists of images as people and programs write them."""

import os

import numpy as np
import pytest
from PIL import Image
from refusals import refusal

from swav_jax.data import sources

X = {'a.jpg', 'b.jpg', 'c d.jpg', 'e,f.jpg', 'g 7.jpg', '#1.jpg'}
TWO, NUMBERS = ['a.jpg', 'b.jpg'], [3, -5]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('list')
    for name in X:
        Image.new('L', (2, 2)).save(path / name)
    return path


def opened(folder, text, options=''):
    (folder / 'list.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
    source = sources.open_source(f'filelist:{folder}/list.txt{options}', channels=3)
    names = [path.removeprefix(f'{folder}/') for path in source.paths]
    ids = source.label_ids()
    return names, None if ids is None else ids.tolist(), source


@pytest.mark.parametrize(
    ('text', 'names', 'labels', 'said'),
    [
        ('a.jpg\nb.jpg', TWO, None, None),
        (b'\xef\xbb\xbfa.jpg 3\nb.jpg -5', TWO, NUMBERS, None),
        ('a.jpg 3\nb.jpg -5\n'.encode('utf-16'), TWO, NUMBERS, None),
        ('a.jpg 3\r\nb.jpg -5\r\n\r\n', TWO, NUMBERS, None),
        ('a.jpg 3\rb.jpg -5\r', TWO, NUMBERS, None),
        ('\n\n  a.jpg   3 \n\n\tb.jpg\t-5\n', TWO, NUMBERS, None),
        ('a.jpg,3\nb.jpg,-5', TWO, NUMBERS, None),
        ('a.jpg, 3\nb.jpg , -5', TWO, NUMBERS, None),
        ('a.jpg;3\nb.jpg;-5', TWO, NUMBERS, None),
        ('a.jpg 3.0\nb.jpg -5.', TWO, NUMBERS, None),
        ('path,label\na.jpg,3\nb.jpg,-5', TWO, NUMBERS, 'path,label'),
        ('label\tpath\n3\ta.jpg\n-5\tb.jpg', TWO, NUMBERS, 'label'),
        ('id,file,class\n8,a.jpg,3\n9,b.jpg,-5', TWO, NUMBERS, 'columns but those of path and lab'),
        ('file,mask\na.jpg,c.png\nb.jpg,d.png', TWO, None, 'columns but those of path and label'),
        ('filename\na.jpg\nb.jpg', TWO, None, 'filename'),
        ('path label\na.jpg 3\nb.jpg -5', TWO, NUMBERS, 'path label'),
        ('# made by hand\na.jpg 3\n#c d.jpg 4\nb.jpg -5 # a cat', TWO, NUMBERS, None),
        ('#1.jpg\na.jpg', ['#1.jpg', 'a.jpg'], None, None),
        ('"a.jpg",3\n"b.jpg",-5', TWO, NUMBERS, None),
        ("'a.jpg' 3\n'b.jpg' -5", TWO, NUMBERS, None),
        ('"c d.jpg" "3"\n"e,f.jpg" "4"', ['c d.jpg', 'e,f.jpg'], [3, 4], None),
        ('c d.jpg 3\ne,f.jpg 4', ['c d.jpg', 'e,f.jpg'], [3, 4], None),
        ('c d.jpg,3\ne,f.jpg,4', ['c d.jpg', 'e,f.jpg'], [3, 4], None),
        ('g 7.jpg\nc d.jpg', ['g 7.jpg', 'c d.jpg'], None, None),
        ('g 7.jpg 3\nc d.jpg 4', ['g 7.jpg', 'c d.jpg'], [3, 4], None),
        ('a.jpg 3 1 0\nb.jpg -5 0 1', TWO, NUMBERS, 'columns after the label'),
        ('a.jpg,3,train\nb.jpg,-5,train', TWO, NUMBERS, 'columns after the label'),
        ('a.jpg 3\nb.jpg', TWO, [3, -1], '1 of 2 images have no label'),
        ('a.jpg,3\nb.jpg,', TWO, [3, -1], '1 of 2 images have no label'),
        ('a.jpg 3\nb.jpg ?', TWO, [3, -1], '1 of 2 images have no label'),
        ('a.jpg 3\nb.jpg -1', TWO, [3, -1], None),
        ('a.jpg -1\nb.jpg -1', TWO, None, None),
        (f'a.jpg {2**62}\nb.jpg {-(2**63)}', TWO, [2**62, -(2**63)], None),
        (f'a.jpg {2**64 - 1}\nb.jpg 0', TWO, [2**64 - 1, 0], None),
    ],
)
def test_forms_of_lists(folder, text, names, labels, said):
    found, ids, source = opened(folder, text)
    assert (found, ids) == (names, labels)
    assert bool(source.notes) == (said is not None)
    assert said is None or said in '\n'.join(source.notes)


@pytest.mark.parametrize(
    'text', ['a.jpg dog\nb.jpg big cat\nc d.jpg dog', 'f,y\na.jpg,dog\nb.jpg,big cat\nc d.jpg,dog']
)
def test_labels_may_be_names(folder, text):
    _, ids, source = opened(folder, text)
    assert source.class_names == ['big cat', 'dog'] and ids == [1, 0, 1]


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('a.jpg 1\n\nb.jpg cat', 'cat stands beside 1 (line 3)'),
        ('a.jpg 1.5', '1.5'),
        (f'a.jpg {2**64}', f'line 1: the label {2**64} does not fit 64 bits: number the classes'),
        (f'# x\npath,label\na.jpg,1\nb.jpg,{"9" * 5000}', f'line 4: the label {"9" * 20}… does'),
        (f'a.jpg {2**63}\nb.jpg -5', 'must fit 64 bits'),
        (f'a.jpg {2**63}\nb.jpg', 'must fit 64 bits'),
        (f'a.jpg {-(2**63) - 1}', 'must fit 64 bits'),
        ('', 'lists no images'),
        ('# nothing\n', 'lists no images'),
        (b'a.jpg\0b.jpg', 'not UTF-8 text'),
        ('x.jpg\ny.jpg', 'none of the first 2 images'),
        ('/dev/zero\n/dev/null\n', 'none of the first 2 images'),
        ('.\n..\n', 'lies outside'),
        ('a.jpg "\n' + '"' * 200_000, 'none of'),
    ],
)
def test_lists_that_are_refused(folder, text, said):
    (folder / 'bad.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
    if said == 'none of':  # a line of quotes is nothing but a bad name
        assert len(opened(folder, text)[0]) == 2
    else:
        assert said in refusal(f'filelist:{folder}/bad.txt')


@pytest.mark.parametrize(
    ('labels', 'expected'),
    [
        (np.array([3, -1]), [3, -1]),
        (np.array([3, 255], np.uint8), [3, 255]),
        (np.array([3, np.nan]), [3, -1]),
        (np.array([True, False]), [1, 0]),
        (np.array([2**64 - 1, 5], np.uint64), [2**64 - 1, 5]),
        (np.array([3, -(2**40)], '>i8'), [3, -(2**40)]),
        (np.array([0.5, 1]), '0.5, which is not a whole number'),
        (np.array([1, np.inf]), 'inf, which is not a whole number'),
        (np.array([[1, 2]]), 'not a list of the right kind'),
        (np.array(['1', '2']), 'not a list of the right kind'),
        (np.array([1]), '2 images, but 1 labels'),
    ],
)
def test_labels_of_npy(folder, labels, expected):
    np.save(folder / 'labels.npy', labels)
    options = f'?labels={folder}/labels.npy'
    if isinstance(expected, list):
        assert opened(folder, 'a.jpg 7\nb.jpg 7', options)[1] == expected
    else:
        (folder / 'list.txt').write_text('a.jpg\nb.jpg')
        assert expected in refusal(f'filelist:{folder}/list.txt{options}')


def test_npy_files_that_are_none(folder):
    path = folder / 'x.npy'
    np.save(path, np.array([b'a.jpg', b'b.jpg']))
    assert len(sources.open_source(f'filelist:{path}', channels=3)) == 2
    whole = path.read_bytes()
    np.savez(folder / 'many.npz', a=np.arange(3))
    for content in (
        whole[:-3],
        whole.replace(b"'shape': (2,)", b"'shape': (2000000000000,)"),
        whole.replace(b"'shape': (2,)", b"'shape': (-2,)"),
        whole.replace(b'|S5', b'|O5'),
        whole[:8],
        b'',
        (folder / 'many.npz').read_bytes(),
        b'\x80\x04N.',
    ):
        path.write_bytes(content)
        assert 'x.npy' in refusal(f'filelist:{path}')


@pytest.mark.parametrize('name', ['pipe.txt', 'pipe.npy', 'zero.txt', 'zero.npy', 'sub', 'gone'])
def test_lists_that_are_no_files(tmp_path, name):
    (tmp_path / 'sub').mkdir()
    for ending in ('txt', 'npy'):
        os.mkfifo(tmp_path / f'pipe.{ending}')
        (tmp_path / f'zero.{ending}').symlink_to('/dev/zero')
    assert 'cannot be read' in refusal(f'filelist:{tmp_path}/{name}')


def test_what_a_list_names_is_read_only_if_it_is_a_file(folder, tmp_path):
    os.mkfifo(tmp_path / 'pipe.jpg')
    _, _, source = opened(folder, f'a.jpg\n{tmp_path}/pipe.jpg\n/dev/zero\n/etc\n/gone.jpg')
    assert source.read(0)
    for i in range(1, 5):
        with pytest.raises(OSError, match=r'pipe|folder|No such'):
            source.read(i)


@pytest.mark.parametrize('name', ['a\0b.jpg', '\ud800.jpg', ''])
def test_names_of_npy_that_no_file_has(folder, name):
    np.save(folder / 'x.npy', np.array(['a.jpg', name]))
    assert 'which is not a name of a file' in refusal(f'filelist:{folder}/x.npy')


def test_names_of_any_bytes(folder):
    with open(os.fsencode(folder) + b'/caf\xe9.jpg', 'wb') as file:  # noqa: PTH123
        file.write(b'latin')
    _, _, source = opened(folder, b'caf\xe9.jpg 3\n')
    assert source.read(0) == b'latin' and source.digest()


def test_a_digest_does_not_know_where_the_list_lies(folder, tmp_path):
    _, _, here = opened(folder, 'a.jpg\nb.jpg')
    (tmp_path / 'a.jpg').write_bytes(b'')
    _, _, there = opened(tmp_path, 'a.jpg\nb.jpg')
    assert here.digest() == there.digest() != here.take([1, 0]).digest()


def test_long_lists_are_not_read_in_quadratic_time(folder):
    """It would take hours."""
    lines = '\n'.join(f'train/n{i % 1000:04d}/{i}.JPEG\t{i % 1000}' for i in range(100_000))
    _, ids, _ = opened(folder, f'a.jpg\t0\n{lines}')
    assert len(ids) == 100_001
