"""One run, from top to bottom: devices, data, state, resume, the loop, what it learned."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import swav_jax
from swav_jax import config as settings
from swav_jax import distributed, optim
from swav_jax import mesh as meshes
from swav_jax.checkpoint import Checkpoints
from swav_jax.data import pipeline, sources
from swav_jax.data.bad_images import BadImages
from swav_jax.errors import UserError
from swav_jax.evaluate import report
from swav_jax.evaluate.online import OnlineEvaluation, Results
from swav_jax.initial_state import make_schedule, make_state, start_from
from swav_jax.mesh import put_batch
from swav_jax.monitor import Monitor
from swav_jax.state import Layout
from swav_jax.step import make_train_step
from swav_jax.workdir import open_workdir, write_config


def run(config: ConfigDict, workdir: str | Path) -> Results:
    """Train as `config` says, or go on where the run in `workdir` stopped.

    Writes config.json, metrics.jsonl, tensorboard/, checkpoints/, summary.json and at the end the
    page and the pictures of `evaluate.report` into `workdir`.

    Returns:
      The summary that is written to summary.json.

    Raises:
      UserError: a setting, the data or the folder cannot work.
    """
    distributed.check_same(config)
    with distributed.failing_together():
        settings.validate(config)
        check_float64(config)
        workdir = open_workdir(workdir)
        mesh = meshes.make_mesh(config.model.sync_bn)
        source = sources.open_source(
            config.data.source,
            limit=config.data.limit,
            channels=config.data.channels,
            cache_dir=str(workdir),
        )
        sizes = settings.sizes(config, num_images=len(source), num_replicas=mesh.size)
        schedule = make_schedule(config, sizes)
        net, tx, layout, state = make_state(config, sizes, schedule, mesh)
        evaluation = OnlineEvaluation(config, net, mesh, workdir)

    checkpoints = Checkpoints(
        workdir / 'checkpoints',
        keep=config.checkpoint.keep,
        keep_every_steps=config.checkpoint.keep_every_epochs * sizes.steps_per_epoch,
    )
    results: Results = {}
    with distributed.failing_together():
        if (restored := checkpoints.restore(layout.whole())) is not None:
            state, results = layout.spread(restored[0]), restored[1]['results']
        elif config.init_from:
            state = start_from(config, layout, state)
    first_step = int(state.step)
    write_config(config, workdir)
    monitor = Monitor(
        workdir,
        total_steps=sizes.last_step,
        steps_per_epoch=sizes.steps_per_epoch,
        batch_size=sizes.batch_size,
        first_step=first_step,
        log_every_steps=config.train.log_every_steps,
        num_prototypes=tuple(config.model.head.num_clusters),
    )
    introduce(monitor, config, sizes, layout, first_step)

    if first_step == 0:
        untrained = evaluation.run(layout.gather(state))
        results = {f'{name}_untrained': value for name, value in untrained.items()}
        monitor.events(results, step=0)

    train_step = make_train_step(net, tx, config, layout)
    batches = pipeline.train_batches(
        source,
        config.data,
        seed=config.seed,
        global_batch=sizes.batch_size,
        first_step=first_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    bad_images = BadImages(
        source,
        workdir / 'bad_images.txt',
        config.data.max_bad_fraction,
        writes=jax.process_index() == 0,
    )
    metrics = seen = None
    for step in range(first_step + 1, sizes.last_step + 1):
        batch, data_wait = fetch(batches, metrics)
        lr = schedule(optim.updates_made(state.opt_state))
        previous, (state, metrics) = metrics, train_step(state, put_batch(mesh, batch))
        # One step computes while the next is queued; a longer queue would only hold more batches.
        jax.block_until_ready(previous)
        note_bad_images(bad_images, seen, previous, monitor)
        seen = batch
        monitor.record(step, metrics | {'lr': lr}, data_wait)
        if is_due(step, config.evaluate, sizes):
            learned = evaluation.run(layout.gather(state))
            results |= learned
            monitor.events(learned, step=step)
        if is_due(step, config.checkpoint, sizes):
            monitor.flush()
            checkpoints.save(step, layout.gather(state), describe(config, results))
    note_bad_images(bad_images, seen, metrics, monitor)
    checkpoints.close()
    summary = monitor.finish(results)
    found = evaluation.look(layout.gather(state), evaluation.test)
    if jax.process_index() == 0:
        report.write_all(workdir, found, evaluation.test, source, config, sizes.last_step)
        monitor.say(f'look at {workdir}/report.html')
    return summary


def check_float64(config: ConfigDict) -> None:
    """Refuse settings that ask for float64 where JAX would quietly compute in float32.

    Raises:
      UserError: float64 is not enabled.
    """
    for name, wanted in (
        ('precision', config.precision == 'float64'),
        ('loss.use_double_precision', config.loss.use_double_precision),
    ):
        if wanted and not jax.config.jax_enable_x64:
            raise UserError(
                f'config.{name} asks for float64, which JAX leaves off: set JAX_ENABLE_X64=True in '
                'the environment'
            )


def describe(config: ConfigDict, results: Results) -> dict[str, Any]:
    """What a checkpoint carries beside the state."""
    return {
        'config': settings.to_dict(config),
        'version': swav_jax.__version__,
        'results': results,
    }


def fetch(
    batches: Iterator[pipeline.Batch], metrics: dict[str, jax.Array] | None
) -> tuple[pipeline.Batch, float]:
    """The next batch of this process, and how many seconds its devices stood idle for it.

    The time counts only when the step in progress, whose `metrics` these are, ended before the
    batch came.
    """
    start = time.perf_counter()
    batch = next(batches)
    seconds = time.perf_counter() - start
    idle = metrics is None or metrics['loss'].is_ready()
    return batch, seconds if idle else 0.0


def note_bad_images(
    bad_images: BadImages,
    batch: pipeline.Batch | None,
    metrics: dict[str, jax.Array] | None,
    monitor: Monitor,
) -> None:
    """List what no process could read of a step's batch.

    The processes speak to each other only in a step that has such images, which its metrics tell
    all of them: so they all hold the same list, and stop at the same step.

    Args:
      bad_images: the list.
      batch, metrics: this process's, of the same step; None before the first one.
      monitor: says what is new.

    Raises:
      UserError: the list is too long; SaidElsewhereError on all processes but the first.
    """
    if metrics is None or metrics['bad_images'] == 0:
        return
    index, weight = distributed.rows_of_all(batch['index'], batch['weight'])
    with distributed.failing_together():
        for name in bad_images.update(index, weight):
            monitor.say(f'cannot be read, does not count: {name}')


def is_due(step: int, every: ConfigDict, sizes: settings.Sizes) -> bool:
    """Whether something happens after this step: at the end, and every so many epochs or steps."""
    epochs, steps = every.every_epochs, every.get('every_steps', 0)
    return (
        step == sizes.last_step
        or (epochs > 0 and step % (epochs * sizes.steps_per_epoch) == 0)
        or (steps > 0 and step % steps == 0)
    )


def introduce(
    monitor: Monitor,
    config: ConfigDict,
    sizes: settings.Sizes,
    layout: Layout,
    first_step: int,
) -> None:
    """Say in a few lines what is about to run."""
    count = sum(x.size for x in jax.tree.leaves(layout.whole().params))
    mesh = layout.mesh
    device = mesh.devices.flat[0]
    trunk = config.model.trunk
    name = f'resnet{trunk.depth}' if trunk.name == 'resnet' else trunk.name
    monitor.say(
        f'{name}, {count / 1e6:.2f} M parameters, {config.precision}; '
        f'{mesh.size} × {device.device_kind}'
    )
    monitor.say(
        f'{sizes.num_images:,} images of {config.data.source}, {sizes.batch_size} a step '
        f'({config.data.batchsize_per_replica} a device), {sizes.steps_per_epoch:,} steps '
        f'an epoch, {sizes.last_step:,} in all'
    )
    if config.data.channels != 3:
        monitor.say(
            f'images of config.data.channels={config.data.channels}: saturation, hue and grayscale '
            'are left out'
        )
    asked = config.loss.queue.queue_length
    if asked != sizes.queue_length:
        monitor.say(
            f'config.loss.queue.queue_length={asked} is lowered to {sizes.queue_length}, '
            'a multiple of the batch'
        )
    if first_step:
        monitor.say(f'going on from step {first_step:,}')
