"""Where images are stored: arrays in memory, one file per image, byte ranges of large files.

Nothing here decodes an image or imports TensorFlow.
"""

import abc
import copy
import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from swav_jax.files import open_regular, read_regular

MAX_FILE_BYTES = 2**29  # of one image
SAMPLED = 256  # bytes of an image that stand for its content
READERS = 32  # threads, because a network file system answers slowly


class Source(abc.ABC):
    """Images by number, 0 … len - 1.

    A kind of storage names in `PER_IMAGE` its attributes with one entry per image.

    Args:
      labels: (len,) whole numbers, -1 where the class is unknown; None for no labels.
      class_names: names of the labels 0, 1, …; None where labels are ids of any kind.
      notes: lines for the user, such as what was left out and why.

    Raises:
      ValueError: labels are not whole numbers of 64 bits, or one has no name.

    Attributes:
      class_names: the name of each label, an id's digits where there are no names; None without
        labels.
      class_ids: (C,) the numbers that the data use for the classes: 0, 1, … or the ids.
    """

    PER_IMAGE: tuple[str, ...] = ()

    def __init__(
        self,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        notes: Sequence[str] = (),
    ):
        self._labels, self.class_names, self.class_ids = _number_classes(labels, class_names)
        self.notes = tuple(notes)

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """The path of an image, or another text that identifies it."""

    @abc.abstractmethod
    def read(self, index: int) -> bytes | np.ndarray:
        """The bytes of an image file, or a uint8 (height, width, channels) array.

        Raises:
          OSError: the file is missing or cannot be read.
        """

    def extent(self, index: int) -> tuple[str, int, int] | None:
        """(path, first byte, bytes) of a stored image; None for one in memory.

        Raises:
          OSError: the file is missing or is not a regular file.
        """
        return None

    def _identity(self) -> Iterator[bytes]:
        """What distinguishes these images from others: the names, unless there is more."""
        yield _join(map(self.name, range(len(self))))

    @property
    def labels(self) -> np.ndarray | None:
        """int32 (len,) indices into `class_names`, -1 where unknown; None where all are."""
        return self._labels

    def label_ids(self) -> np.ndarray | None:
        """(len,) `labels` as the data have them: `class_ids`, -1 where unknown."""
        labels = self.labels
        if labels is None:
            return None
        ids = self.class_ids[labels]
        if (labels < 0).any():  # never together with ids above int64
            ids[labels < 0] = -1
        return ids

    def digest(self, *, labels: bool = False, contents: bool = False) -> str:
        """Which images these are, and in which order, in 16 hexadecimal digits.

        Two sources with the same digest have the same names, byte ranges or, in memory, pixels.
        Names count from the folder of the source on, so it may be moved.

        Args:
          labels: whether labels and class names count, too.
          contents: whether contents count, too: of each file its size and a few bytes from its
            middle, which differ between compressed images.
        """
        digest = hashlib.sha256()
        for part in self._identity():
            digest.update(part)
        if labels and self.labels is not None:
            digest.update(np.int32(self.labels).tobytes())
            digest.update('\0'.join(self.class_names).encode('utf-8', 'surrogatepass'))
        if contents:
            with ThreadPoolExecutor(READERS) as readers:
                for first in range(0, len(self), 4096):
                    rows = range(first, min(first + 4096, len(self)))
                    digest.update(b''.join(readers.map(self._sample, rows)))
        return digest.hexdigest()[:16]

    def _sample(self, index: int) -> bytes:
        """A few bytes of a stored image."""
        try:
            extent = self.extent(index)
            if extent is None:
                return b''
            path, start, count = extent
            with open_regular(path) as file:
                return b'%d %s\0' % (count, os.pread(file.fileno(), SAMPLED, start + count // 2))
        except OSError:
            return b'\0'

    def take(self, indices: Sequence[int] | np.ndarray) -> 'Source':
        """The source of these images only, in this order."""
        indices = np.asarray(indices, np.int64)
        taken = copy.copy(self)
        if taken._labels is not None:
            taken._labels = taken._labels[indices]
        for attribute in self.PER_IMAGE:
            entries = getattr(self, attribute)
            is_array = isinstance(entries, np.ndarray)
            chosen = entries[indices] if is_array else [entries[i] for i in indices]
            setattr(taken, attribute, chosen)
        return taken

    def relabel(self, labels: np.ndarray, class_names: list[str]) -> 'Source':
        """The same images with other labels: int32 (len,) indices into `class_names`, or -1."""
        relabelled = copy.copy(self)
        relabelled._labels, relabelled.class_names = labels, class_names
        relabelled.class_ids = np.arange(len(class_names))
        return relabelled


class ArraySource(Source):
    """Images of one size in memory: uint8 (N, height, width, channels)."""

    PER_IMAGE = ('images', 'numbers')

    def __init__(self, title: str, images: np.ndarray, labels=None, class_names=None):
        super().__init__(labels, class_names)
        self.title = title
        self.images = images
        self.numbers = np.arange(len(images))  # in the whole set, which `take` keeps

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """The title, and the image's number in the whole set."""
        return f'{self.title}[{self.numbers[index]}]'

    def read(self, index: int) -> np.ndarray:
        """The image itself."""
        return self.images[index]

    def _identity(self) -> Iterator[bytes]:
        yield repr(self.images.shape).encode()
        yield from map(np.ascontiguousarray, self.images)


class FileSource(Source):
    """One file per image.

    Args:
      paths: of the files.
      labels, class_names, notes: see `Source`.
      root: the beginning of paths that `digest` leaves out.
    """

    PER_IMAGE = ('paths',)

    def __init__(
        self, paths: Sequence[str], labels=None, class_names=None, notes=(), *, root: str = ''
    ):
        super().__init__(labels, class_names, notes)
        self.paths = paths
        self.root = root

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The file's path."""
        return self.paths[index]

    def read(self, index: int) -> bytes:
        """The whole file.

        Raises:
          OSError: it cannot be read, is not a regular file, such as a pipe, or is too large.
        """
        return read_regular(self.paths[index], MAX_FILE_BYTES)

    def extent(self, index: int) -> tuple[str, int, int]:
        """The whole file; see `Source.extent`."""
        path = self.paths[index]
        status = os.stat(path)  # noqa: PTH116 (a Path takes longer than the call)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, 'it is not a regular file', path)
        return path, 0, status.st_size

    def _identity(self) -> Iterator[bytes]:
        yield _join(path.removeprefix(self.root) for path in self.paths)


class RangeSource(Source):
    """Images one after another in large files: tar shards, record files.

    Args:
      files: paths.
      ranges: int64 (N, 3): the file's number, the first byte, the number of bytes.
      names: of the images inside their files.
      labels, class_names, notes: see `Source`.
    """

    PER_IMAGE = ('ranges', 'names')

    def __init__(
        self,
        files: Sequence[str],
        ranges: np.ndarray,
        names: Sequence[str],
        labels=None,
        class_names=None,
        notes=(),
    ):
        super().__init__(labels, class_names, notes)
        self.files, self.ranges, self.names = files, ranges, names

    def __len__(self) -> int:
        return len(self.ranges)

    def name(self, index: int) -> str:
        """The large file's path, and the image's name in it."""
        return f'{self.files[self.ranges[index, 0]]}/{self.names[index]}'

    def read(self, index: int) -> bytes:
        """The bytes of the range."""
        path, start, count = self.extent(index)
        with open_regular(path) as file:
            file.seek(start)
            data = file.read(count)
        if len(data) < count:
            raise OSError(errno.EIO, 'it became shorter', path)
        return data

    def extent(self, index: int) -> tuple[str, int, int]:
        """The range; see `Source.extent`."""
        number, start, count = self.ranges[index].tolist()
        return self.files[number], start, count

    def _identity(self) -> Iterator[bytes]:
        yield _join(os.path.basename(file) for file in self.files)  # noqa: PTH119
        yield _join(self.names)
        yield np.ascontiguousarray(self.ranges).tobytes()


def _join(names: Iterable[str]) -> bytes:
    return '\0'.join(names).encode('utf-8', 'surrogatepass') + b'\0\0'


def _number_classes(
    labels: np.ndarray | None, class_names: Sequence[str] | None
) -> tuple[np.ndarray | None, list[str] | None, np.ndarray | None]:
    """`Source`'s labels, class_names and class_ids."""
    if labels is None:
        return None, None, None
    labels = np.asarray(labels)
    if labels.size and labels.dtype.kind not in 'iu':
        raise ValueError(f'labels must be whole numbers of 64 bits, not {labels.dtype}')
    known = labels != -1
    if not known.any():
        return None, None, None
    if class_names is None:
        ids, numbers = np.unique(labels[known], return_inverse=True)
        numbered = np.full(len(labels), -1, np.int32)
        numbered[known] = numbers
        # An unsigned type has no -1 for images of an unknown class.
        fits = ids[-1] <= np.iinfo(np.int64).max
        return numbered, [str(i) for i in ids], ids.astype(np.int64) if fits else ids
    outside = known & ((labels < 0) | (labels >= len(class_names)))
    if outside.any():
        raise ValueError(
            f'image {outside.argmax()} has the label {labels[outside][0]}, but there are '
            f'{len(class_names)} classes'
        )
    return labels.astype(np.int32), list(class_names), np.arange(len(class_names))
