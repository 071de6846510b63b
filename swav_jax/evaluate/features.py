"""Write what a network makes of images: trunk features, embeddings and prototype scores.

    python -m swav_jax.evaluate.features --workdir RUN --source demo:test --out features.npz

writes arrays `trunk` (N, F), `embeddings` (N, D) of length 1, `scores0`, … (N, K) for each head of
prototypes, `labels` (N,) as they are in the data, -1 for images without (no array if there are no
labels), `readable` (N,), False for images that could not be decoded, and `names` (N,). If --out
does not end in .npz, it is a folder of .npy files, which can be read as memory maps.
"""

if __name__ == '__main__':  # before the imports, so that mistakes are reported without them
    from swav_jax import commands

    commands.run('features')

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from swav_jax import cli, files
from swav_jax.cli.flags import features as parse_features
from swav_jax.data.images import Source
from swav_jax.errors import printable
from swav_jax.evaluate import command, outputs
from swav_jax.evaluate.extraction import Allocate, Features

_WRITTEN = r'(trunk|embeddings|scores\d+|labels|readable|names)\.npy'


def run(flags: argparse.Namespace) -> None:
    """Extract and write features."""
    model = command.load(flags)
    if Path(flags.out).suffix == '.npz':
        out = outputs.file(flags.out)
    else:
        out = outputs.folder(flags.out)
        outputs.check(out, 'features', _WRITTEN)
    source = command.open_source(model, flags.source or model.config.data.source, flags.limit)
    arrays = save(out, source, lambda allocate: command.extract(model, source, allocate=allocate))
    for name, array in arrays.items():
        print(f'{name} {array.dtype}{list(array.shape)}')
    print(f'written to {printable(flags.out)}')


main = cli.command(__doc__, parse_features, run)


def save(
    path: Path, source: Source, compute: Callable[[Allocate], Features]
) -> dict[str, np.ndarray]:
    """Write features to `path`, an .npz file or a folder of .npy files that are memory maps.

    The arrays of a call, which `compute` gets a function to allocate, appear together and replace
    those of an earlier call.

    Returns:
      The arrays by name, without `names`.

    Raises:
      UserError: the folder holds a file with the name of one of these that no call wrote.
    """

    def arrays(found: Features) -> dict[str, np.ndarray]:
        return found.arrays() | ({} if found.labels is None else {'labels': source.label_ids()})

    names = np.array([source.name(i) for i in range(len(source))])
    if path.suffix == '.npz':
        found = arrays(compute(lambda _, shape: np.empty(shape, np.float32)))
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as temporary, temporary.open('wb') as file:
            np.savez(file, **found, names=names)
        return found

    with outputs.replacing(path, 'features', _WRITTEN) as folder:

        def allocate(name, shape):
            return np.lib.format.open_memmap(folder / f'{name}.npy', 'w+', np.float32, shape)

        found = arrays(compute(allocate))
        for name, array in (found | {'names': names}).items():
            if isinstance(array, np.memmap):
                array.flush()
            else:
                np.save(folder / f'{name}.npy', array)
    return found
