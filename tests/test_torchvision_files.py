"""CIFAR10, STL10, SVHN and MNIST files, read as torchvision reads them."""

import gzip
import os
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision
from refusals import refusal

from swav_jax.data import matlab, sources


def write_cifar(root, label_type=np.ndarray.tolist):
    folder = root / 'cifar-10-batches-py'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']:
        data, labels = rng.integers(0, 256, (4, 3072), np.uint8), label_type(rng.integers(0, 10, 4))
        with (folder / name).open('wb') as file:
            pickle.dump({'data': data, 'labels': labels, 'batch_label': 'x'}, file, protocol=2)
    names = {'label_names': [f'class{i}' for i in range(10)], 'num_vis': 3072}
    with (folder / 'batches.meta').open('wb') as file:
        pickle.dump(names, file, protocol=2)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_idx(path, array, zipped):
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, '>i4').tobytes()
    data = header + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if zipped:
        path.with_name(path.name + '.gz').write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


def test_cifar10_is_torchvisions(tmp_path, monkeypatch):
    write_cifar(tmp_path)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, '_check_integrity', lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, 'check_integrity', lambda *_: True)
    for split in ('train', 'test'):
        theirs = torchvision.datasets.CIFAR10(str(tmp_path), train=split == 'train')
        ours = sources.open_source(f'torchvision:CIFAR10:{tmp_path}:{split}', channels=3)
        np.testing.assert_array_equal(ours.images, theirs.data)
        assert ours.labels.tolist() == theirs.targets and ours.class_names == theirs.classes


