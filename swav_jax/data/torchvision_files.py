"""The data sets that torchvision downloads, read from its files without torchvision.

Files may come from anybody: sizes are checked before memory is allocated, and pickles call nothing.
"""

import functools
import gzip
import io
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from swav_jax.data import matlab
from swav_jax.data.images import ArraySource
from swav_jax.data.names import absolute
from swav_jax.errors import UserError
from swav_jax.files import open_regular, read_regular

FASHION_CLASSES = (
    'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
    'Ankle boot',
)  # fmt: skip
DIGITS = tuple('0123456789')
MAX_UNPACKED = 2**31  # bytes; SVHN's `extra` has 1.6e9
Found = tuple[np.ndarray, np.ndarray | None, Any]  # images (N, H, W, C), labels (N,), class names


def open_torchvision(spec: str) -> ArraySource:
    """'NAME:/path[:split]', where /path is torchvision's `root`.

    Raises:
      UserError: an unknown name, or files that are missing or damaged.
    """
    name, _, path = spec.partition(':')
    if name not in DATA_SETS:
        raise UserError(
            f'{name!r} is not known; use torchvision:NAME:/path with one of {", ".join(DATA_SETS)}'
        )
    splits, read = DATA_SETS[name]
    split = splits[0]
    if path.rpartition(':')[2] in splits:
        path, _, split = path.rpartition(':')
    root = absolute(path)
    if not root.is_dir():
        raise UserError(
            f'there is no folder {root}; write torchvision:{name}:/path, or with one of the splits '
            f'{", ".join(splits)} as torchvision:{name}:/path:{splits[-1]}'
        )
    try:
        images, labels, class_names = read(root, split)
        if labels is not None and len(labels) != len(images):
            raise ValueError(f'{len(images)} images, but {len(labels)} labels')
        if not images.size:
            raise ValueError('no images')
        return ArraySource(f'{name}:{split}', images, labels, class_names)
    except Exception as error:  # a damaged file can fail in any way
        if isinstance(error, OSError) and error.filename:
            raise UserError(
                f'{error.filename} cannot be read ({error.strerror}); have torchvision download '
                f'{name} to {root}, or name the folder that it was downloaded to'
            ) from error
        raise UserError(
            f'the files of {name} in {root} are damaged ({str(error) or type(error).__name__}); '
            'have torchvision download them again'
        ) from error


def _read_cifar10(root: Path, split: str) -> Found:
    """Pickles of {b'data': (10000, 3·32·32), b'labels': list}."""
    folder = root / 'cifar-10-batches-py'
    names = ['test_batch'] if split == 'test' else [f'data_batch_{i}' for i in range(1, 6)]
    images, labels = [], []
    for name in names:
        batch = _load_pickle(folder / name)
        data, numbers = batch.get('data'), batch.get('labels')
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
            raise ValueError(f'{name} has no data of bytes (N, 3072)')
        if isinstance(numbers, np.ndarray):
            numbers = numbers.reshape(-1).tolist()
        if not isinstance(numbers, list) or not all(type(x) is int and x >= 0 for x in numbers):
            raise ValueError(f'{name} has no list of labels of 0 or more')
        if len(numbers) != len(data):
            raise ValueError(f'{name} has {len(data)} images, but {len(numbers)} labels')
        images.append(data.reshape(-1, 3, 32, 32))
        labels += numbers
    class_names = _load_pickle(folder / 'batches.meta').get('label_names')
    if not isinstance(class_names, list) or not all(type(x) is str for x in class_names):
        raise ValueError('batches.meta has no list of label_names')
    images = np.concatenate(images).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int64), class_names


class _PickledArray:
    """An array of a pickle, whose state follows its creation."""

    array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:  # (version, shape, dtype, Fortran order, bytes)
        match state:
            case (1, tuple(shape), _PickledType(dtype=np.dtype() as dtype), fortran, data):
                data = data.encode('latin1') if isinstance(data, str) else data  # of Python 2
                if not isinstance(data, bytes) or any(type(n) is not int or n < 0 for n in shape):
                    raise pickle.UnpicklingError('an array of no bytes')
                flat = np.frombuffer(data, dtype)
                self.array = flat.reshape(shape, order='F' if fortran else 'C')
            case _:
                raise pickle.UnpicklingError('an array of no numbers')


class _PickledType:
    """The type of an array of whole numbers."""

    def __init__(self, name: Any, *_: Any):
        if name not in ('u1', 'i1', 'u2', 'i2', 'u4', 'i4', 'u8', 'i8'):
            raise pickle.UnpicklingError(f'an array of {name!r}, which are no whole numbers')
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:  # (version, byte order, …)
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ('<', '>', '|', '='):
            raise pickle.UnpicklingError('a type of no byte order')
        self.dtype = self.dtype.newbyteorder(state[1])


