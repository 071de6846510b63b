"""Tar shards with names, labels, links and damages of every kind."""

import bz2
import gzip
import io
import os
import tarfile

import numpy as np
import pytest
from pictures import encode
from PIL import Image
from refusals import refusal

from swav_jax.data import sources
from swav_jax.data.webdataset import expand_braces
from swav_jax.errors import UserError

LINK, HARD = {'type': tarfile.SYMTYPE}, {'type': tarfile.LNKTYPE}


def picture(i):
    return encode(Image.new('L', (2, 2), i), 'PNG')


def write(path, members, **options):
    """A tar file of (name, bytes), or (name, TarInfo's attributes), or names of pictures."""
    with tarfile.open(path, 'w', **options) as archive:
        for i, member in enumerate(members):
            name, content = (member, picture(i)) if isinstance(member, str) else member
            info = tarfile.TarInfo(name)
            if isinstance(content, dict):
                for key, value in content.items():
                    setattr(info, key, value)
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def test_webdataset(tmp_path):
    for shard in range(9, 11):
        members = []
        for i in range(3):
            members.append((f'x/{shard}_{i}.cls', b'%d\n' % i))
            members.append((f'x/{shard}_{i}.JPG', picture(10 * shard + i)))
            members.append((f'x/{shard}_{i}.seg.png', picture(0)))
        write(tmp_path / f'{shard:02d}.tar', members)
    spec = f'webdataset:{tmp_path}/{{09..10}}.tar'
    ours = sources.open_source(spec, channels=3, cache_dir=str(tmp_path))
    assert len(ours) == 6 and ours.labels.tolist() == [0, 1, 2] * 2
    assert ours.read(4) == picture(101)
    assert ours.name(4) == f'{tmp_path}/10.tar/x/10_1.JPG'
    again = sources.open_source(spec, channels=3, cache_dir=str(tmp_path)).take([4, 1])
    assert again.read(0) == picture(101) and again.labels.tolist() == [1, 1]


def test_webdataset_member_names_are_never_paths(tmp_path):
    (tmp_path / 'secret.jpg').write_bytes(b'secret')
    secret = {'linkname': str(tmp_path / 'secret.jpg')}
    members = [('link.jpg', LINK | secret), ('hard.jpg', HARD | secret), ('../secret.jpg', b'mine')]
    write(tmp_path / '0.tar', members)
    ours = sources.open_source(f'webdataset:{tmp_path}/0.tar', channels=3)
    assert len(ours) == 1 and ours.read(0) == b'mine' and ours.labels is None


def test_webdataset_mistakes(tmp_path):
    text = refusal(f'webdataset:{tmp_path}/{{0..1}}.tar')
    assert 'no shard' in text and '0.tar' in text
    (tmp_path / 'text.tar').write_text('no tar' * 1000)
    assert 'tar file' in refusal(f'webdataset:{tmp_path}/text.tar')
    write(tmp_path / 'whole.tar', [('a.jpg', picture(1) * 500)])
    (tmp_path / 'cut.tar').write_bytes((tmp_path / 'whole.tar').read_bytes()[:4096])
    assert 'cut.tar' in refusal(f'webdataset:{tmp_path}/cut.tar')
    write(tmp_path / 'none.tar', [('a.txt', b'')])
    assert 'no images' in refusal(f'webdataset:{tmp_path}/none.tar')


def opened(path):
    source = sources.open_source(f'webdataset:{path}', channels=3)
    names = [source.name(i).removeprefix(f'{path}/') for i in range(len(source))]
    ids = source.label_ids()
    return names, None if ids is None else ids.tolist(), source


