"""Images in the records of prepared TensorFlow datasets.

A prepared dataset is data, and none of its code runs: it is read from its own files, features of
classes outside tensorflow_datasets are refused, and nothing is downloaded.
"""

import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from swav_jax.data.images import RangeSource
from swav_jax.data.listing import Stamps, remembered, stamp
from swav_jax.data.names import absolute, split_options
from swav_jax.errors import UserError
from swav_jax.files import open_regular, read_regular

MAX_CLASSES = 2**24  # each has a name
NAME = re.compile(r'(\w+)(?:/([\w.-]+))?(?::(\d+\.\d+\.\d+))?')
SPEC = re.compile(r'([^:]*(?::\d+\.\d+\.\d+)?)(?::(.*))?', re.DOTALL)


class TfdsSource(RangeSource):
    """The encoded images in examples of a prepared TensorFlow dataset.

    Labels lie in the same records as the images, so they are read on first use.
    """

    def __init__(self, files, ranges, names, image_key, label_key, class_names):
        super().__init__(files, ranges, names)
        if label_key is not None:
            self.class_names, self.class_ids = class_names, np.arange(len(class_names))
        self.image_key, self.label_key = image_key, label_key

    @property
    def labels(self) -> np.ndarray | None:
        """int32 (len,), -1 where unknown; None if the dataset has no class label or knows none.

        Raises:
          UserError: a label has no class.
        """
        if self._labels is None and self.label_key is not None:
            found = [self._value(i, self.label_key, 'int64_list') for i in range(len(self))]
            labels = np.array([-1 if label is None else label for label in found], np.int64)
            wrong = (labels < -1) | (labels >= len(self.class_names))
            if wrong.any():
                raise UserError(
                    f'{self.name(wrong.argmax())} has the label {labels[wrong.argmax()]}, but '
                    f'there are {len(self.class_names)} classes'
                )
            self._labels = labels.astype(np.int32)
            if (labels == -1).all():
                self._labels = self.class_names = self.class_ids = self.label_key = None
        return self._labels

    def read(self, index: int) -> bytes:
        """The encoded image of an example."""
        image = self._value(index, self.image_key, 'bytes_list')
        if image is None:
            raise OSError(f'{self.name(index)} holds no image')
        return image

    def _value(self, index: int, key: str, kind: str) -> Any:
        """The first value of a feature, in its list `kind`; None if there is none or no example."""
        import tensorflow as tf  # slow to load, and only this kind of source needs it
        from google.protobuf.message import DecodeError

        try:
            example = tf.train.Example.FromString(super().read(index))
        except DecodeError:
            return None
        return next(iter(getattr(example.features.feature[key], kind).value), None)


def open_tfds(spec: str, cache_dir: str | None) -> TfdsSource:
    """A dataset that tfds has prepared as TFRecord files: 'name[:split][?data_dir=/path]'.

    A config and a version may follow the name, as in 'name/config:1.0.0'; the default version is
    the latest. The split is 'train' unless given and may be a slice such as 'train[:10%]'.

    Raises:
      UserError: the dataset is not prepared, is damaged or has features of foreign classes, or has
        no such split or no images.
    """
    spec, options = split_options(spec, ('data_dir',))
    name, split = SPEC.fullmatch(spec).groups('train')
    split = split or 'train'
    usual = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    folder = _find(name, absolute(options.get('data_dir') or usual))
    _check_features(folder)

    import tensorflow_datasets as tfds  # slow to load, and only this kind of source needs it

    try:
        info = tfds.builder_from_directory(folder).info
        features = dict(info.features)
        file_format = info.file_format.value
    except Exception as error:  # whatever these files hold instead
        raise UserError(f'{folder} is not a prepared dataset ({_first_line(error)})') from error
    if file_format != 'tfrecord':
        raise UserError(f'{name} is stored as {file_format}, not as tfrecord')
    try:
        shards = info.splits[split].file_instructions
        files = [str(shard.filename) for shard in shards]
    except Exception as error:  # tfds has many for a split that is not a split
        known = ', '.join(info.splits)
        raise UserError(
            f'{name} has no split {split!r} ({_first_line(error)}); it has {known}'
        ) from error
    if not all(Path(file).parent == folder for file in files):
        raise UserError(f'{folder} is not a prepared dataset (it names files outside of it)')
    image_key, label_key = (
        next((key for key, feature in features.items() if isinstance(feature, kind)), None)
        for kind in (tfds.features.Image, tfds.features.ClassLabel)
    )
    if image_key is None:
        raise UserError(f'{name} has no images; its features are {", ".join(features)}')

    def build() -> tuple[list, Stamps]:
        stamps = {file: stamp(file) for file in files}
        return [list(_index_records(file)) for file in files], stamps

    indices = remembered(f'tfds:{files}', build, cache_dir)
    ranges, names = [], []
    for number, (shard, index) in enumerate(zip(shards, indices, strict=True)):
        if len(index) != shard.examples_in_shard:
            raise UserError(
                f'{shard.filename} holds {len(index)} of its {shard.examples_in_shard} examples; '
                'prepare the dataset again'
            )
        chosen = range(len(index))[shard.skip : shard.skip + shard.take]
        ranges += [(number, *index[i]) for i in chosen]
        names += [str(i) for i in chosen]
    if not ranges:
        raise UserError(f'{name} has no images in {split}')
    class_names = None
    if label_key is not None:
        if (features[label_key].num_classes or 0) > MAX_CLASSES:
            raise UserError(f'{folder} is not a prepared dataset (it has too many classes)')
        class_names = features[label_key].names
    return TfdsSource(files, np.array(ranges, np.int64), names, image_key, label_key, class_names)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition('\n')[0] or type(error).__name__


