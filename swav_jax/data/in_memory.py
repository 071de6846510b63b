"""Images that a program holds in memory, in the forms that are common in notebooks."""

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from swav_jax.data.images import ArraySource, FileSource, Source
from swav_jax.data.sources import KINDS
from swav_jax.errors import UserError, printable

FORMS = (
    'give a path, the bytes of an image file, a PIL image or a uint8 array (height, width) or '
    '(height, width, channels), or a list of them, or a uint8 array (N, height, width, channels)'
)


class ItemSource(Source):
    """One object per image: a path, the bytes of a file, a PIL image, a uint8 array."""

    PER_IMAGE = ('items', 'numbers')

    def __init__(self, items: Sequence[str | bytes | Image.Image | np.ndarray]):
        super().__init__()
        self.items, self.numbers = items, np.arange(len(items))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        """The path, or the image's number."""
        item = self.items[index]
        return item if isinstance(item, str) else f'images[{self.numbers[index]}]'

    def read(self, index: int) -> bytes | Image.Image:
        """The bytes of a file, or a loaded PIL image."""
        item = self.items[index]
        if isinstance(item, str):
            return FileSource([item]).read(0)
        if isinstance(item, bytes):
            return item
        if isinstance(item, np.ndarray):
            return Image.fromarray(item[..., 0] if item.shape[-1] == 1 else item)
        with self._lock:  # one image may be in the list twice, and PIL loads it in place
            item.load()
        return item


def open_images(images: Any, channels: int) -> Source:
    """The source of one image, or of several.

    Args:
      images: one image, or an iterable of images: a path; the bytes of an image file; a PIL image;
        anything that numpy reads as a uint8 array (height, width) or (height, width, channels).
        Or uint8 (N, height, width, channels) or, of gray images, (N, height, width). The last axis
        of an array holds channels if its length is 1, 3, 4 or `channels`.
      channels: `config.data.channels`; images have as many or can be converted.

    Raises:
      UserError: it is something else, or nothing.
    """
    if _is_array(images):
        images = _array(images, 'images')
        if images.dtype.kind not in 'OUS':
            return ArraySource('images', _batch(images, channels))
        images = images.ravel().tolist()
    elif isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
        images = [images]
    elif isinstance(images, Mapping | set | frozenset | Source) or not isinstance(images, Iterable):
        raise UserError(f'images are of type {type(images).__name__}: {FORMS}')
    _refuse_file(images, 'images')
    items = [_item(item, f'images[{i}]', channels) for i, item in enumerate(images)]
    if not items:
        raise UserError(f'there are no images: {FORMS}')
    if all(isinstance(item, str) for item in items):
        return FileSource(items)
    if len({item.shape if isinstance(item, np.ndarray) else None for item in items}) == 1:
        if isinstance(items[0], np.ndarray):
            return ArraySource('images', np.stack(items))
    elif channels not in (1, 3):
        raise UserError(f'images of {channels} channels must be arrays of one size')
    return ItemSource(items)


def _is_array(value: Any) -> bool:
    return hasattr(value, '__array__') and not isinstance(value, Image.Image)


def _array(value: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:  # on another device, for example; each library has its own
        reason = printable(str(error).strip().partition('\n')[0])
        raise UserError(f'{name} are not an array that numpy can read: {reason}') from error


def _item(item: Any, name: str, channels: int) -> str | bytes | Image.Image | np.ndarray:
    """One image of a list."""
    if isinstance(item, str | os.PathLike):
        path = os.fsdecode(os.path.expanduser(item))  # noqa: PTH111 (bytes and surrogates, too)
        kind, colon, _ = path.partition(':')
        is_spec = colon and kind in KINDS and not os.path.exists(path)  # noqa: PTH110
        if is_spec or os.path.isdir(path):  # noqa: PTH112 (of a path too long: False)
            spec = path if is_spec else f'folder:{path}'
            raise UserError(
                f'{printable(path)} is not an image file: use extract({printable(spec)!r})'
            )
        return path
    if isinstance(item, bytes | bytearray | memoryview):
        return bytes(item)
    if isinstance(item, Image.Image):
        return item
    if not _is_array(item):
        _refuse_file(item, name)
        raise UserError(f'{name} is of type {type(item).__name__}: {FORMS}')
    array = _array(item, name)
    if array.ndim == 2:
        array = array[..., None]
    return _checked(array, name, channels, 3)


def _refuse_file(value: Any, name: str) -> None:
    """Refuse an open file, whose lines would count as images."""
    if hasattr(value, 'read'):
        kind = type(value).__name__
        raise UserError(f'{name} is an open file ({kind}): give its path or its bytes')


def _batch(images: np.ndarray, channels: int) -> np.ndarray:
    """(N, height, width, channels) of an array of one or of several images."""
    what = f'images are {images.dtype}{list(images.shape)}'
    if images.ndim == 3 and images.shape[-1] in {1, 3, 4, channels}:
        images = images[None]
    elif images.ndim == 3 and images.shape[0] == channels == 3:
        raise UserError(
            f'{what}: for one image move its channels last (height, width, 3); for three gray ones '
            'add an axis (3, height, width, 1)'
        )
    elif images.ndim == 3 and images.shape[-1] == 2:
        raise UserError(
            f'{what}: one image of two channels, or gray ones of two columns? Give one image 1, 3 '
            'or 4 channels, or add an axis to gray ones, images[..., None]'
        )
    elif images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 2:
        images = images[None, ..., None]
    return _checked(images, 'images', channels, 4)


def _checked(images: np.ndarray, name: str, channels: int, ndim: int) -> np.ndarray:
    """An array with its channels last, of which there are then 1 or 3 or `channels`."""
    what = f'{name} {"are" if ndim == 4 else "is"} {images.dtype}{list(images.shape)}'
    if images.dtype != np.uint8:
        raise UserError(
            f'{what}: give uint8, levels 0 to 255 (of numbers from 0 to 1 np.uint8(255 * x + 0.5))'
        )
    if images.ndim != ndim or 0 in images.shape:
        raise UserError(f'{what}: {FORMS}')
    have = images.shape[-1]
    if have == channels:
        return images
    if channels in (1, 3) and have in (1, 3, 4):
        return images[..., :3]  # RGBA without A, like PIL converts
    if images.shape[-3] in {1, 3, 4, channels}:
        raise UserError(f'{what}, channels first: move them last, np.moveaxis(x, -3, -1)')
    allowed = '1, 3 or 4' if channels in (1, 3) else channels
    raise UserError(f'{what}, {have} channels: give images of {allowed}, (height, width, channels)')
