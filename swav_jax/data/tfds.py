"""Images in the records of prepared TensorFlow datasets.

A prepared dataset is data, and no code runs for it: it is read from its own files, features of
others than tensorflow_datasets' own classes are refused, and nothing is downloaded.
"""

import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from swav_jax.data.filelists import split_options
from swav_jax.data.images import RangeSource
from swav_jax.data.listing import remembered, stamp
from swav_jax.data.regular import absolute, open_regular, read_regular
from swav_jax.errors import UserError

MAX_CLASSES = 2**24  # of which each is named
NAME = re.compile(r'(\w+)(?:/([\w.-]+))?(?::(\d+\.\d+\.\d+))?')
SPEC = re.compile(r'([^:]*(?::\d+\.\d+\.\d+)?)(?::(.*))?', re.DOTALL)


class TfdsSource(RangeSource):
    """Examples of a prepared TensorFlow dataset, of which the encoded image is taken.

    Labels lie in the same records as the images, so they are read when first asked for.
    """

    def __init__(self, files, ranges, names, image_key, label_key, class_names):
        super().__init__(files, ranges, names)
        if label_key is not None:
            self.class_names, self.class_ids = class_names, np.arange(len(class_names))
        self.image_key, self.label_key = image_key, label_key

    @property
    def labels(self) -> np.ndarray | None:
        """int32 (len,), -1 where not known; None if the dataset has no class label or knows none.

        Raises:
          UserError: a label that has no class.
        """
        if self._labels is None and self.label_key is not None:
            labels = np.array([self._label(i) for i in range(len(self))], np.int64)
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
        example = self._example(index)
        values = example and example.features.feature[self.image_key].bytes_list.value
        if not values:
            raise OSError(f'{self.name(index)} holds no image')
        return values[0]

    def _label(self, index: int) -> int:
        example = self._example(index)
        values = example and example.features.feature[self.label_key].int64_list.value
        return values[0] if values else -1

    def _example(self, index: int) -> Any:
        """A tf.train.Example; None of a damaged record."""
        import tensorflow as tf  # slow to load, and only this kind of source needs it
        from google.protobuf.message import DecodeError

        try:
            return tf.train.Example.FromString(super().read(index))
        except DecodeError:
            return None


def open_tfds(spec: str, cache_dir: str | None) -> TfdsSource:
    """A dataset that tfds has prepared as TFRecord files: 'name[:split][?data_dir=/path]'.

    The name may go on with a config and a version, as in 'name/config:1.0.0'; without a version it
    is the latest. The split is 'train' unless given and may be a slice, as 'train[:10%]'.

    Raises:
      UserError: the dataset is not prepared, is damaged or has features of foreign classes, or has
        no such split or no images.
    """
    spec, options = split_options(spec, ('data_dir',))
    name, split = SPEC.fullmatch(spec).groups('train')
    split = split or 'train'
    folder = find(name, absolute(options.get('data_dir') or _usual_data_dir()))
    check_features(folder)

    import tensorflow_datasets as tfds  # slow to load, and only this kind of source needs it

    try:
        info = tfds.builder_from_directory(folder).info
        features = dict(info.features)
        file_format = info.file_format.value
    except Exception as error:  # whatever these files hold instead
        raise UserError(f'{folder} is no prepared dataset ({_first_line(error)})') from error
    if file_format != 'tfrecord':
        raise UserError(f'{name} is stored as {file_format}, not as tfrecord')
    try:
        shards = info.splits[split].file_instructions
        files = [str(shard.filename) for shard in shards]
    except Exception as error:  # tfds has many for a split that is no split
        known = ', '.join(info.splits)
        raise UserError(
            f'{name} has no split {split!r} ({_first_line(error)}); it has {known}'
        ) from error
    if not all(Path(file).parent == folder for file in files):
        raise UserError(f'{folder} is no prepared dataset (it names files outside of it)')
    image_key = _first(features, tfds.features.Image)
    label_key = _first(features, tfds.features.ClassLabel)
    if image_key is None:
        raise UserError(f'{name} has no images; its features are {", ".join(features)}')

    def build() -> tuple[list, dict[str, list[int]]]:
        try:
            stamps = {file: stamp(file) for file in files}
        except OSError as error:
            raise UserError(f'{error.filename} cannot be read ({error.strerror})') from error
        return [list(index_records(file)) for file in files], stamps

    def is_valid(found: Any) -> bool:
        return len(found) == len(files) and all(
            type(start) is int and type(count) is int and min(start, count) >= 0
            for index in found
            for start, count in index
        )

    indices = remembered(f'tfds:{files}', build, cache_dir, is_valid)
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
            raise UserError(f'{folder} is no prepared dataset (it has too many classes)')
        class_names = features[label_key].names
    return TfdsSource(
        files, np.array(ranges, np.int64).reshape(-1, 3), names, image_key, label_key, class_names
    )


