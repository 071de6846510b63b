"""The kinds of storage: arrays in memory, one file an image, byte ranges of large files.

Nothing here decodes an image or imports TensorFlow.
"""

import abc
import copy
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np


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
        return np.append(self.class_ids, np.array(-1, self.class_ids.dtype))[labels]

    def digest(self, *, labels: bool = False) -> str:
        """Which images these are and in which order, in 16 hexadecimal digits.

        Two sources with the same digest have the same names, byte ranges or, in memory, pixels.
        Files are not read.

        Args:
          labels: whether labels and the names of the classes count, too.
        """
        digest = hashlib.sha256()
        for part in self._identity():
            digest.update(part)
        if labels and self.labels is not None:
            digest.update(np.int32(self.labels).tobytes())
            digest.update('\0'.join(self.class_names).encode('utf-8', 'surrogateescape'))
        return digest.hexdigest()[:16]

    def _identity(self) -> Iterator[bytes]:
        """What tells these images from others; the names, unless there is more."""
        for i in range(len(self)):
            yield self.name(i).encode('utf-8', 'surrogateescape') + b'\0'

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
    """One file an image."""

    def __init__(self, paths: Sequence[str], labels=None, class_names=None):
        super().__init__(labels, class_names)
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The file's path."""
        return self.paths[index]

    def read(self, index: int) -> bytes:
        """The whole file."""
        return Path(self.paths[index]).read_bytes()

    def _select(self, indices: np.ndarray) -> None:
        self.paths = [self.paths[i] for i in indices]


class RangeSource(Source):
    """Images that lie one after another in large files: tar shards, record files.

    Args:
      files: paths.
      ranges: int64 (N, 3) of the file's number, the first byte and the number of bytes.
      names: what each image is called inside its file.
      labels: see `Source`.
      class_names: see `Source`.
    """

    def __init__(
        self, files: Sequence[str], ranges: np.ndarray, names, labels=None, class_names=None
    ):
        super().__init__(labels, class_names)
        self.files, self.ranges, self.names = files, ranges, names

    def __len__(self) -> int:
        return len(self.ranges)

    def name(self, index: int) -> str:
        """The large file's path, and the image's name in it."""
        return f'{self.files[self.ranges[index, 0]]}/{self.names[index]}'

    def read(self, index: int) -> bytes:
        """The bytes of the range."""
        number, start, count = self.ranges[index]
        with Path(self.files[number]).open('rb', buffering=0) as file:
            file.seek(start)
            return file.read(count)

    def _identity(self) -> Iterator[bytes]:
        yield from super()._identity()
        yield np.ascontiguousarray(self.ranges).tobytes()

    def _select(self, indices: np.ndarray) -> None:
        self.ranges = self.ranges[indices]
        self.names = [self.names[i] for i in indices]


def number_classes(
    labels: np.ndarray, class_names: Sequence[str] | None
) -> tuple[np.ndarray | None, list[str] | None, np.ndarray | None]:
    """Labels as indices of class names: see `Source` for arguments, `labels` and `class_ids`.

    Raises:
      ValueError: a label has no name.
    """
    labels = np.asarray(labels)
    known = labels != -1
    if not known.any():
        return None, None, None
    if class_names is None:
        ids, numbers = np.unique(labels[known], return_inverse=True)
        numbered = np.full(len(labels), -1, np.int32)
        numbered[known] = numbers
        return numbered, [str(i) for i in ids], ids
    outside = known & ((labels < 0) | (labels >= len(class_names)))
    if outside.any():
        raise ValueError(
            f'image {outside.argmax()} has the label {labels[outside][0]}, but there are '
            f'{len(class_names)} classes'
        )
    return labels.astype(np.int32), list(class_names), np.arange(len(class_names))
