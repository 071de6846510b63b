"""Which images there are: one string, `config.data.source`, names them.

demo, demo:test          the embedded subset of Fashion-MNIST: 10,000 and 2,000 images
folder:/path             class folders, numbered as torchvision's ImageFolder numbers them, or a
                         flat folder of images (`folders.open_folder` says what is left out)
filelist:/list.txt       one path a line, or a path and its label; or VISSL's .npy of paths.
                         After a ?, joined by &: labels=/labels.npy,
                         remove_img_path_prefix=/old/, new_img_path_prefix=/new/
webdataset:/d/{000..123}.tar   tar shards of images, each with its label in a .cls file
tfds:name[:split]        a prepared TensorFlow dataset; ?data_dir=/path says where
torchvision:NAME:/path[:split]   the files of CIFAR10, STL10, SVHN, MNIST or FashionMNIST
synthetic[:COUNTxSIDE]   generated images in ten classes (default 1024x64)

A label of -1 is an unknown one in every kind. Each source says in its `notes` what was left out.
"""

import re
from pathlib import Path

import numpy as np

from swav_jax.cpu.host_memory import total_bytes
from swav_jax.data import filelists, folders, tfds, torchvision_files, webdataset
from swav_jax.data.images import ArraySource, Source
from swav_jax.errors import UserError
from swav_jax.terminal import printable

DEMO_FILE = Path(__file__).parent / 'fashion_mnist' / 'fashion_mnist.npz'
KINDS = ('demo', 'folder', 'filelist', 'webdataset', 'tfds', 'torchvision', 'synthetic')


def open_source(
    spec: str,
    *,
    limit: int = 0,
    channels: int,
    cache_dir: str | None = None,
    setting: str = 'config.data.source',
) -> Source:
    """Open the images that `spec` stands for; the module's docstring lists its forms.

    Args:
      spec: the value of `setting`.
      limit: use this many images, spread evenly over the source (0: all of them), so that a
        folder's classes stay represented.
      channels: channels that the run works with. Gray images become RGB and RGB ones gray; other
        numbers must be the source's own.
      cache_dir: the run's folder, where long listings are kept between runs and which is never
        data itself (None: nowhere).
      setting: the name that error messages give.

    Raises:
      UserError: an unknown form, a path that does not exist or cannot be read, no images, damaged
        or contradictory data, other channels, a negative limit.
    """
    try:
        if limit < 0:
            raise UserError(f'limit={limit} must be 0 (all images) or more')
        source = _open(spec, channels, cache_dir)
        have = source.images.shape[-1] if isinstance(source, ArraySource) else 3
        if channels != have and not {channels, have} <= {1, 3}:
            raise UserError(f'the images have {have} channels, not config.data.channels={channels}')
    except UserError as error:
        raise UserError(f'{setting}={spec!r}: {printable(error)}') from error.__cause__
    except OSError as error:
        reason = printable(f'{error.filename}: {error.strerror}' if error.filename else error)
        raise UserError(f'{setting}={spec!r}: {reason}') from error
    except (ValueError, MemoryError) as error:
        reason = printable(error) or 'the images need more memory than there is'
        raise UserError(f'{setting}={spec!r}: {reason}') from error
    if 0 < limit < len(source):
        source = source.take(np.arange(limit) * len(source) // limit)
    return source


def _open(spec: str, channels: int, cache_dir: str | None) -> Source:
    kind, _, rest = spec.partition(':')
    if kind in KINDS and kind not in ('demo', 'synthetic') and not rest:
        raise UserError(f'name the data after the colon, as in {kind}:…')
    match kind:
        case 'demo':
            return open_demo(rest)
        case 'folder':
            return folders.open_folder(rest, cache_dir)
        case 'filelist':
            return filelists.open_filelist(rest)
        case 'webdataset':
            return webdataset.open_webdataset(rest, cache_dir)
        case 'tfds':
            return tfds.open_tfds(rest, cache_dir)
        case 'torchvision':
            return torchvision_files.open_torchvision(rest)
        case 'synthetic':
            return open_synthetic(rest, channels)
    raise UserError(
        f'{kind!r} is no kind of source; use {", ".join(KINDS)}, as in folder:/path/to/images'
    )


def open_demo(split: str) -> ArraySource:
    """The embedded Fashion-MNIST: '' is its training split, 'test' its test split.

    Raises:
      UserError: another split.
    """
    if split not in ('', 'train', 'test'):
        raise UserError(f'there is no split {split!r}; use demo or demo:test')
    split = split or 'train'
    with np.load(DEMO_FILE, allow_pickle=False) as file:
        images, labels = file[f'{split}_images'], file[f'{split}_labels']
    names = torchvision_files.FASHION_CLASSES
    return ArraySource(f'demo:{split}', images[..., None], labels, names)


def open_synthetic(size: str, channels: int) -> ArraySource:
    """Noise over one of ten coarse patterns, the image's class; the same numbers every time.

    Raises:
      UserError: `size` is not COUNTxSIDE, or the images are more than half of the memory.
    """
    found = re.fullmatch(r'([1-9]\d{0,17})x([1-9]\d{0,17})', size or '1024x64', re.ASCII)
    if not found:
        raise UserError('the size must be COUNTxSIDE, as in synthetic:1024x64')
    count, side = map(int, found.groups())
    size = count * side**2 * channels
    if size > total_bytes() // 2:
        raise UserError(
            f'these are {size / 2**30:,.0f} GiB, more than half of the memory: name a smaller '
            'COUNTxSIDE'
        )
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (10, 4, 4, channels))
    at = np.arange(side) * 4 // side
    labels = np.arange(count) % 10
    images = np.empty((count, side, side, channels), np.uint8)
    for image, label in zip(images, labels, strict=True):
        noise = rng.integers(-64, 65, image.shape)
        image[:] = (patterns[label][at][:, at] + noise).clip(0, 255)
    return ArraySource('synthetic', images, labels, [f'pattern {i}' for i in range(10)])
