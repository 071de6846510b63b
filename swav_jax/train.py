"""One run, from top to bottom: devices, data, state, resume, the loop, what it learned."""

import contextlib
import functools
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax import optim
from swav_jax.cpu.host_memory import give_back_freed_memory
from swav_jax.data import pipeline, sources
from swav_jax.data.bad_images import BadImages
from swav_jax.errors import StoppedError, UserError
from swav_jax.evaluate import report
from swav_jax.evaluate.online import OnlineEvaluation, Results
from swav_jax.methods.collapse import Collapse
from swav_jax.parallel import distributed, ending
from swav_jax.parallel import mesh as meshes
from swav_jax.parallel.mesh import put_batch
from swav_jax.runs import nan_dump, resume
from swav_jax.runs.checkpoint import Checkpoints
from swav_jax.runs.initial_state import make_schedule, make_state, start_from
from swav_jax.runs.monitor import Monitor
from swav_jax.runs.nan_skip import SkipBatches, after_nan, batch_of_step
from swav_jax.runs.profiling import Profile
from swav_jax.runs.signals import SAVE, STOP, STOP_FOR_USER, Interrupted, Signals
from swav_jax.runs.workdir import explained, locked, open_workdir, write_config
from swav_jax.state import Layout
from swav_jax.step import make_train_step
from swav_jax.terminal import printable


def run(
    config: ConfigDict,
    workdir: str | Path,
    *,
    signals: Signals | None = None,
    force: bool = False,
    profile: int = 0,
) -> Results:
    """Train as `config` says, or go on where the run in `workdir` stopped.

    Writes config.json, metrics.jsonl, tensorboard/, checkpoints/, summary.json and, with
    `config.evaluate.report`, the page and the pictures of `evaluate.report` into `workdir`;
    nan_dump/ where a step is not finite.

    Args:
      config: the settings.
      workdir: the run's folder.
      signals: entered; what it notes ends the run with a checkpoint.
      force: go on also with a config that changes what was learned.
      profile: steps to write a trace of, into profile/.

    Returns:
      The summary that is written to summary.json.

    Raises:
      UserError: a setting, the data or the folder cannot work.
      RunFailedError: not a number, or a collapse.
      StoppedError: a signal came; a checkpoint is saved.
    """
    with distributed.failing_together():
        settings.validate(config)
    distributed.check_same_settings(config)
    with contextlib.ExitStack() as stack:
        with distributed.failing_together():
            check_float64(config)
            workdir = open_workdir(workdir)
            stack.enter_context(explained(workdir))
            stack.enter_context(locked(workdir))
        skip = None
        while True:
            try:
                return train(config, workdir, signals or Signals(), force, profile, skip)
            except SkipBatches as one_more:
                skip = one_more


