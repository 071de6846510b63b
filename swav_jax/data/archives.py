"""Images inside large files: tar shards (webdataset) and the records of TensorFlow datasets.

Opening one makes an index of byte ranges; an image is then one seek and one read, in any order.
Names inside an archive are text to be shown, never paths to be opened.
"""

import itertools
import re
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from swav_jax.data.folders import EXTENSIONS, split_options
from swav_jax.data.images import RangeSource
from swav_jax.data.listing import remembered
from swav_jax.errors import UserError


def open_webdataset(pattern: str, cache_dir: str | None) -> RangeSource:
    """Uncompressed tar shards, numbered as in /path/{000..123}.tar.

    The images of a shard are its members with an image's extension; `KEY.cls`, a whole number, is
    the label of `KEY.jpg`. Labels count if every image has one.

    Raises:
      UserError: a shard is missing or is no whole tar file, or none holds an image.
    """
    files = expand_braces(str(Path(pattern).expanduser().absolute()))
    for file in files:
        if not Path(file).is_file():
            raise UserError(
                f'there is no shard {file}; write a range of numbers as /path/{{000..123}}.tar'
            )

    def build():
        shards = [index_tar(file) for file in files]
        found = [[i, *entry] for i, shard in enumerate(shards) for entry in shard]
        return found, files

    entries = remembered(f'webdataset:{files}', build, cache_dir)
    if not entries:
        raise UserError(f'no images in {len(files)} shards (looked for {" ".join(EXTENSIONS)})')
    labels = [entry[4] for entry in entries]
    return RangeSource(
        files,
        np.array([entry[:3] for entry in entries], np.int64),
        [entry[3] for entry in entries],
        None if None in labels else labels,
    )


def expand_braces(pattern: str) -> list[str]:
    """What a shell makes of 'a{08..10}b': 'a08b', 'a09b', 'a10b'; of several ranges, all pairs."""
    parts = re.split(r'\{(\d+)\.\.(\d+)\}', pattern)
    ranges = [
        [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
        for first, last in zip(parts[1::3], parts[2::3], strict=True)
    ]
    between = parts[0::3]
    return [
        ''.join(itertools.chain(*zip(between, (*numbers, ''), strict=True)))
        for numbers in itertools.product(*ranges)
    ]


def index_tar(file: str) -> list[tuple[int, int, str, int | None]]:
    """(first byte, bytes, name, label or None) of every image in a tar file."""
    images, labels = [], {}
    try:
        with tarfile.open(file, 'r:') as archive:
            for member in archive:
                if not member.isreg() or member.issparse():
                    continue
                folder, slash, base = member.name.rpartition('/')
                key, _, extension = base.partition('.')
                key = folder + slash + key
                if f'.{extension.lower()}' in EXTENSIONS:
                    images.append((key, member.offset_data, member.size, member.name))
                elif extension == 'cls':
                    labels[key] = int(archive.extractfile(member).read(20))
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise UserError(f'{file} is no whole, uncompressed tar file of images ({error})') from error
    size = Path(file).stat().st_size
    if images and images[-1][1] + images[-1][2] > size:
        raise UserError(f'{file} ends in the middle of {images[-1][3]}; copy it again')
    return [(start, count, name, labels.get(key)) for key, start, count, name in images]


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
        """int32 (len,), or None if the dataset has no class label."""
        if self._labels is None and self.label_key is not None:
            found = [self._feature(i, self.label_key).int64_list for i in range(len(self))]
            self._labels = np.array([values.value[0] for values in found], np.int32)
        return self._labels

    def read(self, index: int) -> bytes:
        """The encoded image of an example."""
        return self._feature(index, self.image_key).bytes_list.value[0]

    def _feature(self, index: int, key: str):
        import tensorflow as tf  # slow to load, and only this kind of source needs it

        return tf.train.Example.FromString(super().read(index)).features.feature[key]


def open_tfds(spec: str, cache_dir: str | None) -> TfdsSource:
    """A dataset that tfds has prepared as TFRecord files: 'name[:split][?data_dir=/path]'.

    The split is 'train' unless given and may be a slice, as 'train[:10%]'. Nothing is downloaded.

    Raises:
      UserError: the dataset is unknown or not prepared, has no such split or no images.
    """
    import tensorflow_datasets as tfds  # slow to load, and only this kind of source needs it

    spec, options = split_options(spec, ('data_dir',))
    name, split = re.fullmatch(r'([^:]*(?::\d+\.\d+\.\d+)?)(?::(.*))?', spec).groups('train')
    data_dir = options.get('data_dir')
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, ImportError, OSError) as error:
        first = str(error).partition('\n')[0]
        raise UserError(f'tfds does not find the dataset {name!r} ({first})') from error
    if not builder.info.splits:
        raise UserError(
            f'{name} is not prepared in {builder.data_path}; run tfds build {name}, or say '
            'where it is with ?data_dir=/path'
        )
    try:
        shards = builder.info.splits[split].file_instructions
    except ValueError as error:
        raise UserError(f'{name}: {error}') from error
    if builder.info.file_format.value != 'tfrecord':
        raise UserError(f'{name} is stored as {builder.info.file_format.value}, not as tfrecord')
    features = dict(builder.info.features)
    image_key = _first(features, tfds.features.Image)
    label_key = _first(features, tfds.features.ClassLabel)
    if image_key is None:
        raise UserError(f'{name} has no images; its features are {", ".join(features)}')
    files = [str(shard.filename) for shard in shards]

    def build():
        return [index_records(file) for file in files], files

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
    class_names = features[label_key].names if label_key else None
    return TfdsSource(
        files, np.array(ranges, np.int64).reshape(-1, 3), names, image_key, label_key, class_names
    )


def _first(features: dict, kind: type) -> str | None:
    return next((key for key, feature in features.items() if isinstance(feature, kind)), None)


def index_records(file: str) -> Sequence[tuple[int, int]]:
    """(first byte, bytes) of every whole record of a TFRecord file.

    A record is its length (8 bytes), the length's checksum (4), its data, the data's checksum (4).
    """
    entries = []
    try:
        size = Path(file).stat().st_size
        with Path(file).open('rb', buffering=0) as stream:
            at = 0
            while at + 16 <= size:
                stream.seek(at)
                (count,) = struct.unpack('<Q', stream.read(8))
                if at + 16 + count > size:
                    break
                entries.append((at + 12, count))
                at += 16 + count
    except OSError as error:
        raise UserError(f'{file} cannot be read ({error.strerror})') from error
    return entries
