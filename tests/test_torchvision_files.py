"""CIFAR10, STL10, SVHN and MNIST files, read as torchvision reads them."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision
from refusals import refusal

from swav_jax.data import sources


def write_cifar(root, label_type=list):
    folder = root / 'cifar-10-batches-py'
    folder.mkdir()
    rng = np.random.default_rng(0)
    everything = {}
    for name in [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']:
        data, labels = rng.integers(0, 256, (4, 3072), np.uint8), label_type(rng.integers(0, 10, 4))
        with (folder / name).open('wb') as file:
            pickle.dump({'data': data, 'labels': labels, 'batch_label': 'x'}, file, protocol=2)
        everything[name] = data, labels
    names = {'label_names': [f'class{i}' for i in range(10)], 'num_vis': 3072}
    with (folder / 'batches.meta').open('wb') as file:
        pickle.dump(names, file, protocol=2)
    return everything


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
    write_cifar(tmp_path, lambda x: x.tolist())
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
    write_cifar(tmp_path, lambda x: x.tolist())
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
