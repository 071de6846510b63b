"""Every kind of source, against torchvision and files written here; and what users mistype."""

import gzip
import io
import json
import pickle
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision
from PIL import Image

from swav_jax.data import listing, sources
from swav_jax.errors import UserError


def write_image(path, value=0, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (value, value, value)).save(path)


def encoded(value, kind='JPEG'):
    buffer = io.BytesIO()
    Image.new('RGB', (8, 6), (value,) * 3).save(buffer, kind)
    return buffer.getvalue()


def fails(spec, *parts, **kwargs):
    """The spec is refused in one line that holds these parts and the setting with its value."""
    with pytest.raises(UserError) as caught:
        sources.open_source(spec, **{'channels': 3} | kwargs)
    text = str(caught.value)
    assert '\n' not in text and f'config.data.source={spec!r}' in text, text
    for part in parts:
        assert str(part) in text, text


def test_demo_is_the_published_fashion_mnist():
    train = sources.open_source('demo', channels=1)
    test = sources.open_source('demo:test', channels=1)
    assert (len(train), len(test)) == (10_000, 2_000)
    assert train.read(0).shape == (28, 28, 1) and train.read(0).dtype == np.uint8
    # The first ten labels of the published files.
    assert train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert test.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert train.class_names[9] == 'Ankle boot' and train.labels.dtype == np.int32
    assert train.name(3) == 'demo:train[3]'
    fails('demo:val', 'demo:test')


def test_limit_spreads_over_the_source_and_keeps_names():
    whole = sources.open_source('demo', channels=1)
    some = sources.open_source('demo', limit=100, channels=1)
    assert len(some) == 100 and some.name(7) == 'demo:train[700]'
    np.testing.assert_array_equal(some.read(7), whole.read(700))
    np.testing.assert_array_equal(some.labels, whole.labels[::100])
    assert len(sources.open_source('demo', limit=20_000, channels=1)) == 10_000
    again = some.take([5, 0])
    assert again.name(0) == 'demo:train[500]' and len(again) == 2


def image_folder(root):
    for name in ('b/2.png', 'b/10.jpg', 'a/x.JPEG', 'a/deep/y.PNG', 'a/deep/er/z.bmp', 'C/1.webp'):
        write_image(root / name)
    for name in ('a/notes.txt', 'stray.jpg'):
        (root / name).write_bytes(b'no image')
    return root


def test_folder_is_torchvisions_image_folder(tmp_path):
    root = image_folder(tmp_path)
    theirs = torchvision.datasets.ImageFolder(str(root))
    ours = sources.open_source(f'folder:{root}', channels=3)
    assert [(ours.name(i), ours.labels[i]) for i in range(len(ours))] == theirs.samples
    assert ours.class_names == theirs.classes
    assert ours.read(0) == Path(theirs.samples[0][0]).read_bytes()


def test_folder_follows_links_and_numbers_empty_classes(tmp_path):
    write_image(tmp_path / 'elsewhere' / '1.gif')
    root = tmp_path / 'root'
    (root / 'empty').mkdir(parents=True)
    (root / 'linked').symlink_to(tmp_path / 'elsewhere')
    ours = sources.open_source(f'folder:{root}', channels=3)
    assert ours.class_names == ['empty', 'linked'] and ours.labels.tolist() == [1]


def test_flat_folder_has_no_labels(tmp_path):
    for name in ('b.jpg', 'a.png', 'c.GIF'):
        write_image(tmp_path / name)
    (tmp_path / 'sub').mkdir()
    ours = sources.open_source(f'folder:{tmp_path}', channels=3)
    assert [Path(ours.name(i)).name for i in range(3)] == ['a.png', 'b.jpg', 'c.GIF']
    assert ours.labels is None and ours.class_names is None


def test_folder_mistakes(tmp_path):
    fails(f'folder:{tmp_path}/missing', 'no folder', tmp_path / 'missing')
    fails(f'folder:{tmp_path}', 'no images', '.jpeg')
    (tmp_path / 'file').write_text('')
    fails(f'folder:{tmp_path}/file', 'no folder')
    fails('imagenet', 'folder:/path')
    fails('', 'folder:/path')
    fails('demo', 'channels=4', channels=4)
    with pytest.raises(UserError, match=r'config\.evaluate\.test_source='):
        sources.open_source('nothing', channels=3, setting='config.evaluate.test_source')


