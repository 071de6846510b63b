"""What is data in a folder and what is not, and that what is left out is said."""

import os
import socket

import numpy as np
import pytest
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from refusals import another_user, refusal

from swav_jax.data import folders, listing, sources
from swav_jax.errors import UserError


def make(root, *names):
    """Files with these names: small PNGs if named as images."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if folders.is_image(name):
            Image.new('RGB', (3, 2)).save(path, 'PNG')
        else:
            path.write_text('text')
    return root


def opened(root, **kwargs):
    return sources.open_source(f'folder:{root}', channels=3, **kwargs)


def names(source):
    return [path.removeprefix(source.root) for path in source.paths]


HIDDEN = [
    '.ipynb_checkpoints', '.git', '.Trash-1000', '.thumbnails', '.@__thumb', '@eaDir', '#recycle',
    '@Recycle', '__MACOSX', 'lost+found', '$RECYCLE.BIN', 'System Volume Information', '@eadir',
]  # fmt: skip


@pytest.mark.parametrize('depth', ['', 'cat/', 'cat/deep/er/'])
def test_hidden_folders_are_no_classes_at_any_depth(tmp_path, depth):
    make(tmp_path, 'cat/1.png', 'cat/deep/er/2.png', 'dog/1.png')
    make(tmp_path, *(f'{depth}{name}/x.png' for name in HIDDEN))
    source = opened(tmp_path)
    assert names(source) == ['cat/1.png', 'cat/deep/er/2.png', 'dog/1.png']
    assert source.class_names == ['cat', 'dog']
    (note,) = source.notes
    assert f'{len(HIDDEN)}: {depth}#recycle' in note and 'torchvision' in note and 'more' in note
    if not depth:
        assert '.git' in torchvision.datasets.ImageFolder(str(tmp_path)).classes


def test_hidden_files_are_no_images(tmp_path):
    make(tmp_path, 'a/1.jpg', 'a/._1.jpg', 'a/.x.png', 'b/.hidden.gif', 'b/2.png')
    source = opened(tmp_path)
    assert names(source) == ['a/1.jpg', 'b/2.png']
    assert (
        'left out hidden files' in source.notes[0] and '3: a/._1.jpg, a/.x.png' in source.notes[0]
    )


def test_a_hidden_root_is_the_users_choice(tmp_path):
    assert len(opened(make(tmp_path / '.cache' / '@eaDir', '1.png', '2.png'))) == 2


def test_a_class_without_images_keeps_its_number_and_is_said(tmp_path):
    make(tmp_path, 'b/1.png', 'a/notes.txt', 'c/1.avif')
    source = opened(tmp_path)
    assert source.class_names == ['a', 'b', 'c'] and source.labels.tolist() == [1]
    assert 'without an image' in source.notes[0] and '2: a, c' in source.notes[0]
    assert 'not read' in source.notes[1] and 'c/1.avif' in source.notes[1]


def test_endings_of_images(tmp_path):
    good = ['a.JPG', 'b.jfif', 'c.Jpe', 'd.pbm', 'e.tiff', 'f.WebP']
    make(tmp_path, *good, 'g.HEIC', 'h.jp2', 'i.txt', 'j.jpg.part', 'k')
    source = opened(tmp_path)
    assert names(source) == good
    assert len(source.notes) == 1 and '2: g.HEIC, h.jp2' in source.notes[0]


RUN = ('lock', 'config.json', 'metrics.jsonl', 'summary.json', 'loss.png', 'checkpoints/map.png')


@pytest.mark.parametrize('images', [('1.png', '2.png'), ('cat/1.png', 'dog/2.png')])
@pytest.mark.parametrize('workdir', ['run', 'runs/first', 'runs/deep/er', 'cat/run'])
def test_a_runs_pictures_never_become_its_data(tmp_path, images, workdir):
    make(tmp_path, *images)
    (tmp_path / workdir).mkdir(parents=True)
    first = opened(tmp_path, cache_dir=str(tmp_path / workdir))
    make(tmp_path / workdir, *RUN, 'report/1.png')
    make(tmp_path / 'runs' / 'other', *RUN)
    for cache_dir in (None, str(tmp_path / workdir), str(tmp_path / 'runs' / 'other')):
        again = opened(tmp_path, cache_dir=cache_dir)
        assert names(again) == names(first) == list(images)
        assert again.digest(labels=True) == first.digest(labels=True)
        assert again.class_names == first.class_names
        assert any('folders of runs' in note and workdir in note for note in again.notes)


def test_a_link_to_a_run_is_the_run(tmp_path):
    make(tmp_path / 'data', 'a/1.png', 'b/1.png')
    make(tmp_path / 'run', 'loss.png')
    (tmp_path / 'data' / 'latest').symlink_to(tmp_path / 'run')
    source = opened(tmp_path / 'data', cache_dir=str(tmp_path / 'run'))
    assert source.class_names == ['a', 'b']


@pytest.mark.parametrize('cache', [True, False])
def test_a_runs_folder_itself_is_refused_as_data(tmp_path, cache):
    make(tmp_path, '1.png', *RUN)
    text = refusal(f'folder:{tmp_path}', cache_dir=str(tmp_path) if cache else None)
    assert 'folder of a run' in text and '--workdir' in text


def test_data_may_lie_inside_of_the_runs_folder_and_look_a_little_like_a_run(tmp_path):
    make(tmp_path, *RUN, 'images/lock/1.png', 'images/checkpoints/1.png', 'images/config.json')
    source = opened(tmp_path / 'images', cache_dir=str(tmp_path))
    assert source.class_names == ['checkpoints', 'lock'] and not source.notes


def test_a_preview_is_no_data(tmp_path):
    make(tmp_path, '1.png', 'sub/preview.png')  # the second is somebody's own
    Figure((1, 1)).savefig(tmp_path / 'preview.png', dpi=9)  # as the command does
    source = opened(tmp_path)
    assert names(source) == ['1.png', 'sub/preview.png']
    assert any('preview drew' in note for note in source.notes)


def test_images_beside_one_folder_of_images_are_all_taken(tmp_path):
    make(tmp_path, '1.png', '2.png', 'raw/3.png', 'raw/x/4.png', 'texts/a.txt')
    source = opened(tmp_path)
    assert names(source) == ['1.png', '2.png', 'raw/3.png', 'raw/x/4.png']
    assert source.labels is None and source.class_names is None
    assert '2 images lie in the folder itself and 2 in the only' in source.notes[0]


def test_images_beside_class_folders_are_left_out_and_said(tmp_path):
    make(tmp_path, *(f'{i}.png' for i in range(7)), 'a/1.png', 'b/1.png')
    source = opened(tmp_path)
    assert names(source) == ['a/1.png', 'b/1.png'] and source.labels.tolist() == [0, 1]
    assert 'left out images beside the class folders' in source.notes[0]
    assert '7: 0.png, 1.png, 2.png and 4 more' in source.notes[0]


def test_what_is_no_file_is_left_out_and_never_opened(tmp_path, monkeypatch):
    make(tmp_path, 'a/1.png', 'b/1.png')
    os.mkfifo(tmp_path / 'a' / 'pipe.png')
    (tmp_path / 'a' / 'broken.png').symlink_to(tmp_path / 'gone')
    (tmp_path / 'a' / 'circle.png').symlink_to(tmp_path / 'a' / 'circle.png')
    (tmp_path / 'a' / 'zero.jpg').symlink_to('/dev/zero')
    (tmp_path / 'a' / 'folder.jpg').mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        server.bind('b/socket.png')
        source = opened(tmp_path)
    assert names(source) == ['a/1.png', 'b/1.png'] and len(source.notes) == 1
    assert '5: a/broken.png, a/circle.png, a/pipe.png and 2 more' in source.notes[0]
    # What became a pipe later is not read, either.
    (tmp_path / 'a' / '1.png').unlink()
    os.mkfifo(tmp_path / 'a' / '1.png')
    with pytest.raises(OSError, match='pipe'):
        source.read(0)


@pytest.mark.parametrize('denied', ['', 'b', 'a/deep'])
def test_a_folder_that_may_not_be_read_is_named(tmp_path, denied):
    make(tmp_path / 'data', 'a/1.png', 'a/deep/2.png', 'b/1.png')
    path = tmp_path / 'data' / denied
    path.chmod(0)
    with another_user(tmp_path):
        text = refusal(f'folder:{tmp_path / "data"}')
    assert f'{path} cannot be listed (Permission denied)' in text


@pytest.mark.parametrize(
    ('path', 'said'),
    [
        ('/no/such/folder', 'there is no folder /no/such/folder'),
        ('/dev/null', 'there is no folder /dev/null'),
        ('/' + 'x' * 5000, 'File name too long'),
        ('~nosuchuser/x', 'is not a path'),
        ('/a\0b', 'is not a path'),
        ('/a\x1b[31m\nb', r'\x1b[31m\n'),
    ],
)
def test_paths_that_cannot_be(path, said):
    with pytest.raises(UserError) as caught:
        opened(path)
    assert said in str(caught.value) and str(caught.value).isprintable()


def test_an_error_says_what_else_is_there(tmp_path):
    make(tmp_path, 'a.txt', 'b/c.dat', '.git/x.png', 'd.heic')
    text = refusal(f'folder:{tmp_path}')
    assert 'other files: a.txt, b/c.dat;' in text and '.git' in text and 'd.heic' in text


def test_hostile_names_are_said_and_found(tmp_path):
    (tmp_path / 'a').mkdir()
    for name in (b'\xff.png', b'x\x1b[2J\n.png', '\u202egnp.exe.png'.encode()):
        Image.new('L', (2, 2)).save(os.fsencode(tmp_path / 'a') + b'/' + name, 'PNG')
    make(tmp_path, '\x1b[31mempty/x.txt')
    source = opened(tmp_path)
    assert len(source) == 3 and all(source.read(i) for i in range(3))
    assert all(note.isprintable() for note in source.notes) and '[31mempty' in source.notes[0]
    assert len(source.digest(labels=True)) == 16


def test_digests_are_those_of_the_same_tree_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, 'SETTLED_S', -60)
    tree = ('a/1.png', 'a/2.png', 'b/1.png')
    here, there = make(tmp_path / 'here', *tree), make(tmp_path / 'th' / 'ere', *tree)
    cache = str(tmp_path / 'run')
    digests = {opened(root, cache_dir=cache).digest(labels=True) for root in (here, here, there)}
    assert len(digests) == 1
    for change in (
        lambda: (here / 'a' / '2.png').rename(here / 'a' / '3.png'),
        lambda: (here / 'a' / '3.png').rename(here / 'b' / '3.png'),
        lambda: (here / 'b' / '3.png').unlink(),
        lambda: (here / 'b').rename(here / 'c'),
    ):
        change()
        digests.add(opened(here, cache_dir=cache).digest(labels=True))
    assert len(digests) == 5


def test_a_digest_of_many_names_is_not_quadratic():
    """It would take hours."""
    source = folders.FileSource([f'/d/{i // 1000}/{i}.jpg' for i in range(400_000)], root='/d/')
    assert source.digest() != source.take([0]).digest()


def test_a_listing_of_a_folder_that_just_changed_is_not_kept(tmp_path):
    # A change within the same tick of the clock would leave no trace.
    root = make(tmp_path / 'data', 'a/1.png')
    cache = str(tmp_path / 'run')
    assert len(opened(root, cache_dir=cache)) == 1
    times = [(root / 'a').stat().st_atime_ns, (root / 'a').stat().st_mtime_ns]
    make(root, 'a/2.png')
    os.utime(root / 'a', ns=tuple(times))
    assert len(opened(root, cache_dir=cache)) == 2


def test_a_listing_is_of_this_folder_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, 'SETTLED_S', -60)
    root, cache = tmp_path / 'data', str(tmp_path / 'run')
    make(tmp_path / 'one', 'a/1.png')
    make(tmp_path / 'two', 'b/1.png')
    root.symlink_to(tmp_path / 'one')
    assert names(opened(root, cache_dir=cache)) == ['a/1.png']
    for other in ('one', 'two'):
        os.utime(tmp_path / other, ns=(0, 0))
    root.unlink()
    root.symlink_to(tmp_path / 'two')
    assert names(opened(root, cache_dir=cache)) == ['b/1.png']


@pytest.mark.parametrize(
    'change',
    [
        lambda x: x | {'files': ['../../etc/x.png', 'b/1.png']},
        lambda x: x | {'files': ['/etc/x.png', 'b/1.png']},
        lambda x: x | {'files': [3, 'b/1.png']},
        lambda x: x | {'files': 'ab'},
        lambda x: x | {'files': ['a\0.png', 'b/1.png']},
        lambda x: x | {'files': ['\ud800.png', 'b/1.png']},
        lambda x: x | {'classes': {'a': 1}},
        lambda x: x | {'classes': {'a': -1, 'b': 3}},
        lambda x: x | {'classes': {'a': 1, 'b': '1'}},
        lambda x: x | {'classes': ['a', 'b']},
        lambda x: x | {'notes': [5]},
        lambda x: {},
        lambda x: [],
        lambda x: None,
    ],
)
def test_a_kept_listing_that_was_changed_is_made_again(tmp_path, monkeypatch, change):
    monkeypatch.setattr(listing, 'SETTLED_S', -60)
    root, cache = make(tmp_path / 'data', 'a/1.png', 'b/1.png'), tmp_path / 'run'
    opened(root, cache_dir=str(cache))
    (file,) = cache.iterdir()
    saved = listing.json.loads(file.read_text())
    file.write_text(listing.json.dumps(saved | {'listing': change(saved['listing'])}))
    assert names(opened(root, cache_dir=str(cache))) == ['a/1.png', 'b/1.png']
    assert listing.json.loads(file.read_text()) == saved


@pytest.mark.parametrize('content', [b'', b'\xff', b'[' * 10**5, b'{}', b'null', b'{"key": 1}'])
def test_a_kept_listing_that_is_damaged_is_made_again(tmp_path, content):
    root, cache = make(tmp_path / 'data', 'a/1.png', 'b/1.png'), tmp_path / 'run'
    opened(root, cache_dir=str(cache))
    (file,) = cache.iterdir()
    file.write_bytes(content)
    np.testing.assert_array_equal(opened(root, cache_dir=str(cache)).labels, [0, 1])
