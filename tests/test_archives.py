"""Images inside tar shards and TensorFlow datasets."""

import io
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image
from refusals import refusal

from swav_jax.data import sources


def encoded(value, kind='JPEG'):
    buffer = io.BytesIO()
    Image.new('RGB', (8, 6), (value,) * 3).save(buffer, kind)
    return buffer.getvalue()


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
    text = refusal(f'webdataset:{tmp_path}/{{0..1}}.tar')
    assert 'no shard' in text and '0.tar' in text
    (tmp_path / 'text.tar').write_text('no tar' * 1000)
    assert 'tar file' in refusal(f'webdataset:{tmp_path}/text.tar')
    write_tar(tmp_path / 'whole.tar', [('a.jpg', encoded(1) * 50)])
    (tmp_path / 'cut.tar').write_bytes((tmp_path / 'whole.tar').read_bytes()[:4096])
    assert 'cut.tar' in refusal(f'webdataset:{tmp_path}/cut.tar')
    write_tar(tmp_path / 'none.tar', [('a.txt', b'')])
    assert 'no images' in refusal(f'webdataset:{tmp_path}/none.tar')


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
    assert 'val' in refusal(f'tfds:swav_toy:val?data_dir={toy_tfds}')
    text = refusal(f'tfds:mnist?data_dir={tmp_path}')
    assert 'not prepared' in text and 'tfds build mnist' in text
    assert 'no_such_set' in refusal(f'tfds:no_such_set?data_dir={tmp_path}')
    assert 'data_dir' in refusal('tfds:mnist?folder=/x')
    broken = tmp_path / 'swav_toy' / '1.0.0'
    broken.mkdir(parents=True)
    for file in (toy_tfds / 'swav_toy' / '1.0.0').iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-9] if 'train' in file.name else content)
    assert '19 of its 20 examples' in refusal(f'tfds:swav_toy?data_dir={tmp_path}')