@pytest.mark.parametrize(
    ('members', 'names', 'labels', 'said'),
    [
        (  # names with dots
            ['IMG_2020.01.02.png', 'IMG_2020.01.03.png', 'a.jpg', 'v1.2 final.JPG'],
            ['IMG_2020.01.02.png', 'IMG_2020.01.03.png', 'a.jpg', 'v1.2 final.JPG'],
            None,
            'samples of several images, each of which counts (1: ',
        ),
        (  # the label of all of a sample, and of one name alone
            ['x.1.png', 'x.2.png', ('x.2.cls', b'5'), ('x.cls', b'3')],
            ['x.1.png', 'x.2.png'],
            [3, 5],
            'samples of several images',
        ),
        (['a.b/x.png', ('a.b/x.cls', b'2')], ['a.b/x.png'], [2], None),  # a folder with a dot
        (['./a/x.png', ('./a/x.cls', b'2')], ['./a/x.png'], [2], None),
        (['a/x.png', ('b/x.cls', b'2')], ['a/x.png'], None, None),  # another sample's
        (['x.seg.png', 'x.jpg', 'x.png'], ['x.jpg'], None, 'further images of a sample'),
        (['x.PNG', ('x.CLS', b' 7\n')], ['x.PNG'], [7], None),
        (['x.png', ('x.cls', b'7.0')], ['x.png'], [7], None),
        (  # the same names again are another sample
            ['x.png', ('x.cls', b'1'), 'x.png', ('x.cls', b'2')],
            ['x.png', 'x.png'],
            [1, 2],
            None,
        ),
        (['x.png', ('x.cls', b'1'), 'y.png'], ['x.png', 'y.png'], [1, -1], '1 of 2 images'),
        (['x.png', ('x.cls', b'1'), 'y.png', ('y.cls', b'-1')], ['x.png', 'y.png'], [1, -1], '1 '),
        (['x.png', ('x.cls', b'-1')], ['x.png'], None, None),
        (['x.png', ('x.cls', b'%d' % -(2**63))], ['x.png'], [-(2**63)], None),
        (['x.png', ('x.cls', b'%d' % 2**62)], ['x.png'], [2**62], None),
        (
            ['._x.png', 'x.png', 'a/._x.png', '__MACOSX/x.png', '.git/x.png', ('.x.cls', b'hm')],
            ['x.png'],
            None,
            'hidden members (4: ',
        ),
        (['x.png', 'y.heic', ('z.txt', b'')], ['x.png'], None, 'not read; convert them to JPEG'),
        (['x.jfif', 'y.jpe', 'z.pbm'], ['x.jfif', 'y.jpe', 'z.pbm'], None, None),
        (
            [('d.png', {'type': tarfile.DIRTYPE}), 'd.png/x.png', ('f.png', {'type': b'6'})],
            ['d.png/x.png'],
            None,
            'is not a whole file (sparse, a device) (1: ',
        ),
        (  # links of both kinds, to links, from before, to labels
            ['a/x.png', ('a/x.cls', b'4'), ('b/y.png', LINK | {'linkname': '../a/x.png'}),
             ('b/z.png', HARD | {'linkname': 'a/x.png'}), ('w.png', LINK | {'linkname': 'b/y.png'}),
             ('w.cls', HARD | {'linkname': 'a/x.cls'})],
            ['a/x.png', 'b/y.png', 'b/z.png', 'w.png'],
            [4, -1, -1, 4],
            '2 of 4 images',
        ),
        (
            ['x.png', ('y.png', LINK | {'linkname': '/etc/passwd'}),
             ('z.png', HARD | {'linkname': 'z.png'}), ('v.png', LINK | {'linkname': '../x.png'})],
            ['x.png'],
            None,
            'whose target is not in the same shard (3: ',
        ),
        (['ä 猫.png', 'l/' * 90 + 'x.png'], ['ä 猫.png', 'l/' * 90 + 'x.png'], None, None),
    ],
)  # fmt: skip
def test_members(tmp_path, members, names, labels, said):
    found, ids, source = opened(write(tmp_path / '0.tar', members))
    assert (sorted(found), ids) == (sorted(names), labels)
    assert len(source.notes) == (said is not None) and all(said in note for note in source.notes)
    assert all(source.read(i).startswith(b'\x89PNG') for i in range(len(source)))


@pytest.mark.parametrize(
    'text', [b'cat', b'', b'1.5', b'1' * 30, b'1\0', b'\xff', b' ' * 99 + b'1']
)
def test_labels_that_are_no_numbers_are_named(tmp_path, text):
    write(tmp_path / '0.tar', ['x.png', ('x.cls', text)])
    assert '0.tar/x.cls holds' in refusal(f'webdataset:{tmp_path}/0.tar')


