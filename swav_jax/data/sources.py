"""What images there are: a source gives every image a number, a name, its bytes and its label.

A source is named by one string, `config.data.source`:

    demo, demo:test      the embedded subset of Fashion-MNIST: 10,000 and 2,000 images of 28×28
    folder:/path         class folders, numbered as torchvision's ImageFolder numbers them, or a
                         flat folder of images

Nothing here decodes an image or imports TensorFlow; `pipeline` does both.
"""

import abc
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from swav_jax.errors import UserError

EXTENSIONS = (
    '.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp', '.ppm', '.pgm', '.tif', '.tiff',
)  # fmt: skip

DEMO_FILE = Path(__file__).parent / 'fashion_mnist' / 'fashion_mnist.npz'
DEMO_CLASSES = (
    'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
    'Ankle boot',
)  # fmt: skip


class Source(abc.ABC):
    """Images by number, 0 … len - 1.

    Attributes:
      labels: int32 (len,), or None where nothing is known about the images.
      class_names: the name of each label, or None.
    """

    def __init__(self, labels: np.ndarray | None, class_names: Sequence[str] | None):
        self.labels = None if labels is None else np.asarray(labels, np.int32)
        self.class_names = None if class_names is None else list(class_names)

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """The path of an image, or another text that finds it again."""

    @abc.abstractmethod
    def read(self, index: int) -> bytes | np.ndarray:
        """An encoded file's bytes, or a uint8 (height, width, channels) array.

        Raises:
          OSError: if the file is gone or cannot be read.
        """

    @abc.abstractmethod
    def take(self, indices: np.ndarray) -> 'Source':
        """The source of these images alone, in this order."""


class ArraySource(Source):
    """Images of one size that are held in memory: uint8 (N, height, width, channels)."""

    def __init__(self, label: str, images: np.ndarray, labels=None, class_names=None, ids=None):
        super().__init__(labels, class_names)
        self.label = label
        self.images = images
        self.ids = np.arange(len(images)) if ids is None else ids

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """See `Source`."""
        return f'{self.label}[{self.ids[index]}]'

    def read(self, index: int) -> np.ndarray:
        """See `Source`."""
        return self.images[index]

    def take(self, indices: np.ndarray) -> 'ArraySource':
        """See `Source`."""
        labels = None if self.labels is None else self.labels[indices]
        return ArraySource(
            self.label, self.images[indices], labels, self.class_names, self.ids[indices]
        )


class FileSource(Source):
    """One file an image."""

    def __init__(self, paths: Sequence[str], labels=None, class_names=None):
        super().__init__(labels, class_names)
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """See `Source`."""
        return self.paths[index]

    def read(self, index: int) -> bytes:
        """See `Source`."""
        return Path(self.paths[index]).read_bytes()

    def take(self, indices: np.ndarray) -> 'FileSource':
        """See `Source`."""
        labels = None if self.labels is None else self.labels[indices]
        return FileSource([self.paths[i] for i in indices], labels, self.class_names)


def open_source(
    spec: str, *, limit: int = 0, channels: int, cache_dir: str | None = None
) -> Source:
    """Opens the images that `spec` (the module's docstring lists the forms) stands for.

    Args:
      spec: `config.data.source`.
      limit: use this many images, spread evenly over the source (0: all of them), so that a
        folder's classes stay represented.
      channels: channels that the run works with.
      cache_dir: where listings of large folders are kept between runs (None: nowhere).

    Raises:
      UserError: for an unknown form, a path that does not exist, or a source without images.
    """
    kind, _, rest = spec.partition(':')
    if kind not in OPENERS:
        raise UserError(
            f'config.data.source={spec!r} is not known; use one of {", ".join(sorted(OPENERS))}, '
            "as in 'demo' or 'folder:/path/to/images'"
        )
    source = OPENERS[kind](rest)
    if limit < 0:
        raise UserError(f'config.data.limit={limit} must be 0 (all images) or more')
    if 0 < limit < len(source):
        source = source.take(np.arange(limit) * len(source) // limit)
    return source


def open_demo(split: str) -> Source:
    """The embedded Fashion-MNIST: `''` is its training split, `'test'` its test split."""
    split = split or 'train'
    if split not in ('train', 'test'):
        raise UserError(f"config.data.source='demo:{split}': use 'demo' or 'demo:test'")
    with np.load(DEMO_FILE, allow_pickle=False) as file:
        images, labels = file[f'{split}_images'], file[f'{split}_labels']
    return ArraySource(f'demo:{split}', images[..., None], labels, DEMO_CLASSES)


def open_folder(path: str) -> Source:
    """A folder of class folders (searched at any depth), or else a flat folder of images."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"config.data.source='folder:{path}': there is no folder {root}")
    class_names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    paths, labels = [], []
    for label, name in enumerate(class_names):
        found = list_images(root / name)
        paths += found
        labels += [label] * len(found)
    if paths:
        return FileSource(paths, np.array(labels, np.int32), class_names)
    paths = sorted(e.path for e in os.scandir(root) if e.is_file() and is_image(e.name))
    if not paths:
        raise UserError(
            f"config.data.source='folder:{path}': no images in {root} or below (looked for "
            f'{" ".join(EXTENSIONS)}); point it at a folder of images or of class folders'
        )
    return FileSource(paths)


def list_images(root: Path) -> list[str]:
    """Every image below `root`, in ImageFolder's order: sorted folders, then sorted names."""
    return [
        os.path.join(folder, name)  # noqa: PTH118 (a million Path objects are slow)
        for folder, _, names in sorted(os.walk(root, followlinks=True))
        for name in sorted(names)
        if is_image(name)
    ]


def is_image(name: str) -> bool:
    """Whether a file's name ends like an image's, in any case."""
    return name.lower().endswith(EXTENSIONS)


OPENERS: dict[str, Callable[[str], Source]] = {
    'demo': open_demo,
    'folder': open_folder,
}
