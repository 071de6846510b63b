"""The kinds of storage: arrays in memory, one file an image, byte ranges of large files.

Nothing here decodes an image or imports TensorFlow.
"""

import abc
import copy
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from swav_jax.data.regular import open_regular, read_regular

MAX_FILE_BYTES = 2**29  # of one image
SAMPLED = 256  # bytes of an image that stand for its content
READERS = 32  # threads, as a network file system answers slowly


class Source(abc.ABC):
    """Images by number, 0 … len - 1.

    Args:
      labels: (len,) whole numbers, -1 where the class is not known; None of images without labels.
      class_names: what labels 0, 1, … are called; None where labels are ids of any kind.
      notes: see below.

    Attributes:
      class_names: the name of each label, that of an id being its digits; None without labels.
      class_ids: (C,) what the data call the classes: 0, 1, … where they have names, else the ids.
      notes: lines for the user, such as what was left out and why.
    """

    def __init__(
        self,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        notes: Sequence[str] = (),
    ):
        self._labels = self.class_names = self.class_ids = None
        self.notes = tuple(notes)
        if labels is not None:
            self._labels, self.class_names, self.class_ids = number_classes(labels, class_names)

    @property
    def labels(self) -> np.ndarray | None:
        """int32 (len,) indices of `class_names`, -1 where not known; None where none is."""
        return self._labels

    def label_ids(self) -> np.ndarray | None:
        """(len,) `labels` as the data have them: `class_ids`, -1 where not known."""
        labels = self.labels
        if labels is None:
            return None
        ids = self.class_ids[labels]
        if (labels < 0).any():  # ids above int64 never come with these
            ids[labels < 0] = -1
        return ids

    def digest(self, *, labels: bool = False, contents: bool = False) -> str:
        """Which images these are and in which order, in 16 hexadecimal digits.

        Two sources with the same digest have the same names, byte ranges or, in memory, pixels.
        Names count below the folder that was named: where it lies does not.

        Args:
          labels: whether labels and the names of the classes count, too.
          contents: whether the images themselves count: of each file its size, and a few bytes from
            its middle, which tell compressed images apart.
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
        """Some bytes of an image that tell it from others; none where it cannot be read."""
        return b''

    def _identity(self) -> Iterator[bytes]:
        """What tells these images from others; the names, unless there is more."""
        yield _join(map(self.name, range(len(self))))

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """The path of an image, or another text that finds it again."""

    @abc.abstractmethod
    def read(self, index: int) -> bytes | np.ndarray:
        """An image file's bytes, or a uint8 (height, width, channels) array.

        Raises:
          OSError: the file is gone or cannot be read.
        """

    @abc.abstractmethod
    def _select(self, indices: np.ndarray) -> None:
        """Keep only these images, in this order."""

    def take(self, indices: Sequence[int] | np.ndarray) -> 'Source':
        """The source of these images alone, in this order."""
        indices = np.asarray(indices, np.int64)
        taken = copy.copy(self)
        if taken._labels is not None:
            taken._labels = taken._labels[indices]
        taken._select(indices)
        return taken

    def relabel(self, labels: np.ndarray, class_names: list[str]) -> 'Source':
        """The same images with other labels: int32 (len,) indices of `class_names`, -1 unknown."""
        relabelled = copy.copy(self)
        relabelled._labels, relabelled.class_names = labels, class_names
        relabelled.class_ids = np.arange(len(class_names))
        return relabelled


class ArraySource(Source):
    """Images of one size, held in memory: uint8 (N, height, width, channels)."""

    def __init__(self, title: str, images: np.ndarray, labels=None, class_names=None):
        super().__init__(labels, class_names)
        self.title = title
        self.images = images
        self.numbers = np.arange(len(images))  # in the whole set, which `take` keeps

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """The set's title and the image's number in it."""
        return f'{self.title}[{self.numbers[index]}]'

    def read(self, index: int) -> np.ndarray:
        """The image itself."""
        return self.images[index]

    def _identity(self) -> Iterator[bytes]:
        yield repr(self.images.shape).encode()
        yield from map(np.ascontiguousarray, self.images)

    def _select(self, indices: np.ndarray) -> None:
        self.images, self.numbers = self.images[indices], self.numbers[indices]


class FileSource(Source):
    """One file an image.

    Args:
      paths: of the files.
      labels, class_names, notes: see `Source`.
      root: what all or some paths begin with and what counts for nothing in `digest`.
    """

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
          OSError: see `Source.read`; or it is no regular file, such as a pipe, or too large.
        """
        return read_regular(self.paths[index], MAX_FILE_BYTES)

    def _identity(self) -> Iterator[bytes]:
        yield _join(path.removeprefix(self.root) for path in self.paths)

    def _sample(self, index: int) -> bytes:
        return _sample(self.paths[index])

    def _select(self, indices: np.ndarray) -> None:
        self.paths = [self.paths[i] for i in indices]


class RangeSource(Source):
    """Images that lie one after another in large files: tar shards, record files.

    Args:
      files: paths.
      ranges: int64 (N, 3) of the file's number, the first byte and the number of bytes.
      names: what each image is called inside its file.
      labels, class_names, notes: see `Source`.
    """

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
        number, start, count = self.ranges[index]
        with open_regular(self.files[number]) as file:
            file.seek(start)
            data = file.read(count)
        if len(data) < count:
            raise OSError(errno.EIO, 'it became shorter', self.files[number])
        return data

    def _identity(self) -> Iterator[bytes]:
        yield _join(os.path.basename(file) for file in self.files)  # noqa: PTH119
        yield _join(self.names)
        yield np.ascontiguousarray(self.ranges).tobytes()

    def _sample(self, index: int) -> bytes:
        number, start, count = self.ranges[index].tolist()
        return _sample(self.files[number], start, count)

    def _select(self, indices: np.ndarray) -> None:
        self.ranges = self.ranges[indices]
        self.names = [self.names[i] for i in indices]


def _sample(path: str, start: int = 0, count: int | None = None) -> bytes:
    try:
        with open_regular(path) as file:
            count = os.fstat(file.fileno()).st_size if count is None else count
            return b'%d %s\0' % (count, os.pread(file.fileno(), SAMPLED, start + count // 2))
    except OSError:
        return b'\0'


def _join(names: Iterable[str]) -> bytes:
    return '\0'.join(names).encode('utf-8', 'surrogatepass') + b'\0\0'


def number_classes(
    labels: np.ndarray, class_names: Sequence[str] | None
) -> tuple[np.ndarray | None, list[str] | None, np.ndarray | None]:
    """Labels as indices of class names: see `Source` for arguments, `labels` and `class_ids`.

    Raises:
      ValueError: the labels are no whole numbers of 64 bits, or one has no name.
    """
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
        # An unsigned type has no -1 for images whose class is not known.
        fits = ids[-1] <= np.iinfo(np.int64).max
        return numbered, [str(i) for i in ids], ids.astype(np.int64) if fits else ids
    outside = known & ((labels < 0) | (labels >= len(class_names)))
    if outside.any():
        raise ValueError(
            f'image {outside.argmax()} has the label {labels[outside][0]}, but there are '
            f'{len(class_names)} classes'
        )
    return labels.astype(np.int32), list(class_names), np.arange(len(class_names))