class _ArrayUnpickler(pickle._Unpickler):
    """Builds arrays of whole numbers and Python's own containers, and calls nothing else.

    It is pickle's version in Python: the one in C allocates gigabytes for a few bytes that number a
    memo, and builds real arrays, whose memory a pickle can point anywhere.
    """

    dispatch = pickle._Unpickler.dispatch

    def find_class(self, module: str, name: str) -> Any:
        match module.replace('numpy._core', 'numpy.core'), name:
            case 'numpy.core.multiarray', '_reconstruct':
                return lambda kind, shape, code: _PickledArray()
            case 'numpy', 'ndarray':
                return 'ndarray'
            case 'numpy', 'dtype':
                return lambda name, align, copy: _PickledType(name)
            case '_codecs', 'encode':  # how Python 3 writes bytes into old pickles
                return lambda text, _: text.encode('latin1')
        raise pickle.UnpicklingError(f'it names {module}.{name}, which no array needs')


def _load_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle of arrays, numbers, text, lists and dictionaries."""
    content = _ArrayUnpickler(io.BytesIO(read_regular(path)), encoding='latin1').load()
    if not isinstance(content, dict):
        raise ValueError(f'{path.name} holds no dictionary')
    keys = [key.decode() if isinstance(key, bytes) else key for key in content]
    values = [x.array if isinstance(x, _PickledArray) else x for x in content.values()]
    return dict(zip(keys, values, strict=True))


def _read_stl10(root: Path, split: str) -> Found:
    """Raw bytes (N, 3, 96, 96), each plane stored column by column; labels from 1."""
    folder = root / 'stl10_binary'
    images = np.frombuffer(read_regular(folder / f'{split}_X.bin'), np.uint8)
    images = images.reshape(-1, 3, 96, 96)
    labels = class_names = None
    if split != 'unlabeled':
        labels = np.frombuffer(read_regular(folder / f'{split}_y.bin'), np.uint8).astype(int) - 1
        class_names = read_regular(folder / 'class_names.txt').decode().split()
    return np.ascontiguousarray(images.transpose(0, 3, 2, 1)), labels, class_names


def _read_svhn(root: Path, split: str) -> Found:
    """MATLAB files of X (32, 32, 3, N) and y (N, 1), in which 10 stands for the digit 0."""
    content = matlab.load_arrays(read_regular(root / f'{split}_32x32.mat'), MAX_UNPACKED)
    for name in 'Xy':
        if name not in content:
            raise ValueError(f'{split}_32x32.mat has no array {name} of numbers')
    images, labels = content['X'], content['y'].reshape(-1)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise ValueError(f'X is {images.dtype}{list(images.shape)}, not uint8[32, 32, 3, N]')
    if not np.isin(labels, np.arange(11)).all():
        raise ValueError('y holds other labels than 1 to 10')
    return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels.astype(int) % 10, DIGITS


def _read_mnist(folder: str, class_names: tuple[str, ...], root: Path, split: str) -> Found:
    """IDX files, plain or gzipped, in root/`folder`/raw or in root itself."""
    raw = root / folder / 'raw'
    raw = raw if raw.is_dir() else root
    prefix = 't10k' if split == 'test' else 'train'
    images = _read_idx(raw / f'{prefix}-images-idx3-ubyte', 3)
    return images[..., None], _read_idx(raw / f'{prefix}-labels-idx1-ubyte', 1), class_names


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """A uint8 array in LeCun's IDX format: 0, 0, type, rank, sizes as big-endian int32, bytes."""
    zipped = path.with_name(path.name + '.gz')
    with open_regular(zipped if zipped.is_file() else path) as raw:
        file = gzip.GzipFile(fileobj=raw) if zipped.is_file() else raw
        if file.read(4) != bytes((0, 0, 8, rank)):
            raise ValueError(f'{path.name} is not an IDX file of bytes with {rank} dimensions')
        shape = struct.unpack(f'>{rank}i', file.read(4 * rank))
        if min(shape) < 0 or (count := math.prod(shape)) > MAX_UNPACKED:
            raise ValueError(f'{path.name} has the impossible size {list(shape)}')
        data = file.read(count)
        if len(data) != count or file.read(1):
            raise ValueError(f'{path.name} does not hold {list(shape)} bytes')
    return np.frombuffer(data, np.uint8).reshape(shape)


# The splits, the usual one first, and the reader of each.
DATA_SETS: dict[str, tuple[tuple[str, ...], Callable[[Path, str], Found]]] = {
    'CIFAR10': (('train', 'test'), _read_cifar10),
    'STL10': (('train', 'test', 'unlabeled'), _read_stl10),
    'SVHN': (('train', 'test', 'extra'), _read_svhn),
    'MNIST': (('train', 'test'), functools.partial(_read_mnist, 'MNIST', DIGITS)),
    'FashionMNIST': (
        ('train', 'test'),
        functools.partial(_read_mnist, 'FashionMNIST', FASHION_CLASSES),
    ),
}
