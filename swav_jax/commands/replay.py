"""Run a step that was not finite again.

    python -m swav_jax.commands.replay RUN/nan_dump

The state and the settings are read from the dump, the images from where they were. The step is run
once, and arrays with numbers that are not finite are listed. Exit codes: 3 the step is not finite
again; 0 it is finite now; 2 a mistake that you can fix. The numbers are exactly the same on as many
devices as the run had.
"""

if __name__ == '__main__':  # before the imports, so that mistakes are reported without them
    from swav_jax import commands

    commands.run('replay')

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from swav_jax import cli, methods
from swav_jax import config as settings
from swav_jax.cli.flags import replay as parse_replay
from swav_jax.config import saved
from swav_jax.data import pipeline, sources
from swav_jax.data.images import Source
from swav_jax.errors import UserError, printable
from swav_jax.files import open_regular
from swav_jax.parallel import mesh as meshes
from swav_jax.parallel.replicas import device_rows
from swav_jax.runs.checkpoint import Checkpoints
from swav_jax.runs.digest import named
from swav_jax.state import make_schedule, make_state
from swav_jax.step import make_train_step


def run(flags: argparse.Namespace) -> int:
    """Replay a dump and print what is not finite; returns the exit code."""
    metrics = replay(flags.folder)
    for name in ('loss', 'grad_norm', 'update_norm'):
        print(f'{name} {metrics[name]}')
    for name, count in not_finite(read_arrays(flags.folder)).items():
        print(f'in the run: {count} numbers of {printable(name)} were not finite')
    print('the step is finite' if metrics['finite'] else 'the step is not finite, as in the run')
    return 0 if metrics['finite'] else 3


main = cli.command(__doc__, parse_replay, run)


def replay(folder: Path) -> dict[str, float]:
    """Run the step of a dump again; returns its metrics, `finite` among them.

    Raises:
      UserError: the dump is damaged or was edited, its images are gone or have changed, or there
        are other devices.
    """
    checkpoints = Checkpoints(folder / 'state')
    about = _read_about(folder, checkpoints)
    arrays = read_arrays(folder)
    config = saved.restore(about['config'])
    settings.validate(config)
    methods.make(config).check()
    mesh = meshes.make_mesh(config.model.sync_bn)
    source = sources.open_source(
        config.data.source, limit=config.data.limit, channels=config.data.channels
    )
    sizes = settings.sizes(config, num_images=len(source), num_devices=mesh.size)
    if sizes.batch_size != about['global_batch']:
        raise UserError(
            f'{mesh.size} devices make a batch of {sizes.batch_size}, the step had one of '
            f'{about["global_batch"]}: use as many devices as the run did'
        )
    group_images = mesh.shape['member'] * config.data.batchsize_per_replica
    if about.get('group_images', group_images) != group_images:
        raise UserError(
            f'a BatchNorm group has {group_images} images here and had {about["group_images"]} in '
            'the run: use as many devices and processes as the run did'
        )
    net, tx, layout, _ = make_state(config, sizes, make_schedule(config, sizes), mesh)
    restored = checkpoints.restore(layout.whole())
    checkpoints.close()
    batch = next(
        pipeline.train_batches(
            source,
            config.data,
            seed=config.seed,
            global_batch=sizes.batch_size,
            rows=device_rows(sizes.batch_size, mesh.size, config.train.micro_batches),
            first_step=about['batch'],
        )
    )
    _check_images(source, about, arrays, batch)
    for name, count in not_finite(restored[0]).items():
        print(f'before the step: {count} numbers of {name} are not finite')
    step = make_train_step(net, tx, config, layout)
    _, metrics, news = step(layout.spread(restored[0]), meshes.put_batch(mesh, batch))
    metrics['finite'] = news[0]
    return {name: float(x) for name, x in jax.device_get(metrics).items()}


def _read_about(folder: Path, checkpoints: Checkpoints) -> dict[str, Any]:
    """Read about.json, whose content has to be that of the checkpoint beside it."""
    path = folder / 'about.json'
    newest = checkpoints.latest_step()
    if newest is None:
        raise UserError(f'{printable(folder)}/state holds no checkpoint: the dump is not whole')
    about = checkpoints.metadata(newest)
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if found != about:
        found = found if isinstance(found, dict) else {}
        missing = object()
        changed = sorted(
            name
            for name in about.keys() | found.keys()
            if found.get(name, missing) != about.get(name, missing)
        )
        raise UserError(
            f'{printable(path)} is not what the run wrote ({printable(", ".join(changed))}): take '
            'back what was changed'
        )
    try:
        step, batch, size = (about[name] for name in ('step', 'batch', 'global_batch'))
        sound = isinstance(about['config'], dict) and 0 < step <= batch + 1 < 2**40 and size > 0
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f'{printable(path)} does not describe a step: use another dump')
    return about


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Read what the step computed in the run.

    Raises:
      UserError: arrays.npz is missing or damaged.
    """
    path = folder / 'arrays.npz'
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as content:
            arrays = dict(content)
        numbers = all(x.dtype.kind in 'biuf' for x in arrays.values())
        if numbers and {'index', 'weight'} <= arrays.keys():
            return arrays
        reason = 'it holds other arrays'
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # a damaged file can fail in any way
        reason = str(error) or type(error).__name__
    reason = printable(reason.partition('\n')[0])
    raise UserError(f'{printable(path)} cannot be read ({reason}): the dump is not whole')


def _check_images(
    source: Source, about: dict[str, Any], arrays: dict[str, np.ndarray], batch: pipeline.Batch
) -> None:
    """Refuse images that are not those of the step."""
    images = about.get('images', {})
    index, weight = arrays['index'], arrays['weight']
    if not index.shape == weight.shape == batch['index'].shape:
        raise UserError('arrays.npz of the dump holds another batch: the dump was changed')
    if (
        not np.array_equal(np.sort(batch['index']), np.sort(index))
        or images.get('digest', source.digest()) != source.digest()
    ):
        raise UserError(
            f'the images of config.data.source={about["config"]["data"]["source"]!r} are no longer '
            'those of the run: put them back to replay its step'
        )
    then = dict(zip(index.tolist(), weight.tolist(), strict=True))
    for i, now in zip(batch['index'].tolist(), batch['weight'].tolist(), strict=True):
        if now != then[i]:
            raise UserError(
                f'{printable(source.name(i))} can{"not" * (not now)} be read now, which was '
                'otherwise in the run: put the images back to replay its step'
            )


def not_finite(tree: Any) -> dict[str, int]:
    """Count the numbers that are not finite in each array that has some."""
    counts = {
        name: int(np.size(x) - np.isfinite(np.asarray(x, np.float64)).sum())
        for name, x in named(tree).items()
    }
    return {name: count for name, count in counts.items() if count}
