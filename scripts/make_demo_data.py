"""Makes the embedded demo data from the files of Debian's package `dataset-fashion-mnist`.

    apt-get install dataset-fashion-mnist
    python scripts/make_demo_data.py --output swav_jax/data/fashion_mnist/fashion_mnist.npz

The first 10,000 training and 2,000 test images of Fashion-MNIST, in their published order, as one
`.npz` of uint8 arrays. The same input gives the same bytes (with the same zlib).
"""

import gzip
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from swav_jax import cli, files

COUNTS = {'train': ('train', 10_000), 'test': ('t10k', 2_000)}


def read_idx(path: pathlib.Path, header: int, shape: tuple[int, ...]) -> np.ndarray:
    """The elements after an IDX file's header, as uint8 of `shape` (whose first size is -1)."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header).reshape(shape)


def subset(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Images (N, 28, 28) and labels (N,) of both splits, cut to `COUNTS`."""
    arrays = {}
    for split, (prefix, count) in COUNTS.items():
        images = read_idx(folder / f'{prefix}-images-idx3-ubyte.gz', 16, (-1, 28, 28))
        labels = read_idx(folder / f'{prefix}-labels-idx1-ubyte.gz', 8, (-1,))
        arrays[f'{split}_images'] = images[:count]
        arrays[f'{split}_labels'] = labels[:count]
    return arrays


def main(argv: Sequence[str]) -> None:
    """Read the four IDX files and write the `.npz`."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        '--source', type=cli.path, default=pathlib.Path('/usr/share/datasets/fashion-mnist')
    )
    parser.add_argument('--output', type=cli.new_file, required=True)
    flags = parser.parse(argv)
    arrays = subset(flags.source)
    with files.replacing(flags.output) as part, part.open('wb') as file:
        np.savez_compressed(file, **arrays)
    print(f'{flags.output}: {flags.output.stat().st_size:,} bytes')


if __name__ == '__main__':
    sys.exit(cli.run(main, sys.argv[1:]))