def test_listing_is_kept_until_the_folder_changes(tmp_path, monkeypatch):
    root, cache = image_folder(tmp_path / 'data'), str(tmp_path / 'run')
    spec = f'folder:{root}'
    first = sources.open_source(spec, channels=3, cache_dir=cache)
    (file,) = Path(cache).iterdir()
    with monkeypatch.context() as patch:
        patch.setattr('os.walk', None)  # a second listing would fail
        second = sources.open_source(spec, channels=3, cache_dir=cache)
    assert second.paths == first.paths and second.class_names == first.class_names
    np.testing.assert_array_equal(second.labels, first.labels)
    write_image(root / 'a' / 'deep' / 'new.png')
    third = sources.open_source(spec, channels=3, cache_dir=cache)
    assert len(third) == len(first) + 1
    write_image(root / 'D' / 'new.png')
    assert len(sources.open_source(spec, channels=3, cache_dir=cache)) == len(first) + 2
    file.write_text('{"key": 3')  # as after a full disk
    assert len(sources.open_source(spec, channels=3, cache_dir=cache)) == len(first) + 2
    assert [path.name for path in Path(cache).iterdir()] == [file.name]


def test_listing_of_many_files_is_fast_the_second_time(tmp_path):
    names = [f'c/{i:09d}.jpg' for i in range(200_000)]
    (tmp_path / 'data').mkdir()
    cache = str(tmp_path / 'cache')
    listing.remembered('many', lambda: (names, [str(tmp_path / 'data')]), cache)
    start = time.perf_counter()
    assert listing.remembered('many', None, cache) == names
    assert time.perf_counter() - start < 2


def test_cache_that_cannot_be_written_says_so(tmp_path):
    image_folder(tmp_path / 'data')
    (tmp_path / 'file').write_text('')
    fails(f'folder:{tmp_path}/data', 'cannot be kept', cache_dir=str(tmp_path / 'file' / 'cache'))


def test_filelist_text(tmp_path):
    write_image(tmp_path / 'images' / 'a b.png', 7)
    (tmp_path / 'plain.txt').write_text('images/a b.png\n\n/gone/2 3.jpg\n')
    plain = sources.open_source(f'filelist:{tmp_path}/plain.txt', channels=3)
    assert [plain.name(0), plain.name(1)] == [str(tmp_path / 'images/a b.png'), '/gone/2 3.jpg']
    assert plain.labels is None
    (tmp_path / 'labelled.txt').write_text('images/a b.png 3\n/gone/2 3.jpg\t12\n')
    labelled = sources.open_source(f'filelist:{tmp_path}/labelled.txt', channels=3)
    assert labelled.paths == plain.paths and labelled.labels.tolist() == [3, 12]


def test_filelist_of_vissl_with_moved_images(tmp_path):
    np.save(tmp_path / 'train.npy', np.array(['/old/a.jpg', '/old/b.jpg', '/else/old/c.jpg']))
    np.save(tmp_path / 'labels.npy', np.array([5, 1, 2]))
    spec = (
        f'filelist:{tmp_path}/train.npy?labels={tmp_path}/labels.npy'
        '&remove_img_path_prefix=/old/&new_img_path_prefix=/new/'
    )
    ours = sources.open_source(spec, channels=3)
    assert ours.paths[:2] == ['/new/a.jpg', '/new/b.jpg'] and ours.labels.tolist() == [5, 1, 2]


