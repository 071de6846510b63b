"""The kinds of storage: arrays in memory, one file an image, byte ranges of large files.

Nothing here decodes an image or imports TensorFlow.
"""

import abc
import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class Source(abc.ABC):
    """Images by number, 0 … len - 1.

    Attributes:
      class_names: the name of each label, or None.
    """

    def __init__(self, labels: np.ndarray | None = None, class_names: Sequence[str] | None = None):
        self._labels = None if labels is None else np.asarray(labels, np.int32)
        self.class_names = None if class_names is None else list(class_names)

    @property
    def labels(self) -> np.ndarray | None:
        """int32 (len,), or None where nothing is known about the images."""
        return self._labels

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

    def _select(self, indices: np.ndarray) -> None:
        self.ranges = self.ranges[indices]
        self.names = [self.names[i] for i in indices]
