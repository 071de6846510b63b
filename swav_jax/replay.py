"""Make a step again that was not finite.

    python -m swav_jax.replay RUN/nan_dump

It reads the state and the settings from the dump and the images from where they were, makes the one
step, and tells which numbers are not finite. Exit codes: 3 the step is not finite again, 0 it is
finite now, 2 something to mend. Run it on as many devices as the run had for the very same numbers.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from swav_jax import cli
from swav_jax import config as settings
from swav_jax import mesh as meshes
from swav_jax.checkpoint import Checkpoints
from swav_jax.data import pipeline, sources
from swav_jax.digest import named
from swav_jax.errors import UserError
from swav_jax.evaluate.model import restore_config
from swav_jax.initial_state import make_schedule, make_state
from swav_jax.step import make_train_step


def replay(folder: Path) -> dict[str, float]:
    """Make the step of a dump again; returns its metrics, `finite` among them.

    Raises:
      UserError: the folder holds no dump.
    """
    if not (folder / 'about.json').is_file():
        raise UserError(f'{folder} holds no dump: name the nan_dump of a run')
    about = json.loads((folder / 'about.json').read_text())
    config = restore_config(about['config'])
    mesh = meshes.make_mesh(config.model.sync_bn)
    source = sources.open_source(
        config.data.source, limit=config.data.limit, channels=config.data.channels
    )
    sizes = settings.sizes(config, num_images=len(source), num_replicas=mesh.size)
    if sizes.batch_size != about['global_batch']:
        raise UserError(
            f'{mesh.size} devices make a batch of {sizes.batch_size}, the step had one of '
            f'{about["global_batch"]}: use as many devices as the run did'
        )
    net, tx, layout, _ = make_state(config, sizes, make_schedule(config, sizes), mesh)
    checkpoints = Checkpoints(folder / 'state')
    restored = checkpoints.restore(layout.whole())
    checkpoints.close()
    if restored is None:
        raise UserError(f'{folder}/state holds no checkpoint: the dump is not whole')
    batch = next(
        pipeline.train_batches(
            source,
            config.data,
            seed=config.seed,
            global_batch=sizes.batch_size,
            first_step=about['batch'],
        )
    )
    for name, count in not_finite(restored[0]).items():
        print(f'before the step: {count} numbers of {name} are not finite')
    step = make_train_step(net, tx, config, layout)
    _, metrics, news = step(layout.spread(restored[0]), meshes.put_batch(mesh, batch))
    metrics['finite'] = news[0]
    return {name: float(x) for name, x in jax.device_get(metrics).items()}


def not_finite(tree: Any) -> dict[str, int]:
    """How many numbers of each array are not finite, where there are any."""
    counts = {
        name: int(np.size(x) - np.isfinite(np.asarray(x, np.float64)).sum())
        for name, x in named(tree).items()
    }
    return {name: count for name, count in counts.items() if count}


def main(argv: Sequence[str]) -> int:
    """Replay the dump that the command line names; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument('folder', type=cli.path, help='nan_dump of a run')
    folder = parser.parse(argv).folder
    metrics = replay(folder)
    for name in ('loss', 'grad_norm', 'update_norm'):
        print(f'{name} {metrics[name]}')
    with np.load(folder / 'arrays.npz', allow_pickle=False) as arrays:
        for name, count in not_finite(dict(arrays)).items():
            print(f'in the run: {count} numbers of {name} were not finite')
    print('the step is finite' if metrics['finite'] else 'the step is not finite, as in the run')
    return 0 if metrics['finite'] else 3


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
