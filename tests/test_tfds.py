"""Prepared TensorFlow datasets: no code of theirs runs, and each damage is said."""

import importlib
import io
import json
import struct
import sys
import warnings

import numpy as np
import pytest
from PIL import Image
from refusals import refusal

from swav_jax.data import sources, tfds

FEATURES = 'tensorflow_datasets.core.features'
IMAGE = {
    'pythonClassName': f'{FEATURES}.image_feature.Image',
    'image': {
        'shape': {'dimensions': ['-1', '-1', '3']},
        'dtype': 'uint8',
        'encodingFormat': 'png',
    },
}
LABEL = {
    'pythonClassName': f'{FEATURES}.class_label_feature.ClassLabel',
    'classLabel': {'numClasses': '2'},
}


def features(**parts):
    return {
        'pythonClassName': f'{FEATURES}.features_dict.FeaturesDict',
        'featuresDict': {'features': {'image': IMAGE, 'label': LABEL} | parts},
    }


def record(image, label):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import tensorflow as tf
    feature = {}
    if image is not None:
        feature['image'] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[image]))
    if label is not None:
        feature['label'] = tf.train.Feature(int64_list=tf.train.Int64List(value=[label]))
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def prepare(
    root,
    content=None,
    *,
    name='toy/1.0.0',
    records=None,
    info=(),
    template=None,
    names='cat\ndog\n',
):
    """A prepared dataset; returns its source's text."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    records = records or [record(b'a', 0), record(b'b', 1), record(b'c', -1)]
    data = b''.join(struct.pack('<QI', len(x), 0) + x + bytes(4) for x in records)
    (folder / 'toy-train.tfrecord-00000-of-00001').write_bytes(data)
    content = features() if content is None else content
    (folder / 'features.json').write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    if names:
        (folder / 'label.labels.txt').write_text(names)
    split = {'name': 'train', 'shardLengths': [str(len(records))], 'numBytes': str(len(data))}
    split['filepathTemplate'] = template or '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
    told = {'name': 'toy', 'version': '1.0.0', 'fileFormat': 'tfrecord', 'splits': [split]}
    (folder / 'dataset_info.json').write_text(json.dumps(told | dict(info)))
    return f'tfds:toy?data_dir={root}'


pytestmark = pytest.mark.filterwarnings('ignore')  # TensorFlow's


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


def test_a_dataset_made_by_hand_is_read(tmp_path):
    source = sources.open_source(f'{prepare(tmp_path)}/toy/..', channels=3)
    assert [source.read(i) for i in range(3)] == [b'a', b'b', b'c']
    assert source.labels.tolist() == [0, 1, -1] and source.class_names == ['cat', 'dog']
    assert source.digest() == source.take([0, 1, 2]).digest() != source.take([1]).digest()


@pytest.mark.parametrize(
    'content',
    [
        features(label={'pythonClassName': 'evil_module.Feature', 'jsonFeature': {'json': '{}'}}),
        features(label={'python_class_name': 'evil_module.Feature', 'jsonFeature': {'json': '{}'}}),
        features() | {'pythonClassName': 'evil_module.Feature'},
        features(
            x={
                'pythonClassName': f'{FEATURES}.sequence_feature.Sequence',
                'sequence': {'feature': {'pythonClassName': 'evil_module.Feature'}, 'length': '-1'},
            }
        ),
        {'type': 'evil_module.Feature', 'content': {}},
        features(
            x={
                'pythonClassName': f'{FEATURES}.sequence_feature.Sequence',
                'json': {'json': json.dumps({'type': 'evil_module.Feature', 'content': {}})},
            }
        ),
        json.dumps(features(label={'pythonClassName': 'evil_module.Feature'})).replace(
            'N', '\\u004e'
        ),
        features(label={'pythonClassName': 'tensorflow_datasets.core.features.feature_test.X'}),
        features(label={'pythonClassName': 3}),
        features(label={'pythonClassName': ['evil_module.Feature']}),
    ],
)
def test_no_module_that_the_data_name_is_imported(tmp_path, monkeypatch, content):
    ran = tmp_path / 'ran'
    (tmp_path / 'evil_module.py').write_text(
        'from pathlib import Path\n'
        f'Path({str(ran)!r}).touch()\n'
        'import tensorflow_datasets as tfds\n'
        'class Feature(tfds.features.Text): pass\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    spec = prepare(tmp_path, content)
    assert 'not a feature of tensorflow_datasets itself' in refusal(spec)
    assert not ran.exists() and 'evil_module' not in sys.modules


@pytest.mark.parametrize('name', ['toy', 'toy/config'])
def test_code_beside_the_data_never_runs(tmp_path, monkeypatch, name):
    # A builder's module, by the dataset's name or as the data say.
    ran = tmp_path / 'ran'
    for place in ('toy', 'toy/toy', 'toy/toy_dataset_builder', 'evil_module'):
        path = tmp_path / f'{place}.py'
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'from pathlib import Path\nPath({str(ran)!r}).touch()\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    told = {'moduleName': 'evil_module', 'configName': 'config' if name != 'toy' else ''}
    prepare(tmp_path, name=f'{name}/1.0.0', info=told)
    source = sources.open_source(f'tfds:{name}?data_dir={tmp_path}', channels=3)
    assert len(source) == 3 and not ran.exists()


@pytest.mark.parametrize(
    'spec',
    [
        'huggingface:mnist', 'kaggle:x', 'a/b/c/d', '../toy', '/etc', 'toy/../../x', 'toy:2.0.0',
        'toy/x=3', 'mnist', 'mnist:3.0.1', 'no_such_set', 'my.module', '', ' ', 'toy\n',
    ],
)  # fmt: skip
def test_what_is_not_prepared_is_said_without_code_or_network(tmp_path, monkeypatch, spec):
    prepare(tmp_path)
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    monkeypatch.setattr('socket.socket', None)
    assert 'prepared' in refusal(f'tfds:{spec}?data_dir={tmp_path}')
    assert 'prepared' in refusal(f'tfds:{spec}?') or spec == 'toy'


def test_the_usual_config_and_the_latest_version_are_found(tmp_path):
    for name in ('toy/b/1.0.0', 'toy/b/1.10.0', 'toy/b/1.9.0', 'toy/a/3.0.0'):
        told = {'configName': name.split('/')[1], 'version': name.split('/')[2]}
        prepare(tmp_path, name=name, info=told)
    assert 'configs a, b' in refusal(f'tfds:toy?data_dir={tmp_path}')
    (tmp_path / 'toy' / '.config').mkdir()
    for content in ('[', '{"defaultConfigName": "../x"}', '[]', '{"defaultConfigName": 3}'):
        (tmp_path / 'toy' / '.config' / 'metadata.json').write_text(content)
        assert 'configs a, b' in refusal(f'tfds:Toy?data_dir={tmp_path}')
    (tmp_path / 'toy' / '.config' / 'metadata.json').write_text('{"defaultConfigName": "b"}')
    source = sources.open_source(f'tfds:Toy?data_dir={tmp_path}', channels=3)
    assert source.files[0].startswith(f'{tmp_path}/toy/b/1.10.0/')
    source = sources.open_source(f'tfds:toy/b:1.9.0:train[1:2]?data_dir={tmp_path}', channels=3)
    assert '/1.9.0/' in source.files[0] and source.read(0) == b'b'


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'content': '['}, 'damaged'),
        ({'content': '[' * 100_000}, 'damaged'),
        ({'content': '{"a": 1, "a": 2}'}, 'damaged'),
        ({'content': '{}'}, 'not a prepared dataset'),
        ({'content': features(**{'../x': LABEL})}, 'which is not a name'),
        ({'content': features(image=LABEL)}, 'has no images'),
        ({'info': {'splits': []}}, 'no split'),
        (
            {'content': json.dumps(features()).replace('"2"', '"1000000000000"'), 'names': None},
            'too many classes',
        ),
        ({'info': {'splits': 3}}, 'not a prepared dataset'),
        ({'info': {'fileFormat': 'array_record'}}, 'array_record, not as tfrecord'),
        ({'info': {'fileFormat': 'exe'}}, 'not a prepared dataset'),
        ({'template': '../../x/{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'}, 'prepared dataset'),
        ({'template': '{DATASET}-{SPLIT}.{FILEFORMAT}-x-{SHARD_X_OF_Y}'}, 'cannot be read'),
        ({'template': '{NOTHING}'}, 'has no split'),
        ({'records': [record(b'a', 2)]}, 'has the label 2, but there are 2 classes'),
        ({'records': [record(b'a', -2)]}, 'has the label -2'),
    ],
)
def test_damaged_datasets(tmp_path, changes, said):
    spec = prepare(tmp_path, **changes)
    if 'records' in changes:
        with pytest.raises(tfds.UserError, match=said):
            _ = sources.open_source(spec, channels=3).labels
    else:
        assert said in refusal(spec)


def test_damaged_records(tmp_path):
    spec = prepare(tmp_path, records=[record(b'a', None), record(None, 1), b'\xff' * 9, b''])
    source = sources.open_source(spec, channels=3)
    assert source.read(0) == b'a'
    for i in range(1, 4):
        with pytest.raises(OSError, match='no image'):
            source.read(i)
    assert source.labels.tolist() == [-1, 1, -1, -1]
    part = source.take([0, 1])
    assert part.labels.tolist() == [-1, 1]
    assert part.take([0]).labels.tolist() == [-1]
    unlabelled = sources.open_source(spec, channels=3).take([0])
    assert unlabelled.labels is None and unlabelled.class_names is None


@pytest.mark.parametrize(
    'split', ['val', 'train[', 'train[200%:]', 'train[5:2]', '', 'train+x', '*']
)
def test_splits_that_are_none(tmp_path, split):
    spec = prepare(tmp_path).replace('tfds:toy', f'tfds:toy:{split}')
    if split:
        assert 'toy' in refusal(spec)
    else:
        assert len(sources.open_source(spec, channels=3)) == 3


def test_a_kept_index_that_was_changed_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr('swav_jax.data.listing.SETTLED_S', -60)
    spec, cache = prepare(tmp_path), tmp_path / 'run'
    sources.open_source(spec, channels=3, cache_dir=str(cache))
    (file,) = cache.iterdir()
    saved = json.loads(file.read_text())
    for index in ([], [[[1, 2, 3]]], [[[-5, 3]] * 3], [[['a', 3]] * 3], 7):
        file.write_text(json.dumps(saved | {'listing': index}))
        source = sources.open_source(spec, channels=3, cache_dir=str(cache))
        np.testing.assert_array_equal(source.labels, [0, 1, -1])
