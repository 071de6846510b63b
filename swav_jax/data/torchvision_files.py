"""The data sets that torchvision downloads, read from its files without torchvision."""

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swav_jax.data.images import ArraySource
from swav_jax.errors import UserError

FASHION_CLASSES = (
    'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
    'Ankle boot',
)  # fmt: skip
DIGITS = tuple('0123456789')
Found = tuple[np.ndarray, np.ndarray | None, Any]  # images (N, H, W, C), labels (N,), class names


class DataSet(NamedTuple):
    """How to read one of torchvision's data sets: its splits, and its reader."""

    splits: tuple[str, ...]
    read: Callable[[Path, str], Found]


def open_torchvision(spec: str) -> ArraySource:
    """'NAME:/path[:split]', where /path is the `root` that torchvision was given.

    Raises:
      UserError: an unknown name, or files that are missing or damaged.
    """
    name, _, path = spec.partition(':')
    if name not in DATA_SETS:
        raise UserError(f'{name!r} is not known; use torchvision:NAME:/path with one of '
                        f'{", ".join(DATA_SETS)}')  # fmt: skip
    splits, read = DATA_SETS[name]
    split = splits[0]
    if path.rpartition(':')[2] in splits:
        path, _, split = path.rpartition(':')
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(
            f'there is no folder {root}; write torchvision:{name}:/path, or with one of the splits '
            f'{", ".join(splits)} as torchvision:{name}:/path:{splits[-1]}'
        )
    try:
        images, labels, class_names = read(root, split)
    except OSError as error:
        raise UserError(
            f'{error.filename} cannot be read ({error.strerror}); have torchvision download {name} '
            f'to {root}, or name the folder that it was downloaded to'
        ) from error
    except (ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f'the files of {name} in {root} are damaged ({error})') from error
    return ArraySource(f'{name}:{split}', images, labels, class_names)


def read_cifar10(root: Path, split: str) -> Found:
    """Pickles of {b'data': (10000, 3·32·32), b'labels': list}."""
    folder = root / 'cifar-10-batches-py'
    names = ['test_batch'] if split == 'test' else [f'data_batch_{i}' for i in range(1, 6)]
    batches = [load_arrays(folder / name) for name in names]
    images = np.concatenate([batch['data'] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([batch['labels'] for batch in batches])
    class_names = load_arrays(folder / 'batches.meta')['label_names']
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels, class_names


class ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and Python's own containers, and refuses to call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """The few things that a pickled array names; a pickle of anything else raises."""
        match module.replace('numpy._core', 'numpy.core'), name:
            case 'numpy.core.multiarray', '_reconstruct':
                return lambda kind, shape, code: np.ndarray(0, np.uint8)
            case 'numpy', 'ndarray':
                return np.ndarray
            case 'numpy', 'dtype':
                return lambda name, align, copy: np.dtype(name)  # the flags are integers of old
            case '_codecs', 'encode':  # how Python 3 writes bytes into old pickles
                return lambda text, _: text.encode('latin1')
        raise pickle.UnpicklingError(f'it names {module}.{name}, which no array needs')


def load_arrays(path: Path) -> dict[str, Any]:
    """The dictionary of a pickle that holds arrays, numbers, text, lists and dictionaries alone."""
    with path.open('rb') as file:
        content = ArrayUnpickler(file, encoding='latin1').load()
    return {key.decode() if isinstance(key, bytes) else key: x for key, x in content.items()}


def read_stl10(root: Path, split: str) -> Found:
    """Raw bytes (N, 3, 96, 96), each plane stored column by column; labels from 1."""
    folder = root / 'stl10_binary'
    images = np.fromfile(folder / f'{split}_X.bin', np.uint8).reshape(-1, 3, 96, 96)
    labels = class_names = None
    if split != 'unlabeled':
        labels = np.fromfile(folder / f'{split}_y.bin', np.uint8).astype(np.int32) - 1
        class_names = (folder / 'class_names.txt').read_text().split()
    return np.ascontiguousarray(images.transpose(0, 3, 2, 1)), labels, class_names


def read_svhn(root: Path, split: str) -> Found:
    """MATLAB files of X (32, 32, 3, N) and y (N, 1), in which 10 stands for the digit 0."""
    from scipy.io import loadmat  # slow to load, and only this data set needs it

    path = root / f'{split}_32x32.mat'
    with path.open('rb') as file:
        content = loadmat(file)
    labels = content['y'].reshape(-1).astype(np.int32) % 10
    return np.ascontiguousarray(content['X'].transpose(3, 0, 1, 2)), labels, DIGITS


def read_mnist(class_names: tuple[str, ...], folder: str) -> Callable[[Path, str], Found]:
    """A reader of IDX files, plain or gzipped, in root/`folder`/raw or in root itself."""

    def read(root: Path, split: str) -> Found:
        raw = root / folder / 'raw'
        raw = raw if raw.is_dir() else root
        prefix = 't10k' if split == 'test' else 'train'
        images = read_idx(raw / f'{prefix}-images-idx3-ubyte', 3)
        return images[..., None], read_idx(raw / f'{prefix}-labels-idx1-ubyte', 1), class_names

    return read


def read_idx(path: Path, rank: int) -> np.ndarray:
    """A uint8 array in LeCun's IDX format: 0, 0, type, rank, sizes as big-endian int32, bytes."""
    zipped = path.with_name(path.name + '.gz')
    data = gzip.decompress(zipped.read_bytes()) if zipped.is_file() else path.read_bytes()
    if data[:4] != bytes((0, 0, 8, rank)):
        raise ValueError(f'{path.name} is no IDX file of bytes with {rank} dimensions')
    shape = np.frombuffer(data, '>i4', rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


DATA_SETS = {
    'CIFAR10': DataSet(('train', 'test'), read_cifar10),
    'STL10': DataSet(('train', 'test', 'unlabeled'), read_stl10),
    'SVHN': DataSet(('train', 'test', 'extra'), read_svhn),
    'MNIST': DataSet(('train', 'test'), read_mnist(DIGITS, 'MNIST')),
    'FashionMNIST': DataSet(('train', 'test'), read_mnist(FASHION_CLASSES, 'FashionMNIST')),
}