def test_filelist_never_loads_objects(tmp_path):
    np.save(tmp_path / 'objects.npy', np.array(['a', None], object), allow_pickle=True)
    fails(f'filelist:{tmp_path}/objects.npy', 'Python objects')
    fails(f'filelist:{tmp_path}/missing.txt', 'No such file')
    (tmp_path / 'empty.txt').write_text('\n')
    fails(f'filelist:{tmp_path}/empty.txt', 'no images')
    (tmp_path / 'binary.txt').write_bytes(b'\xff\xfe\x00')
    fails(f'filelist:{tmp_path}/binary.txt', 'UTF-8')
    np.save(tmp_path / 'numbers.npy', np.arange(3))
    fails(f'filelist:{tmp_path}/numbers.npy', 'int64')
    (tmp_path / 'one.txt').write_text('a.jpg')
    fails(f'filelist:{tmp_path}/one.txt?labels={tmp_path}/numbers.npy', '1 images, but 3 labels')
    fails(f'filelist:{tmp_path}/one.txt?prefix=x', 'new_img_path_prefix')
    fails(f'filelist:{tmp_path}/one.txt?remove_img_path_prefix=/old', '/old')


def write_tar(path, members, **kwargs):
    with tarfile.open(path, 'w', **kwargs) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_webdataset(tmp_path):
    for shard in range(9, 11):
        members = []
        for i in range(3):
            members.append((f'x/{shard}_{i}.cls', b'%d\n' % i))
            members.append((f'x/{shard}_{i}.JPG', encoded(10 * shard + i)))
            members.append((f'x/{shard}_{i}.seg.png', encoded(0, 'PNG')))
        write_tar(tmp_path / f'{shard:02d}.tar', members)
    spec = f'webdataset:{tmp_path}/{{09..10}}.tar'
    ours = sources.open_source(spec, channels=3, cache_dir=str(tmp_path))
    assert len(ours) == 6 and ours.labels.tolist() == [0, 1, 2] * 2
    assert ours.read(4) == encoded(101)
    assert ours.name(4) == f'{tmp_path}/10.tar/x/10_1.JPG'
    again = sources.open_source(spec, channels=3, cache_dir=str(tmp_path)).take([4, 1])
    assert again.read(0) == encoded(101) and again.labels.tolist() == [1, 1]


def test_webdataset_member_names_are_never_paths(tmp_path):
    (tmp_path / 'secret.jpg').write_bytes(b'secret')
    with tarfile.open(tmp_path / '0.tar', 'w') as archive:
        for kind, name in ((tarfile.SYMTYPE, 'link.jpg'), (tarfile.LNKTYPE, 'hard.jpg')):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / 'secret.jpg')
            archive.addfile(info)
        info = tarfile.TarInfo('../secret.jpg')
        info.size = 4
        archive.addfile(info, io.BytesIO(b'mine'))
    ours = sources.open_source(f'webdataset:{tmp_path}/0.tar', channels=3)
    assert len(ours) == 1 and ours.read(0) == b'mine' and ours.labels is None


def test_webdataset_mistakes(tmp_path):
    fails(f'webdataset:{tmp_path}/{{0..1}}.tar', 'no shard', '0.tar')
    (tmp_path / 'text.tar').write_text('no tar' * 1000)
    fails(f'webdataset:{tmp_path}/text.tar', 'tar file')
    write_tar(tmp_path / 'whole.tar', [('a.jpg', encoded(1) * 50)])
    (tmp_path / 'cut.tar').write_bytes((tmp_path / 'whole.tar').read_bytes()[:4096])
    fails(f'webdataset:{tmp_path}/cut.tar', 'cut.tar')
    write_tar(tmp_path / 'none.tar', [('a.txt', b'')])
    fails(f'webdataset:{tmp_path}/none.tar', 'no images')