def train(
    config: ConfigDict,
    workdir: Path,
    signals: Signals,
    force: bool,
    profile: int,
    skip: SkipBatches | None,
) -> Results:
    """From the last checkpoint to the end, as `run` says.

    Args:
      config, workdir, signals, force, profile: as in `run`.
      skip: leave out the batches from the last checkpoint to this one's last.

    Raises:
      SkipBatches: a step is not finite, and `config.train.on_nan` is 'skip'.
    """
    with distributed.failing_together():
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
        about = resume.describe(config, sizes.batch_size, source)
    distributed.check_same(
        {f'config.data.source={config.data.source}': about['images']},
        'give the same images to all of them',
    )

    checkpoints = Checkpoints(
        workdir / 'checkpoints',
        keep=config.checkpoint.keep,
        keep_every_steps=config.checkpoint.keep_every_epochs * sizes.steps_per_epoch,
    )

    notes = {'results': {}, 'evaluated': False, 'left_out': []}  # what a checkpoint carries, too
    said, written = [], config
    with distributed.failing_together():
        restored = resume.restore(checkpoints, layout, config, about, sizes.last_step, force)
        if restored is not None:
            state, notes, said = restored.state, restored.notes, restored.said
            config, written = restored.config, restored.written
            about |= {'config': settings.to_dict(config)}
        elif config.init_from:
            state = start_from(config, layout, state)
    first_step = int(state.step)
    if skip is not None:
        notes['left_out'].append([batch_of_step(first_step + 1, notes['left_out']), skip.last])
    # Without a checkpoint in between, skips before this one became part of it.
    skips = max(len(notes['left_out']), skip.count if skip else 0)
    first_batch = batch_of_step(first_step + 1, notes['left_out'])
    damaged = write_config(written, workdir)
    monitor = Monitor(
        workdir,
        total_steps=sizes.last_step,
        steps_per_epoch=sizes.steps_per_epoch,
        batch_size=sizes.batch_size,
        first_step=first_step,
        log_every_steps=config.train.log_every_steps,
        num_prototypes=tuple(config.model.head.num_clusters),
    )

    def evaluate(step: int) -> None:
        notes['evaluated'] = False
        # Several processes evaluate together, and none may leave the others waiting.
        alone = jax.process_count() == 1
        with signals.interruptible() if alone else contextlib.nullcontext():
            learned = evaluation.run(layout.gather(state), monitor.say)
        if step == 0:
            learned = {f'{name}_untrained': value for name, value in learned.items()}
        notes['results'] |= learned
        notes['evaluated'] = True
        monitor.events(learned, step=step)

    collapse = Collapse(config)

    def look(row: dict[str, float] | None) -> None:
        if warning := collapse.look(row):
            monitor.say(warning)

    def wanted() -> int:
        """What this process asks of all."""
        return max(signals.request, STOP if monitor.failure else 0)

    def save(step: int) -> None:
        row = monitor.flush()
        checkpoints.save(step, layout.gather(state), about | notes)
        look(row)

    def stop(step: int, request: int) -> None:
        save(step)
        checkpoints.close()
        with distributed.failing_together():
            monitor.check()
        raise StoppedError(step, by_user=request == STOP_FOR_USER)

    profiled = Profile(workdir / 'profile', first_step, profile)
    with checkpoints, monitor, profiled, ending.own_failure():
        if damaged:
            monitor.say(damaged)
        introduce(monitor, config, sizes, layout, first_step, notes['left_out'])
        for line in dict.fromkeys((*source.notes, *evaluation.notes, *said)):
            monitor.say(line)
        if not notes['evaluated']:
            with contextlib.suppress(Interrupted):
                evaluate(first_step)
        if request := distributed.largest(wanted()):
            stop(first_step, request)

        train_step = make_train_step(net, tx, config, layout)
        read = functools.partial(
            pipeline.train_batches,
            source,
            config.data,
            seed=config.seed,
            global_batch=sizes.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        batches = read(first_step=first_batch)
        bad_images = BadImages(
            source,
            workdir / 'bad_images.txt',
            config.data.max_bad_fraction,
            writes=jax.process_index() == 0,
        )
        last_save = time.monotonic()
        learning_rate = jax.jit(schedule)
        seen = news = None

        def see_to(step: int, batch: pipeline.Batch | None, news: jax.Array | None) -> int:
            """Wait for a step; what any process asked for. One that is not finite raises."""
            if news is None:
                return 0
            finite, request, bad = (int(x) for x in jax.device_get(news))
            if finite:
                if bad:
                    note_bad_images(bad_images, batch, monitor)
                return request
            monitor.flush()
            number = batch_of_step(step, notes['left_out'])
            again = put_batch(mesh, next(read(first_step=number)))
            place = {'step': step, 'batch': number}
            folder = nan_dump.write(workdir, net, config, layout, state, again, about | place)
            checkpoints.close()
            after_nan(config, folder, step, number, skips)

        for step in range(first_step + 1, sizes.last_step + 1):
            batch, data_wait = fetch(batches, news)
            request = wanted()
            if not request and is_time(config, last_save):
                request, last_save = SAVE, time.monotonic()
            batch['request'] = np.full(len(batch['index']), request, np.int32)
            profiled.before(step)
            lr = learning_rate(optim.updates_made(state.opt_state))
            before = seen, news
            state, metrics, news = train_step(state, put_batch(mesh, batch))
            news.copy_to_host_async()
            if step == first_step + 1:
                give_back_freed_memory()  # what compiling used
            seen = {name: batch[name] for name in ('index', 'weight')}
            profiled.after(step, metrics)
            # One step computes while the next is queued; a longer queue would hold more batches.
            request = see_to(step - 1, *before)
            look(monitor.record(step, metrics | {'lr': lr}, data_wait))
            evaluates = is_due(step, config.evaluate, sizes)
            saves = is_due(step, config.checkpoint, sizes)
            if request or evaluates or saves:  # of this step, before anything is made of it
                request, news = max(request, see_to(step, seen, news)), None
            if evaluates:
                try:
                    evaluate(step)
                except Interrupted:
                    request = signals.request
                except UserError:  # of images that are not trained on
                    if jax.process_count() == 1:  # others may not know of it
                        save(step)
                    raise
            if request or saves:
                if (request > SAVE and step < sizes.last_step) or not notes['evaluated']:
                    stop(step, request)
                save(step)
                last_save = time.monotonic()
        checkpoints.close()
        with distributed.failing_together():
            summary = monitor.finish(notes['results'])
        if config.evaluate.report:
            found = evaluation.look(layout.gather(state), evaluation.test)
            if jax.process_index() == 0:
                shown = evaluation.test
                if report.write_all(workdir, found, shown, source, config, sizes.last_step):
                    monitor.say(f'look at {printable(workdir)}/report.html')
    return summary


def is_time(config: ConfigDict, last_save: float) -> bool:
    """Whether a checkpoint is due by the clock, which is that of process 0."""
    minutes = config.checkpoint.every_minutes
    return (
        bool(minutes) and jax.process_index() == 0 and time.monotonic() - last_save > 60 * minutes
    )


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


def fetch(
    batches: Iterator[pipeline.Batch], news: jax.Array | None
) -> tuple[pipeline.Batch, float]:
    """The next batch of this process, and how many seconds its devices stood idle for it.

    The time counts only when the step in progress, whose `news` these are, ended before the batch
    came.
    """
    start = time.perf_counter()
    batch = next(batches)
    seconds = time.perf_counter() - start
    idle = news is None or news.is_ready()
    return batch, seconds if idle else 0.0


def note_bad_images(bad_images: BadImages, batch: pipeline.Batch, monitor: Monitor) -> None:
    """List what no process could read of a step's batch.

    The processes speak to each other only in a step that has such images, which its news tell all
    of them: so they all hold the same list, and stop at the same step.

    Args:
      bad_images: the list.
      batch: this process's, of which `index` and `weight` are read.
      monitor: says what is new.

    Raises:
      UserError: the list is too long; SaidElsewhereError on all processes but the first.
    """
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
    left_out: list[list[int]],
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
    for line in optim.unread(config.optimizer):
        monitor.say(line)
    asked = config.loss.queue.queue_length
    if asked != sizes.queue_length:
        monitor.say(
            f'config.loss.queue.queue_length={asked} is lowered to {sizes.queue_length}, '
            'a multiple of the batch'
        )
    if first_step:
        monitor.say(f'going on from step {first_step:,}')
    for first, last in left_out:
        monitor.say(
            f'without batches {first:,} to {last:,}, which led to a step that is not finite'
        )
