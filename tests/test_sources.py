"""The demo, folders, lists and generated images; and what users mistype."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from refusals import another_user, refusal

from swav_jax.data import listing, sources
from swav_jax.errors import UserError


def write_image(path, value=0, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (value, value, value)).save(path)


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
    assert 'demo:test' in refusal('demo:val')


def test_limit_spreads_over_the_source_and_keeps_names():
    whole = sources.open_source('demo', channels=1)
    some = sources.open_source('demo', limit=100, channels=1)
    assert len(some) == 100 and some.name(7) == 'demo:train[700]'
    np.testing.assert_array_equal(some.read(7), whole.read(700))
    np.testing.assert_array_equal(some.labels, whole.labels[::100])
    assert len(sources.open_source('demo', limit=20_000, channels=1)) == 10_000
    with pytest.raises(UserError, match='limit=-5 must be 0'):
        sources.open_source('demo', limit=-5, channels=1)
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


def test_folder_does_not_walk_in_circles(tmp_path):
    write_image(tmp_path / 'a' / 'b' / '1.png')
    (tmp_path / 'a' / 'b' / 'up').symlink_to(tmp_path / 'a')
    (tmp_path / 'a' / 'again').symlink_to(tmp_path / 'a' / 'b')
    ours = sources.open_source(f'folder:{tmp_path}', channels=3)
    names = [ours.name(i).removeprefix(f'{tmp_path}/a/') for i in range(len(ours))]
    assert names == ['again/1.png', 'b/1.png']


def test_flat_folder_has_no_labels(tmp_path):
    for name in ('b.jpg', 'a.png', 'c.GIF'):
        write_image(tmp_path / name)
    (tmp_path / 'sub').mkdir()
    ours = sources.open_source(f'folder:{tmp_path}', channels=3)
    assert [Path(ours.name(i)).name for i in range(3)] == ['a.png', 'b.jpg', 'c.GIF']
    assert ours.labels is None and ours.class_names is None


def test_folder_mistakes(tmp_path):
    text = refusal(f'folder:{tmp_path}/missing')
    assert 'no folder' in text and str(tmp_path / 'missing') in text
    text = refusal(f'folder:{tmp_path}')
    assert 'no images' in text and '.jpeg' in text
    (tmp_path / 'file').write_text('')
    assert 'no folder' in refusal(f'folder:{tmp_path}/file')
    assert 'folder:/path' in refusal('imagenet')
    assert 'after the colon' in refusal('folder:')
    assert 'after the colon' in refusal('filelist')
    assert 'folder:/path' in refusal('')
    assert 'channels=4' in refusal('demo', channels=4)
    for spec in ('folder:/a\0b', 'webdataset:/a\0', 'filelist:~nosuchuser/x',
                 'webdataset:~nosuchuser/x', 'torchvision:MNIST:/a\0',
                 'tfds:x?data_dir=~nosuchuser/x', 'x\x1b[31m\n:y',
                 *(f'{kind}:/{"x" * 300}/{"y" * 5000}' for kind in sources.KINDS)):  # fmt: skip
        assert refusal(spec).isprintable()
    with pytest.raises(UserError, match=r'config\.evaluate\.test_source='):
        sources.open_source('nothing', channels=3, setting='config.evaluate.test_source')


def test_listing_is_kept_until_the_folder_changes(tmp_path, monkeypatch):
    root, cache = image_folder(tmp_path / 'data'), str(tmp_path / 'run')
    spec = f'folder:{root}'
    monkeypatch.setattr(listing, 'SETTLED_S', -60)  # these folders are new
    first = sources.open_source(spec, channels=3, cache_dir=cache)
    (file,) = Path(cache).iterdir()
    with monkeypatch.context() as patch:
        patch.setattr('os.scandir', None)  # a second listing would fail
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


def test_listing_of_many_files_is_fast_the_second_time(tmp_path, monkeypatch):
    names = [f'c/{i:09d}.jpg' for i in range(200_000)]
    (tmp_path / 'data').mkdir()
    cache = str(tmp_path / 'cache')
    monkeypatch.setattr(listing, 'SETTLED_S', -60)
    stamps = {str(tmp_path / 'data'): listing.stamp(tmp_path / 'data')}
    listing.remembered('many', lambda: (names, stamps), cache)
    start = time.perf_counter()
    assert listing.remembered('many', None, cache) == names
    assert time.perf_counter() - start < 2


def test_cache_that_cannot_be_written_says_so(tmp_path):
    image_folder(tmp_path / 'data')
    (tmp_path / 'file').write_text('')
    assert 'cannot be kept' in refusal(
        f'folder:{tmp_path}/data', cache_dir=str(tmp_path / 'file' / 'cache')
    )


def test_filelist_text(tmp_path):
    write_image(tmp_path / 'images' / 'a b.png', 7)
    (tmp_path / 'plain.txt').write_text('images/a b.png\n\n/gone/2 3.jpg\n')
    plain = sources.open_source(f'filelist:{tmp_path}/plain.txt', channels=3)
    assert [plain.name(0), plain.name(1)] == [str(tmp_path / 'images/a b.png'), '/gone/2 3.jpg']
    assert plain.labels is None
    (tmp_path / 'labelled.txt').write_text('images/a b.png 3\n/gone/2 3.jpg\t12\n')
    labelled = sources.open_source(f'filelist:{tmp_path}/labelled.txt', channels=3)
    assert labelled.paths == plain.paths and labelled.label_ids().tolist() == [3, 12]


def test_filelist_of_vissl_with_moved_images(tmp_path):
    np.save(tmp_path / 'train.npy', np.array(['/old/a.jpg', '/old/b.jpg', '/else/old/c.jpg']))
    np.save(tmp_path / 'labels.npy', np.array([5, 1, 2]))
    spec = (
        f'filelist:{tmp_path}/train.npy?labels={tmp_path}/labels.npy'
        f'&remove_img_path_prefix=/old/&new_img_path_prefix={tmp_path}/new/'
    )
    assert f'the first would be {tmp_path}/new/a.jpg' in refusal(spec)
    write_image(tmp_path / 'new' / 'b.jpg')
    ours = sources.open_source(spec, channels=3)
    assert ours.paths[:2] == [
        f'{tmp_path}/new/a.jpg',
        f'{tmp_path}/new/b.jpg',
    ] and ours.label_ids().tolist() == [5, 1, 2]


def test_a_filelist_stays_below_its_folder(tmp_path):
    file = tmp_path / 'list.txt'
    spec = f'filelist:{file}'
    for line in ('../x.jpg', 'images/../../x.jpg', './../x.jpg 3'):
        file.write_text(f'a.jpg 1\n{line}\n')
        assert f'lies outside of {tmp_path}' in refusal(spec)
    file.write_text('/old//../../etc/x.jpg\n')
    assert 'lies outside of /new' in refusal(
        f'{spec}?remove_img_path_prefix=/old&new_img_path_prefix=/new'
    )
    write_image(tmp_path / '..a' / 'b.jpg')
    file.write_text('images/../a.jpg\n..a/b.jpg\n/somewhere/../else.jpg\n')
    assert len(sources.open_source(spec, channels=3)) == 3


def test_filelist_never_loads_objects(tmp_path):
    np.save(tmp_path / 'objects.npy', np.array(['a', None], object), allow_pickle=True)
    assert 'Python objects' in refusal(f'filelist:{tmp_path}/objects.npy')
    assert 'No such file' in refusal(f'filelist:{tmp_path}/missing.txt')
    (tmp_path / 'empty.txt').write_text('\n')
    assert 'no images' in refusal(f'filelist:{tmp_path}/empty.txt')
    (tmp_path / 'binary.txt').write_bytes(b'\xff\xfe\x00')
    assert 'UTF-8' in refusal(f'filelist:{tmp_path}/binary.txt')
    np.save(tmp_path / 'numbers.npy', np.arange(3))
    assert 'int64' in refusal(f'filelist:{tmp_path}/numbers.npy')
    (tmp_path / 'one.txt').write_text('a.jpg')
    assert '1 images, but 3 labels' in refusal(
        f'filelist:{tmp_path}/one.txt?labels={tmp_path}/numbers.npy'
    )
    assert 'new_img_path_prefix' in refusal(f'filelist:{tmp_path}/one.txt?prefix=x')
    assert '/old' in refusal(f'filelist:{tmp_path}/one.txt?remove_img_path_prefix=/old')


@pytest.mark.parametrize(
    ('spec', 'denied'),
    [
        ('filelist:{}/list.txt', 'list.txt'),
        ('filelist:{}/list.npy', 'list.npy'),
        ('webdataset:{}/0.tar', '0.tar'),
        ('webdataset:{}/sub/0.tar', 'sub'),
        ('tfds:toy?data_dir={}', 'toy'),
        ('torchvision:SVHN:{}', 'train_32x32.mat'),
        ('torchvision:MNIST:{}/sub', 'sub'),
    ],
)
def test_what_may_not_be_read_is_named(tmp_path, spec, denied):
    for name in ('sub', 'toy'):
        (tmp_path / name).mkdir()
    for name in ('list.txt', 'list.npy', '0.tar', 'train_32x32.mat', 'sub/0.tar'):
        (tmp_path / name).write_text('a.jpg')
    (tmp_path / denied).chmod(0)
    with another_user(tmp_path):
        text = refusal(spec.format(tmp_path))
    assert f'{tmp_path}/{denied}' in text and 'Permission denied' in text


def test_synthetic():
    ours = sources.open_source('synthetic:30x20', channels=5)
    assert ours.images.shape == (30, 20, 20, 5) and ours.labels.tolist() == [*range(10)] * 3
    again = sources.open_source('synthetic:30x20', channels=5)
    np.testing.assert_array_equal(ours.images, again.images)
    images = ours.images.astype(float)
    # Images of a class look alike, those of different classes do not.
    assert np.abs(images[0] - images[10]).mean() < 60 < np.abs(images[0] - images[1]).mean()
    for size in ('30', '0x9', '9x0', '-1x9', '9x', 'x', '1x1x1', '1.5x2', '9' * 5000 + 'x1', '٣x٣'):
        assert 'COUNTxSIDE' in refusal(f'synthetic:{size}')
    for size in ('10000000x10000', '9' * 18 + 'x' + '9' * 18, '1x1000000'):
        assert 'more than half of the memory' in refusal(f'synthetic:{size}')


def test_listing_files_hold_json(tmp_path):
    listing.remembered('k', lambda: ([1, 'x'], {}), str(tmp_path / 'cache'))
    (file,) = (tmp_path / 'cache').iterdir()
    assert json.loads(file.read_text())['listing'] == [1, 'x']
