"""Labels, digests and names of sources, whatever holds their images."""

import numpy as np
import pytest

from swav_jax.data.images import ArraySource, FileSource, RangeSource
from swav_jax.errors import printable


def labelled(labels, class_names=None):
    return FileSource([f'/{i}.png' for i in range(len(labels))], np.array(labels), class_names)


@pytest.mark.parametrize('ids', [[3, 7], [-5, 0], [2**40, 2**62], [-(2**63), 2**31]])
def test_ids_of_any_kind_are_numbered_and_come_back(ids):
    source = labelled([ids[1], ids[0], -1, ids[1]])
    assert source.labels.tolist() == [1, 0, -1, 1] and source.labels.dtype == np.int32
    assert source.class_names == [str(i) for i in ids]
    assert source.label_ids().tolist() == [ids[1], ids[0], -1, ids[1]]
    assert source.take([2, 3]).label_ids().tolist() == [-1, ids[1]]


def test_labels_that_are_all_unknown_are_none():
    assert labelled([-1, -1]).labels is None and labelled([-1], ['a']).class_names is None


def test_named_classes_keep_their_numbers_also_where_no_image_has_them():
    source = labelled([2, -1], ['a', 'b', 'c'])
    assert source.labels.tolist() == [2, -1] == source.label_ids().tolist()
    for wrong in (3, -2):
        with pytest.raises(ValueError, match=f'image 1 has the label {wrong}, but there are 3'):
            labelled([0, wrong], ['a', 'b', 'c'])


def test_a_digest_tells_other_images_and_if_asked_other_labels():
    same, other = labelled([0, 1], ['a', 'b']), labelled([1, 0], ['a', 'b'])
    renamed = labelled([0, 1], ['a', 'c'])
    assert same.digest() == other.digest() == renamed.digest()
    assert len({x.digest(labels=True) for x in (same, other, renamed)}) == 3
    assert same.digest() != same.take([1, 0]).digest() != same.take([0]).digest()
    pixels = np.zeros((2, 4, 4, 1), np.uint8)
    first = ArraySource('one', pixels).digest()
    pixels[1, 3, 3] = 1
    assert ArraySource('one', pixels).digest() != first
    odd = [FileSource([f'a{x}']).digest() for x in ('', '\udcff', '\ud800', '\udfff', '\0b')]
    assert len(set(odd)) == 5


@pytest.mark.parametrize(
    ('name', 'shown'),
    [
        ('Äpfel 猫.jpg', 'Äpfel 猫.jpg'),
        ('a\x1b[31mred\x07', r'a\x1b[31mred\x07'),
        ('two\nlines\r', r'two\nlines\r'),
        ('\u202egpj.exe', r'\u202egpj.exe'),
        ('\udcff.png', r'\xff.png'),
        ('\ud800\x1b.png', r'\ud800\x1b.png'),
    ],
)
def test_names_are_printable(name, shown):
    assert printable(name) == shown


def test_contents_of_files_that_have_the_same_names_can_count(tmp_path):
    """As where the class folders of a data set were renamed in a circle."""
    paths = [tmp_path / f'{i}.png' for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes(1000) + bytes([i]) + bytes(1000))
    source = FileSource([str(path) for path in paths] + [str(tmp_path / 'missing')])
    before = source.digest(), source.digest(contents=True)
    assert source.digest(contents=True) == before[1]
    paths[0].rename(tmp_path / 'x')
    paths[1].rename(paths[0])
    (tmp_path / 'x').rename(paths[1])
    assert source.digest() == before[0] and source.digest(contents=True) != before[1]
    shard = tmp_path / 'shard'
    shard.write_bytes(b'ab')
    ranges = np.array([[0, 0, 1], [0, 1, 1]])
    first = RangeSource([str(shard)], ranges, ['a', 'b']).digest(contents=True)
    shard.write_bytes(b'ba')
    assert RangeSource([str(shard)], ranges, ['a', 'b']).digest(contents=True) != first