def test_cifar10_as_python_2_wrote_it(tmp_path):
    # Protocol 2, in which an array's bytes are a string, and dtype's flags are integers.
    folder = tmp_path / 'cifar-10-batches-py'
    folder.mkdir()
    data = bytes(range(256)) * 12
    text = (
        b'\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b'
        b'\x87R(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff'
        b'\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00' + data + b'tbU\x06labels]K\x07au.'
    )
    for name in [f'data_batch_{i}' for i in range(1, 6)]:
        (folder / name).write_bytes(text)
    (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': list('0123456789')}, 2))
    ours = sources.open_source(f'torchvision:CIFAR10:{tmp_path}', channels=3)
    expected = np.frombuffer(data, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(ours.images, [expected] * 5)
    assert ours.labels.tolist() == [7] * 5


def test_cifar10_pickles_cannot_run_code(tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / 'cifar-10-batches-py' / 'data_batch_3'
    path.write_bytes(pickle.dumps({'data': Evil(tmp_path / 'ran'), 'labels': []}, 2))
    text = refusal(f'torchvision:CIFAR10:{tmp_path}')
    assert 'damaged' in text and 'getattr' in text
    assert not (tmp_path / 'ran').exists()


def test_stl10_is_torchvisions(tmp_path, monkeypatch):
    folder = tmp_path / 'stl10_binary'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split in ('train', 'test', 'unlabeled'):
        rng.integers(0, 256, 3 * 3 * 96 * 96, np.uint8).tofile(folder / f'{split}_X.bin')
        rng.integers(1, 11, 3).astype(np.uint8).tofile(folder / f'{split}_y.bin')
    (folder / 'class_names.txt').write_text('\n'.join('abcdefghij'))
    monkeypatch.setattr(torchvision.datasets.STL10, '_check_integrity', lambda self: True)
    for split in ('train', 'test', 'unlabeled'):
        theirs = torchvision.datasets.STL10(str(tmp_path), split=split)
        ours = sources.open_source(f'torchvision:STL10:{tmp_path}:{split}', channels=3)
        np.testing.assert_array_equal(ours.images, theirs.data.transpose(0, 2, 3, 1))
        if split == 'unlabeled':
            assert ours.labels is None
        else:
            assert ours.labels.tolist() == theirs.labels.tolist()


def test_svhn_is_torchvisions(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    content = {
        'X': rng.integers(0, 256, (32, 32, 3, 12), np.uint8),
        'y': np.arange(1, 13, dtype=np.uint8)[:, None] % 10 + 1,
    }
    scipy.io.savemat(tmp_path / 'train_32x32.mat', content)
    monkeypatch.setattr(torchvision.datasets.SVHN, '_check_integrity', lambda self: True)
    theirs = torchvision.datasets.SVHN(str(tmp_path), split='train')
    ours = sources.open_source(f'torchvision:SVHN:{tmp_path}', channels=3)
    np.testing.assert_array_equal(ours.images, theirs.data.transpose(0, 2, 3, 1))
    assert ours.labels.tolist() == theirs.labels.tolist() and 0 in ours.labels


@pytest.mark.parametrize('name', ['MNIST', 'FashionMNIST'])
@pytest.mark.parametrize('zipped', [False, True])
def test_mnist_is_torchvisions(tmp_path, name, zipped):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 28, 28), np.uint8), np.arange(5, dtype=np.uint8)
    raw = tmp_path / name / 'raw'
    for prefix in ('train', 't10k'):
        write_idx(raw / f'{prefix}-images-idx3-ubyte', images, zipped)
        write_idx(raw / f'{prefix}-labels-idx1-ubyte', labels, zipped)
    ours = sources.open_source(f'torchvision:{name}:{tmp_path}:test', channels=1)
    np.testing.assert_array_equal(ours.images[..., 0], images)
    assert ours.labels.tolist() == labels.tolist()
    if not zipped:
        theirs = getattr(torchvision.datasets, name)(str(tmp_path), train=False)
        np.testing.assert_array_equal(ours.images[..., 0], theirs.data.numpy())
        assert len(ours.class_names) == len(theirs.classes)


def test_torchvision_mistakes(tmp_path):
    assert 'CIFAR10' in refusal(f'torchvision:ImageNet:{tmp_path}')
    assert '/no/such/folder' in refusal('torchvision:CIFAR10:/no/such/folder')
    assert 'download' in refusal(f'torchvision:CIFAR10:{tmp_path}')
    assert 'download' in refusal(f'torchvision:MNIST:{tmp_path}')
    write_idx(tmp_path / 'train-images-idx3-ubyte', np.zeros((3, 28, 28), np.uint8), False)
    write_idx(tmp_path / 'train-labels-idx1-ubyte', np.zeros((2, 2), np.uint8), False)
    text = refusal(f'torchvision:MNIST:{tmp_path}')
    assert 'damaged' in text and 'dimensions' in text
    (tmp_path / 'train_32x32.mat').write_bytes(b'not matlab' * 100)
    assert 'damaged' in refusal(f'torchvision:SVHN:{tmp_path}')


def evil_array(shape, dtype, data, order=b'|'):
    """A pickle of {'data': an array that is said to be so, 'labels': [7]}."""

    def text(x):
        return b'X' + len(x).to_bytes(4, 'little') + x

    def number(x):
        return b'K' + bytes([x]) if x < 256 else b'\x8a\x09' + x.to_bytes(9, 'little')

    return (
        b'\x80\x02}(' + text(b'data') + b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n'
        b'K\0\x85U\1b\x87R(K\1(' + b''.join(map(number, shape)) + b'tcnumpy\ndtype\n' + text(dtype)
        + b'K\0K\1\x87R(K\3' + text(order) + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89'
        + data + b'tb' + text(b'labels') + b']K\7au.'
    )  # fmt: skip


def data_bytes(data):
    return b'T' + len(data).to_bytes(4, 'little') + data


ROW = bytes(range(256)) * 12


@pytest.mark.parametrize(
    'content',
    [
        pytest.param(evil_array((1, 3072), b'O8', data_bytes(b'A' * 8 * 3072)), id='objects'),
        pytest.param(evil_array((1, 3072), b'O', b']'), id='object list'),
        pytest.param(evil_array((1, 3072), b'f4', data_bytes(ROW * 4)), id='floats'),
        pytest.param(evil_array((1, 3072), b'u2', data_bytes(ROW * 2)), id='two bytes'),
        pytest.param(evil_array((1, 3072), b'M8[s]', data_bytes(ROW * 8)), id='dates'),
        pytest.param(evil_array((1, 3072), b'V1', data_bytes(ROW)), id='void'),
        pytest.param(evil_array((2**60, 3072), b'u1', data_bytes(ROW)), id='huge'),
        pytest.param(evil_array((2, 3072), b'u1', data_bytes(ROW)), id='too few'),
        pytest.param(evil_array((1, 3072), b'u1', b'N'), id='no bytes'),
        pytest.param(evil_array((3072,), b'u1', data_bytes(ROW)), id='flat'),
        pytest.param(evil_array((1, 3072), b'u1', data_bytes(ROW), b'?'), id='byte order'),
        pytest.param(evil_array((1, 3072), b'u1', data_bytes(ROW))[:-2000], id='cut short'),
        pytest.param(b'\x80\x02Nr\xff\xff\xff\xff.', id='memo of 64 GB'),
        pytest.param(b'\x80\x04\x8e' + b'\xff' * 7 + b'\x7f.', id='bytes beyond memory'),
        pytest.param(b'\x80\x02cnumpy\nndarray\n(tR.', id='ndarray is called'),
        pytest.param(
            b'\x80\x02cnumpy.core.multiarray\n_reconstruct\n}b.', id='state of a function'
        ),
        pytest.param(b'\x80\x02cbuiltins\neval\nX\x03\0\0\x001+1\x85R.', id='eval'),
        pytest.param(b'\x80\x02cos\nsystem\nX\x05\0\0\0false\x85R.', id='system'),
        pytest.param(b'(lp0\ng0\na.', id='list in itself'),
        pytest.param(b'\x80\x02' + b'(' * 10**4 + b't' * 10**4 + b'.', id='deep'),
        pytest.param(b'', id='empty'),
        pytest.param(b'.', id='nothing'),
        pytest.param(b'\x80\x02N.', id='none'),
        pytest.param(pickle.dumps({'data': np.zeros((1, 3072), np.uint8)}, 2), id='no labels'),
        pytest.param(pickle.dumps({'labels': [1]}, 2), id='no data'),
        *(
            pytest.param(
                pickle.dumps({'data': np.zeros((1, 3072), np.uint8), 'labels': labels}, 2),
                id=f'labels {labels!r}',
            )
            for labels in (
                [],
                [1, 2],
                [10],
                [-1],
                [-2],
                ['1'],
                [1.0],
                [[1]],
                [True],
                [2**70],
                3,
                None,
            )
        ),
    ],
)
def test_hand_made_cifar10_is_damaged(tmp_path, content):
    write_cifar(tmp_path)
    (tmp_path / 'cifar-10-batches-py' / 'data_batch_4').write_bytes(content)
    assert 'damaged' in refusal(f'torchvision:CIFAR10:{tmp_path}')


def test_cifar10_that_pickle_wrote_by_hand_is_read(tmp_path):
    # The same bytes as those that are refused above, but for what is wrong there.
    write_cifar(tmp_path)
    for i in range(1, 6):
        path = tmp_path / 'cifar-10-batches-py' / f'data_batch_{i}'
        path.write_bytes(evil_array((1, 3072), b'u1', data_bytes(ROW)))
    ours = sources.open_source(f'torchvision:CIFAR10:{tmp_path}', channels=3)
    assert ours.labels.tolist() == [7] * 5 and ours.images[0, 0, :3, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize('names', [None, [], list('0123'), [1] * 10, 'abcdefghij', {}])
def test_hand_made_names_of_cifar10_are_damaged(tmp_path, names):
    write_cifar(tmp_path, lambda x: [9] * len(x))
    path = tmp_path / 'cifar-10-batches-py' / 'batches.meta'
    path.write_bytes(pickle.dumps({'label_names': names}, 2))
    assert 'damaged' in refusal(f'torchvision:CIFAR10:{tmp_path}')


def idx(shape, data, kind=8):
    return bytes((0, 0, kind, len(shape))) + np.array(shape, '>i4').tobytes() + data


IMAGES, LABELS = idx((2, 28, 28), bytes(1568)), idx((2,), b'\x01\x02')


@pytest.mark.parametrize('zipped', [False, True])
@pytest.mark.parametrize(
    ('images', 'labels'),
    [
        (idx((2, 28, 28), bytes(1567)), LABELS),
        (idx((2, 28, 28), bytes(1569)), LABELS),
        (idx((2**31 - 1, 28, 28), bytes(1568)), LABELS),
        (idx((-2, -28, 28), bytes(1568)), LABELS),
        (idx((0, 28, 28), b''), idx((0,), b'')),
        (idx((2, 0, 28), b''), LABELS),
        (idx((2, 28, 28), bytes(1568), 13), LABELS),
        (IMAGES[:9], LABELS),
        (b'', LABELS),
        (IMAGES, idx((3,), b'123')),
        (IMAGES, idx((2,), b'\x0a\x00')),
        (IMAGES, b'\0'),
    ],
)
def test_hand_made_mnist_is_damaged(tmp_path, zipped, images, labels):
    ending, pack = ('.gz', gzip.compress) if zipped else ('', bytes)
    (tmp_path / f'train-images-idx3-ubyte{ending}').write_bytes(pack(images))
    (tmp_path / f'train-labels-idx1-ubyte{ending}').write_bytes(pack(labels))
    assert 'damaged' in refusal(f'torchvision:MNIST:{tmp_path}')


def test_zipped_bombs_and_rests_are_damaged(tmp_path):
    (tmp_path / 'train-labels-idx1-ubyte').write_bytes(LABELS)
    path = tmp_path / 'train-images-idx3-ubyte.gz'
    packed = gzip.compress(IMAGES)
    for content in (
        gzip.compress(IMAGES + bytes(2**25)),
        packed[:-9], packed[:40], b'\x1f\x8b', b'', packed[:10] + bytes(50), b'no gzip at all',
    ):  # fmt: skip
        path.write_bytes(content)
        assert 'damaged' in refusal(f'torchvision:MNIST:{tmp_path}')


@pytest.mark.parametrize('y', [np.full(3, 11), np.full(2, 1), np.full(3, -1), np.full(3, 1.5)])
def test_hand_made_labels_of_svhn_are_damaged(tmp_path, y):
    content = {'X': np.zeros((32, 32, 3, 3), np.uint8), 'y': y}
    scipy.io.savemat(tmp_path / 'train_32x32.mat', content)
    assert 'damaged' in refusal(f'torchvision:SVHN:{tmp_path}')


@pytest.mark.parametrize(
    ('content', 'lacks'),
    [({'Z': 1}, 'X'), ({'X': np.ones((2, 2))}, 'y'), ({'y': 1}, 'X'), ({'X': 'text', 'y': 1}, 'X')],
)
def test_what_svhn_lacks_is_named(tmp_path, content, lacks):
    scipy.io.savemat(tmp_path / 'train_32x32.mat', content)
    said = f'damaged (train_32x32.mat has no array {lacks} of numbers)'
    assert said in refusal(f'torchvision:SVHN:{tmp_path}')


@pytest.mark.parametrize(
    'x',
    [
        np.zeros((32, 32, 3, 2)), np.zeros((32, 32, 2), np.uint8),
        np.zeros((2, 32, 32, 3), np.uint8),
        np.zeros((32, 32, 3, 2), np.uint8) + 1j, {'a': 1}, 'text', np.array([1, 'a'], object),
    ],
)  # fmt: skip
def test_hand_made_images_of_svhn_are_damaged(tmp_path, x):
    scipy.io.savemat(tmp_path / 'train_32x32.mat', {'X': x, 'y': np.ones((2, 1))})
    assert 'damaged' in refusal(f'torchvision:SVHN:{tmp_path}')


@pytest.mark.parametrize('packed', [False, True])
def test_matlab_files_are_scipys(tmp_path, packed):
    rng = np.random.default_rng(0)
    arrays = {
        'X': rng.integers(0, 256, (4, 3, 2, 5), np.uint8),
        'y': np.arange(5.0)[:, None],
        'z': np.array([[-3, 2**40]]),
        'f': np.float32([[1.5, -2]]),
        'e': np.zeros((0, 3)),
        'a_rather_long_name': np.array([[7]], np.int8),
    }
    others = {'text': 'abc', 'cell': np.array([1, 'a'], object), 'complex': np.array([1j])}
    scipy.io.savemat(tmp_path / 'x.mat', arrays | others, do_compression=packed)
    ours = matlab.load_arrays((tmp_path / 'x.mat').read_bytes(), 2**20)
    assert ours.keys() == arrays.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)


def test_matlab_files_that_are_damaged(tmp_path):
    content = {'X': np.zeros((32, 32, 3, 2), np.uint8), 'y': np.ones((2, 1))}
    path = tmp_path / 'train_32x32.mat'
    rng = np.random.default_rng(0)
    for packed in (False, True):
        scipy.io.savemat(path, content, do_compression=packed)
        whole = path.read_bytes()
        for cut in (0, 100, 127, 128, 130, 140, 200, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            assert 'damaged' in refusal(f'torchvision:SVHN:{tmp_path}')
        for _ in range(60):  # the parts that say sizes and types are the first ones
            damaged = bytearray(whole)
            damaged[rng.integers(128, min(len(whole), 240))] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                sources.open_source(f'torchvision:SVHN:{tmp_path}', channels=3)
            except sources.UserError as error:
                assert 'damaged' in str(error)
    said = np.array([14, 2**31 + 8192], '<u4').tobytes()  # an array of 2 GiB
    for start in (b'', said, np.array([14, 1000], '<u4').tobytes()):
        bomb = zlib.compress(start + bytes(2**24))
        path.write_bytes(whole[:128] + np.array([15, len(bomb)], '<u4').tobytes() + bomb)
        assert 'damaged' in refusal(f'torchvision:SVHN:{tmp_path}')


@pytest.mark.parametrize('size', [1, 27648 - 1, 27648 + 1, 0])
def test_hand_made_stl10_is_damaged(tmp_path, size):
    folder = tmp_path / 'stl10_binary'
    folder.mkdir()
    (folder / 'train_X.bin').write_bytes(bytes(size))
    (folder / 'train_y.bin').write_bytes(b'\1' * (size // 27648))
    (folder / 'class_names.txt').write_text('a b')
    assert 'damaged' in refusal(f'torchvision:STL10:{tmp_path}')
    (folder / 'train_X.bin').write_bytes(bytes(27648 * 2))
    for labels, names in ((b'\1', b'a b'), (b'\1\3', b'a b'), (b'\1\2', b'\xff'), (b'\1\2', b'')):
        (folder / 'train_y.bin').write_bytes(labels)
        (folder / 'class_names.txt').write_bytes(names)
        assert 'damaged' in refusal(f'torchvision:STL10:{tmp_path}')
    (folder / 'train_y.bin').write_bytes(b'\0\2')
    (folder / 'class_names.txt').write_bytes(b'a b')
    ours = sources.open_source(f'torchvision:STL10:{tmp_path}', channels=3)
    assert ours.labels.tolist() == [-1, 1]


@pytest.mark.parametrize(
    ('name', 'file'),
    [
        ('CIFAR10', 'cifar-10-batches-py/data_batch_1'),
        ('STL10', 'stl10_binary/train_X.bin'),
        ('SVHN', 'train_32x32.mat'),
        ('MNIST', 'train-images-idx3-ubyte'),
    ],
)
@pytest.mark.parametrize('kind', ['pipe', 'zero', 'folder', 'circle'])
def test_what_is_no_file_is_not_opened(tmp_path, name, file, kind):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    match kind:
        case 'pipe':
            os.mkfifo(path)
        case 'zero':
            path.symlink_to('/dev/zero')
        case 'folder':
            path.mkdir()
        case 'circle':
            path.symlink_to(path)
    text = refusal(f'torchvision:{name}:{tmp_path}')
    assert f'{path} cannot be read' in text