@pytest.fixture(scope='module')
def toy_tfds(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import tensorflow_datasets as tfds

        class SwavToy(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version('1.0.0')

            def _info(self):
                features = {
                    'label': tfds.features.ClassLabel(names=['cat', 'dog']),
                    'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, manager):
                return {'train': self._generate_examples(20), 'test': self._generate_examples(5)}

            def _generate_examples(self, count):
                for i in range(count):
                    yield i, {'image': np.full((6, 8, 3), i, np.uint8), 'label': i % 2}

        folder = tmp_path_factory.mktemp('tfds')
        SwavToy(data_dir=folder).download_and_prepare()
    return folder


@pytest.mark.filterwarnings('ignore')
def test_tfds(toy_tfds, tmp_path):
    spec = f'tfds:swav_toy?data_dir={toy_tfds}'
    ours = sources.open_source(spec, channels=3, cache_dir=str(tmp_path))
    pixels = [np.asarray(Image.open(io.BytesIO(ours.read(i))))[0, 0, 0] for i in range(len(ours))]
    assert sorted(pixels) == list(range(20)) and ours.class_names == ['cat', 'dog']
    np.testing.assert_array_equal(ours.labels, np.array(pixels) % 2)
    np.testing.assert_array_equal(ours.take([3, 1]).labels, ours.labels[[3, 1]])
    part = sources.open_source(f'tfds:swav_toy:1.0.0:train[50%:]?data_dir={toy_tfds}', channels=3)
    assert [part.read(i) for i in range(10)] == [ours.read(i) for i in range(10, 20)]
    test = sources.open_source(f'tfds:swav_toy:test?data_dir={toy_tfds}', channels=3)
    assert len(test) == 5


@pytest.mark.filterwarnings('ignore')
def test_tfds_mistakes(toy_tfds, tmp_path):
    fails(f'tfds:swav_toy:val?data_dir={toy_tfds}', 'val')
    fails(f'tfds:mnist?data_dir={tmp_path}', 'not prepared', 'tfds build mnist')
    fails(f'tfds:no_such_set?data_dir={tmp_path}', 'no_such_set')
    fails('tfds:mnist?folder=/x', 'data_dir')
    broken = tmp_path / 'swav_toy' / '1.0.0'
    broken.mkdir(parents=True)
    for file in (toy_tfds / 'swav_toy' / '1.0.0').iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-9] if 'train' in file.name else content)
    fails(f'tfds:swav_toy?data_dir={tmp_path}', '19 of its 20 examples')


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


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_cifar10_pickles_cannot_run_code(tmp_path):
    write_cifar(tmp_path, lambda x: x.tolist())
    path = tmp_path / 'cifar-10-batches-py' / 'data_batch_3'
    path.write_bytes(pickle.dumps({'data': Evil(tmp_path / 'ran'), 'labels': []}, 2))
    fails(f'torchvision:CIFAR10:{tmp_path}', 'damaged', 'getattr')
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


def write_idx(path, array, zipped):
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, '>i4').tobytes()
    data = header + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if zipped:
        path.with_name(path.name + '.gz').write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


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
    fails(f'torchvision:ImageNet:{tmp_path}', 'CIFAR10')
    fails('torchvision:CIFAR10:/no/such/folder', '/no/such/folder')
    fails(f'torchvision:CIFAR10:{tmp_path}', 'download')
    fails(f'torchvision:MNIST:{tmp_path}', 'download')
    write_idx(tmp_path / 'train-images-idx3-ubyte', np.zeros((3, 28, 28), np.uint8), False)
    write_idx(tmp_path / 'train-labels-idx1-ubyte', np.zeros((2, 2), np.uint8), False)
    fails(f'torchvision:MNIST:{tmp_path}', 'damaged', 'dimensions')
    (tmp_path / 'train_32x32.mat').write_bytes(b'not matlab' * 100)
    fails(f'torchvision:SVHN:{tmp_path}', 'damaged')


def test_synthetic():
    ours = sources.open_source('synthetic:30x20', channels=5)
    assert ours.images.shape == (30, 20, 20, 5) and ours.labels.tolist() == [*range(10)] * 3
    again = sources.open_source('synthetic:30x20', channels=5)
    np.testing.assert_array_equal(ours.images, again.images)
    images = ours.images.astype(float)
    # Images of a class look alike, those of different classes do not.
    assert np.abs(images[0] - images[10]).mean() < 60 < np.abs(images[0] - images[1]).mean()
    fails('synthetic:30', 'COUNTxSIDE')


def test_listing_files_hold_json(tmp_path):
    listing.remembered('k', lambda: ([1, 'x'], [__file__]), str(tmp_path / 'cache'))
    (file,) = (tmp_path / 'cache').iterdir()
    assert json.loads(file.read_text())['listing'] == [1, 'x']