def _usual_data_dir() -> str:
    return os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'


def _first_line(error: Exception) -> str:
    return str(error).strip().partition('\n')[0] or type(error).__name__


def _first(features: dict, kind: type) -> str | None:
    return next((key for key, feature in features.items() if isinstance(feature, kind)), None)


def find(name: str, data_dir: Path) -> Path:
    """The folder of a prepared dataset: DATA_DIR/NAME[/CONFIG]/VERSION.

    Raises:
      UserError: there is none.
    """
    found = NAME.fullmatch(name)
    if not found:
        raise UserError(
            f'{name!r} is no name of a prepared dataset: write name, name/config or name:1.0.0'
        )
    # tfds knows MyData and my_data as the same.
    snake = re.sub(r'([a-z\d])([A-Z])', r'\1_\2', re.sub(r'(.)([A-Z][a-z]+)', r'\1_\2', found[1]))
    folder = data_dir / snake.lower() / (found[2] or '')
    try:
        if not found[2] and not versions(folder):
            # Of several configs tfds writes down which is the usual one.
            usual = json.loads(read_regular(folder / '.config' / 'metadata.json'))
            usual = usual.get('defaultConfigName', '')
            if isinstance(usual, str) and re.fullmatch(r'\w[\w.-]*', usual):
                folder = folder / usual
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        pass
    version = found[3] or next(iter(versions(folder)), None)
    if version is None or not (folder / version / 'features.json').is_file():
        configs = sorted(x.name for x in folder.glob('[!.]*') if versions(x))
        hint = f'name one of its configs {", ".join(configs)} after a /, or ' if configs else ''
        raise UserError(
            f'{name} is not prepared in {data_dir}; {hint}run tfds build '
            f'{name}, or say where it is with ?data_dir=/path'
        )
    return folder / version


def versions(folder: Path) -> list[str]:
    """The versions in a dataset's folder, the latest first."""
    try:
        names = [x for x in os.listdir(folder) if re.fullmatch(r'\d+\.\d+\.\d+', x)]  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(names, key=lambda x: [int(i[:18]) for i in x.split('.')], reverse=True)


def check_features(folder: Path) -> None:
    """Make sure that a features.json names features of tensorflow_datasets alone.

    tfds imports the module of each class that the file names: whoever wrote it would choose which
    code runs.

    Raises:
      UserError: it names another, or cannot be read.
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
                raise UserError(f'{file} names the feature {key!r}, which is no name')
            named = key in ('pythonClassName', 'python_class_name', 'type')
            if named and not (isinstance(value, str) and value in known):
                if key == 'type' and not (isinstance(value, str) and '.' in value):
                    continue  # a feature of this name
                raise UserError(
                    f'{file} names {value!r}, which is no feature of tensorflow_datasets itself: '
                    'its code is not run; prepare the dataset with features of tfds alone'
                )
    except OSError as error:
        raise UserError(f'{file} cannot be read ({error.strerror})') from error
    except (ValueError, RecursionError) as error:
        raise UserError(f'{file} is damaged ({_first_line(error)})') from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError('a name comes twice')
    return dict(pairs)


def _pairs(content: Any) -> Iterator[tuple[str, Any]]:
    """The keys and values of all dictionaries in JSON, also of JSON within its texts."""
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


def index_records(file: str) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of every whole record of a TFRecord file.

    A record is its length (8 bytes), the length's checksum (4), its data, the data's checksum (4).
    """
    try:
        with open_regular(file) as stream:
            at, size = 0, stream.seek(0, 2)
            while at + 16 <= size:
                stream.seek(at)
                (count,) = struct.unpack('<Q', stream.read(8))
                if at + 16 + count > size:
                    break
                yield at + 12, count
                at += 16 + count
    except OSError as error:
        raise UserError(f'{file} cannot be read ({error.strerror})') from error