@pytest.mark.parametrize('kind', [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_shard_cut_short_anywhere_is_refused(tmp_path, kind):
    members = ['a.png', 'b.png', ('b.cls', b'1'), ('c.png', picture(1) * 20)]
    whole = write(tmp_path / '0.tar', members, format=kind).read_bytes()
    end = len(whole.rstrip(b'\0')) + 511 & ~511
    assert len(whole) % 10240 == 0 and end + 1024 < len(whole)
    path = tmp_path / 'cut.tar'
    for cut in (*range(0, end + 1024, 256), end - 1, end + 1, end + 1023):
        path.write_bytes(whole[:cut])
        text = refusal(f'webdataset:{path}')
        assert 'cut.tar' in text or not cut
    for padding in (0, 512, 100_000):  # what follows the end mark is for tapes
        path.write_bytes(whole[: end + 1024] + bytes(padding))
        assert len(opened(path)[0]) == 3
    damaged = bytearray(whole)
    damaged[512 * 2 : 512 * 2 + 4] = b'zzzz'
    path.write_bytes(damaged)
    assert 'not a whole' in refusal(f'webdataset:{path}')


def test_archives_one_after_another_are_all_read(tmp_path):
    both = write(tmp_path / 'a.tar', ['a.png']).read_bytes()
    both += write(tmp_path / 'b.tar', ['b.png', ('b.cls', b'3')]).read_bytes()
    (tmp_path / 'both.tar').write_bytes(both)
    names, labels, source = opened(tmp_path / 'both.tar')
    assert (names, labels) == (['a.png', 'b.png'], [-1, 3]) and source.read(1) == picture(0)
    (tmp_path / 'both.tar').write_bytes(both + b'no tar' * 500)
    assert 'not a whole' in refusal(f'webdataset:{tmp_path}/both.tar')


def test_files_that_are_no_shards(tmp_path):
    whole = write(tmp_path / '0.tar', ['a.png', ('a.cls', b'1')]).read_bytes()
    path = tmp_path / 'x.tar'
    for content, said in (
        (gzip.compress(whole), 'compressed (gzip)'),
        (bz2.compress(whole), 'compressed (bzip2)'),
        (b'PK\3\4' + bytes(5000), 'not a whole, uncompressed tar'),
        (bytes(10240), 'no images'),
        (b'', 'x.tar is not a whole, uncompressed tar file (it is empty)'),
    ):
        path.write_bytes(content)
        assert said in refusal(f'webdataset:{path}')
        both = f'webdataset:{tmp_path}/{{0,x}}.tar'
        if said == 'no images':  # nothing but the end mark
            assert len(sources.open_source(both, channels=3)) == 1
        else:
            assert said in refusal(both)
    os.mkfifo(tmp_path / 'pipe.tar')
    for name in ('pipe.tar', '', '../../../../../dev/zero'):
        assert 'cannot be read' in refusal(f'webdataset:{tmp_path}/{name}')


@pytest.mark.parametrize('size', [-512, -1024, -(10**6), 10**18])
def test_members_that_lead_back_or_away_end(tmp_path, size):
    with tarfile.open(tmp_path / '0.tar', 'w', format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo('a.png')
        info.pax_headers = {'size': str(size)}
        archive.addfile(info)
        archive.addfile(tarfile.TarInfo('b.png'))
    assert 'not a whole' in refusal(f'webdataset:{tmp_path}/0.tar')


def test_sparse_members_are_left_out(tmp_path):
    with tarfile.open(tmp_path / '0.tar', 'w', format=tarfile.PAX_FORMAT) as archive:
        for name, headers in (('s.png', {'GNU.sparse.size': '9', 'GNU.sparse.map': '0,4'}),
                              ('x.png', {'comment': 'ä' * 2000})):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.pax_headers, info.size = headers, 4
            archive.addfile(info, io.BytesIO(b'data'))
    names, _, source = opened(tmp_path / '0.tar')
    assert names == ['x.png'] and source.read(0) == b'data' and 's.png' in source.notes[0]


@pytest.mark.parametrize(
    ('pattern', 'names'),
    [
        ('a{08..10}b', ['a08b', 'a09b', 'a10b']),
        ('{9..11}', ['9', '10', '11']),
        ('{8..010}', ['008', '009', '010']),
        ('{5..3}', ['5', '4', '3']),
        ('{0..10..5}', ['0', '5', '10']),
        ('{a,b}{1..2}', ['a1', 'a2', 'b1', 'b2']),
        ('x{train{0..1},val}', ['xtrain0', 'xtrain1', 'xval']),
        ('a::b{1,2}', ['a', 'b1', 'b2']),
        ('{x}/{1..}/{', ['{x}/{1..}/{']),
        ('{000..999}', [f'{i:03}' for i in range(1000)]),
    ],
)
def test_patterns(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    'pattern',
    [
        '{0..100000000}', '{000000000000..999999999999}', '{999999999999..0}', '{0..999}' * 3,
        '{0..9}' * 12, '{a,b}' * 40, '{{0..99999},{0..99999}}', '{a,' * 1300 + '}' * 1300,
        '{' * 50_000, 'x' * 5000, '::' * 10 + '{0..99999}::{0..99999}',
    ],
)  # fmt: skip
def test_patterns_of_too_many_shards_are_refused_before_they_are_expanded(pattern):
    """Expanded, they would take hours or all of the memory."""
    with pytest.raises(UserError):
        expand_braces(pattern)


def test_a_digest_knows_labels_and_names_of_shards(tmp_path):
    paths = [tmp_path / 'a' / '0.tar', tmp_path / 'b' / '0.tar', tmp_path / 'a' / '1.tar']
    digests = []
    for path, label in zip(paths, (b'1', b'2', b'1'), strict=True):
        path.parent.mkdir(exist_ok=True)
        source = opened(write(path, ['x.png', ('x.cls', label)]))[2]
        digests.append((source.digest(), source.digest(labels=True)))
    assert digests[0][0] == digests[1][0] != digests[2][0] and digests[0][1] != digests[1][1]


def test_a_shard_that_became_shorter_cannot_be_read(tmp_path):
    path = write(tmp_path / '0.tar', ['x.png', 'y.png'])
    source = opened(path)[2]
    os.truncate(path, 1600)
    assert source.read(0) == picture(0)
    with pytest.raises(OSError, match='shorter'):
        source.read(1)


def test_labels_of_many_samples(tmp_path):
    members = [x for i in range(300) for x in ((f'{i}.cls', b'%d' % (i % 7)), f'{i}.png')]
    for member in range(0, 600, 2):
        members[member + 1] = (members[member + 1], b'png')
    _, labels, source = opened(write(tmp_path / '0.tar', members))
    np.testing.assert_array_equal(labels, np.arange(300) % 7)
    assert not source.notes
