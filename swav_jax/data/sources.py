"""The images of a run, which one string names: `config.data.source` is KIND or KIND:REST.

demo, demo:test          the embedded subset of Fashion-MNIST: 10,000 and 2,000 images
folder:/path             class folders, or a flat folder of images
filelist:/list.txt       one path a line, alone or with a label; or VISSL's .npy of paths
webdataset:/d/{000..123}.tar   tar shards of images
tfds:name[:split]        a prepared TensorFlow dataset; ?data_dir=/path is its folder
torchvision:NAME:/path[:split]   the files of CIFAR10, STL10, SVHN, MNIST or FashionMNIST
synthetic[:COUNTxSIDE]   generated images in ten classes (default 1024x64)

A new kind is a module with an `open_…` function, and a line in `KINDS`. In every kind, a label of
-1 is an unknown one, and `notes` of the source report what is left out.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from swav_jax.cpu.host_memory import total_bytes
from swav_jax.data import filelists, folders, tfds, torchvision_files, webdataset
from swav_jax.data.images import ArraySource, Source
from swav_jax.errors import UserError, printable

DEMO_FILE = Path(__file__).parent / 'fashion_mnist' / 'fashion_mnist.npz'


def open_source(
    spec: str,
    *,
    limit: int = 0,
    channels: int,
    cache_dir: str | None = None,
    setting: str = 'config.data.source',
) -> Source:
    """Open the images that `spec` names in one of the forms above.

    Args:
      spec: the value of `setting`.
      limit: use this many images, spread evenly over the source so that all classes of a folder
        occur (0: use all).
      channels: of the run. Gray images become RGB and RGB images gray; other numbers must be the
        source's own.
      cache_dir: the run's folder, which keeps long listings between runs and is never data itself
        (None: keep nothing).
      setting: the name for error messages.

    Raises:
      UserError: the form is unknown, a path does not exist or cannot be read, there are no images,
        the data are damaged or contradictory or have other channels, or `limit` is negative.
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
    except (OSError, ValueError, MemoryError) as error:
        reason = str(error) or 'the images need more memory than there is'
        if isinstance(error, OSError) and error.filename:
            reason = f'{error.filename} cannot be read ({error.strerror})'
        raise UserError(f'{setting}={spec!r}: {printable(reason)}') from error
    if 0 < limit < len(source):
        source = source.take(np.arange(limit) * len(source) // limit)
    return source


def _open(spec: str, channels: int, cache_dir: str | None) -> Source:
    kind, _, rest = spec.partition(':')
    if kind not in KINDS:
        raise UserError(
            f'{kind!r} is not a kind of source; use {", ".join(KINDS)}, '
            'for example folder:/path/to/images'
        )
    if not rest and kind not in ('demo', 'synthetic'):
        raise UserError(f'name the data after the colon, as in {kind}:…')
    return KINDS[kind](rest, channels, cache_dir)


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
      UserError: `size` is not COUNTxSIDE, or the images take more than half of the memory.
    """
    found = re.fullmatch(r'([1-9]\d{0,17})x([1-9]\d{0,17})', size or '1024x64', re.ASCII)
    if not found:
        raise UserError('the size must be COUNTxSIDE, as in synthetic:1024x64')
    count, side = map(int, found.groups())
    memory = count * side**2 * channels
    if memory > total_bytes() // 2:
        raise UserError(
            f'these are {memory / 2**30:,.0f} GiB, more than half of the memory: name a smaller '
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


# The source of REST, the channels of the run and its folder.
KINDS: dict[str, Callable[[str, int, str | None], Source]] = {
    'demo': lambda rest, channels, cache_dir: open_demo(rest),
    'folder': lambda rest, channels, cache_dir: folders.open_folder(rest, cache_dir),
    'filelist': lambda rest, channels, cache_dir: filelists.open_filelist(rest),
    'webdataset': lambda rest, channels, cache_dir: webdataset.open_webdataset(rest, cache_dir),
    'tfds': lambda rest, channels, cache_dir: tfds.open_tfds(rest, cache_dir),
    'torchvision': lambda rest, channels, cache_dir: torchvision_files.open_torchvision(rest),
    'synthetic': lambda rest, channels, cache_dir: open_synthetic(rest, channels),
}
