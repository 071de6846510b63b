"""Write what a network makes of images: trunk features, embeddings and prototype scores.

    python -m swav_jax.evaluate.features --workdir RUN --source demo:test --out features.npz

writes arrays `trunk` (N, F), `embeddings` (N, D) of length 1, `scores0`, … (N, K) for each head of
prototypes, `labels` (N,) as the data have them where they are known, -1 of single images without,
`readable` (N,), False for images that could not be decoded, and `names` (N,). An --out without .npz
is a folder of .npy files, which are written, and can be read, as memory maps.
"""

if __name__ == '__main__':  # before the imports: TensorFlow reads its settings as it is imported
    from swav_jax import commands

    commands.run('features')

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from swav_jax import atomic
from swav_jax.data.images import Source
from swav_jax.evaluate import command, labelled, outputs
from swav_jax.evaluate.extraction import Allocate, Features, check
from swav_jax.terminal import printable

_WRITTEN = r'(trunk|embeddings|scores\d+|labels|readable|names)\.npy'


def save(path: Path, source: Source, compute: Callable[[Allocate], Features]) -> Features:
    """Write features to `path`: an .npz file, or a folder of .npy files that are memory maps.

    All arrays of a call appear together, in the place of those of an earlier call.

    Args:
      path: where to.
      source: the images, for their names, and for their labels as the data have them.
      compute: makes the features in arrays that it is given.

    Raises:
      UserError: the folder holds such files that no call wrote.
    """
    names = np.array([source.name(i) for i in range(len(source))])

    def named(found: Features) -> dict[str, np.ndarray]:
        known = {} if found.labels is None else {'labels': source.label_ids()}
        return found.arrays() | known | {'names': names}

    if path.suffix == '.npz':
        found = compute(lambda _, shape: np.empty(shape, np.float32))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as temporary, temporary.open('wb') as file:
            np.savez(file, **named(found))
        return found

    with outputs.replacing(path, 'features', _WRITTEN) as folder:

        def allocate(name, shape):
            return np.lib.format.open_memmap(folder / f'{name}.npy', 'w+', np.float32, shape)

        found = compute(allocate)
        for name, array in named(found).items():
            if isinstance(array, np.memmap):
                array.flush()
            else:
                np.save(folder / f'{name}.npy', array)
    return found


def _main(arguments: argparse.Namespace) -> None:
    """Extract and write what the command line says."""
    model = command.load(arguments)
    if Path(arguments.out).suffix == '.npz':
        out = outputs.file(arguments.out)
    else:
        out = outputs.folder(arguments.out)
        outputs.check(out, 'features', _WRITTEN)
    source = model.open(arguments.source or model.config.data.source, arguments.limit)
    labelled.say(source.notes)
    said = []

    def compute(allocate: Allocate) -> Features:
        found = model.extract(source, progress=True, allocate=allocate)
        said.extend(check(found, source, model.config))
        return found

    found = save(out, source, compute)
    arrays = found.arrays()
    if found.labels is not None:
        arrays['labels'] = source.label_ids()
    for name, array in arrays.items():
        print(f'{name} {array.dtype}{list(array.shape)}')
    labelled.say(said)
    print(f'written to {printable(arguments.out)}')


def main(argv: Sequence[str]) -> int:
    """Run the command line that the module's docstring explains; returns the exit code."""
    parser = command.parser(__doc__)
    parser.add_argument('--source', help='images (default: those the run trained on)')
    parser.add_argument('--out', required=True, help='FILE.npz or a folder')
    return command.run(_main, parser, argv)