def _find(name: str, data_dir: Path) -> Path:
    """The folder of a prepared dataset: DATA_DIR/NAME[/CONFIG]/VERSION."""
    found = NAME.fullmatch(name)
    if not found:
        raise UserError(
            f'{name!r} is not a name of a prepared dataset: write name, name/config or name:1.0.0'
        )
    camel, config, version = found.groups()
    # For tfds, MyData and my_data are the same.
    snake = re.sub(r'(.)([A-Z][a-z]+)', r'\1_\2', camel)
    snake = re.sub(r'([a-z\d])([A-Z])', r'\1_\2', snake)
    folder = data_dir / snake.lower() / (config or '')
    try:
        if not config and not _versions(folder):
            # tfds notes which of several configs is the default.
            default = json.loads(read_regular(folder / '.config' / 'metadata.json'))
            default = default.get('defaultConfigName', '')
            if isinstance(default, str) and re.fullmatch(r'\w[\w.-]*', default):
                folder = folder / default
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        pass
    version = version or next(iter(_versions(folder)), None)
    if version is None or not (folder / version / 'features.json').is_file():
        configs = sorted(x.name for x in folder.glob('[!.]*') if _versions(x))
        hint = f'name one of its configs {", ".join(configs)} after a /, or ' if configs else ''
        raise UserError(
            f'{name} is not prepared in {data_dir}; {hint}run tfds build '
            f'{name}, or name its folder with ?data_dir=/path'
        )
    return folder / version


def _versions(folder: Path) -> list[str]:
    """The versions in a dataset's folder, the latest first."""
    try:
        names = [x for x in os.listdir(folder) if re.fullmatch(r'\d+\.\d+\.\d+', x)]  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(names, key=lambda x: [int(i[:18]) for i in x.split('.')], reverse=True)


def _check_features(folder: Path) -> None:
    """Refuse a features.json that names features outside tensorflow_datasets.

    tfds imports the module of each class that the file names: whoever wrote the file would choose
    which code runs.
    """
    import tensorflow_datasets as tfds

    file = folder / 'features.json'
    classes = [getattr(tfds.features, name) for name in tfds.features.__all__]
    base = tfds.features.FeatureConnector
    classes = [x for x in classes if isinstance(x, type) and issubclass(x, base)]
    known = {f'{x.__module__}.{x.__name__}' for x in classes}
    known.update(alias for x in classes for alias in vars(x).get('ALIASES', ()))
    try:
        content = json.loads(read_regular(file).decode(), object_pairs_hook=_unique)
        for key, value in _pairs(content):
            if '/' in key or '\\' in key:
                raise UserError(f'{file} names the feature {key!r}, which is not a name')
            if key not in ('pythonClassName', 'python_class_name', 'type'):
                continue
            is_text = isinstance(value, str)
            if is_text and value in known:
                continue
            if key == 'type' and not (is_text and '.' in value):  # a feature that is called so
                continue
            raise UserError(
                f'{file} names {value!r}, which is not a feature of tensorflow_datasets itself: '
                'its code is not run; prepare the dataset with features of tfds only'
            )
    except (ValueError, RecursionError) as error:
        raise UserError(f'{file} is damaged ({_first_line(error)})') from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError('a name occurs twice')
    return dict(pairs)


def _pairs(content: Any) -> Iterator[tuple[str, Any]]:
    """The keys and values of all dictionaries in JSON, and in JSON inside its strings."""
    waiting = [content]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield from part.items()
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, str) and part.lstrip()[:1] in ('{', '['):
            try:
                waiting.append(json.loads(part))
            except ValueError:
                continue


def _index_records(file: str) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of every whole record of a TFRecord file.

    A record is its length (8 bytes), the length's checksum (4), its data, the data's checksum (4).
    """
    with open_regular(file) as stream:
        at, size = 0, stream.seek(0, 2)
        while at + 16 <= size:
            stream.seek(at)
            (count,) = struct.unpack('<Q', stream.read(8))
            if at + 16 + count > size:
                break
            yield at + 12, count
            at += 16 + count
