"""The training loop: steps, and what is due between them."""

import time
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax import optim
from swav_jax.cpu.host_memory import give_back_freed_memory
from swav_jax.data import pipeline
from swav_jax.errors import printable
from swav_jax.evaluate import report
from swav_jax.evaluate.online import Results
from swav_jax.parallel import distributed, ending
from swav_jax.parallel import mesh as meshes
from swav_jax.runs.monitor import Monitor
from swav_jax.runs.nan_skip import SkipBatches
from swav_jax.runs.profiling import Profile
from swav_jax.runs.signals import SAVE, Signals
from swav_jax.state import TrainState
from swav_jax.step import make_train_step
from swav_jax.training.fill import fill
from swav_jax.training.progress import Progress
from swav_jax.training.setup import Setup, introduce


def train(setup: Setup, signals: Signals, profile: int) -> Results | SkipBatches:
    """Run the remaining steps and write the results.

    Args:
      setup: of the run.
      signals, profile: as in `run`.

    Returns:
      The summary; or the batches to skip after a step that is not finite, if `config.train.on_nan`
      is 'skip': the run is then resumed from its last checkpoint.
    """
    config, sizes, first_step = setup.config, setup.sizes, setup.first_step
    monitor = Monitor(
        setup.workdir,
        total_steps=sizes.last_step,
        steps_per_epoch=sizes.steps_per_epoch,
        batch_size=sizes.batch_size,
        first_step=first_step,
        log_every_steps=config.train.log_every_steps,
        num_prototypes=tuple(config.model.head.num_clusters),
    )
    profiled = Profile(setup.workdir / 'profile', first_step, profile)
    with setup.checkpoints, monitor, profiled, ending.own_failure():
        introduce(setup, monitor.say)
        run = Progress(setup, monitor, signals)
        if not run.notes['evaluated']:
            run.evaluate(first_step)
        if request := distributed.largest(run.wanted()):
            run.stop(first_step, request)
        if first_step == 0:
            fill(setup, monitor, run)

        train_step = make_train_step(setup.net, setup.tx, config, setup.layout)
        learning_rate = jax.jit(setup.schedule)
        batches = setup.batches(setup.batch_of_step(first_step + 1))
        for step in range(first_step + 1, sizes.last_step + 1):
            batch, data_wait = fetch(batches, run.news)
            batch['request'] = np.full(len(batch['index']), run.request(), np.int32)
            profiled.before(step)
            lr = learning_rate(optim.updates_made(run.state.opt_state))
            run.state, metrics, news = train_step(run.state, meshes.put_batch(setup.mesh, batch))
            run.queued(step, batch, news)
            if step == first_step + 1:
                give_back_freed_memory()  # of the compiler
            profiled.after(step, metrics)
            # One step computes while the next is queued; a longer queue would hold more batches.
            request = run.confirm(step - 1)
            if run.skip:
                return run.skip
            run.look(monitor.record(step, metrics | {'lr': lr}, data_wait))
            evaluates = is_due(step, config.evaluate, sizes)
            saves = is_due(step, config.checkpoint, sizes)
            if request or evaluates or saves:  # which need to know that this step is finite
                request = max(request, run.confirm(step))
            if run.skip:
                return run.skip
            if evaluates:
                request = max(request, run.evaluate(step))
            if (request > SAVE and step < sizes.last_step) or not run.notes['evaluated']:
                run.stop(step, request)
            if request or saves:
                run.save(step)

        setup.checkpoints.close()
        with distributed.failing_together():
            summary = monitor.finish(run.notes['results'])
        if config.evaluate.report:
            show(setup, run.state, monitor)
    return summary


def show(setup: Setup, state: TrainState, monitor: Monitor) -> None:
    """Write the report of a finished run; all processes extract the features together."""
    shown = setup.evaluation.test
    found = setup.evaluation.look(setup.layout.gather(state), shown)
    if jax.process_index() == 0:
        config, last = setup.config, setup.sizes.last_step
        if report.write_all(setup.workdir, found, shown, setup.source, config, last):
            monitor.say(f'look at {printable(setup.workdir)}/report.html')


def fetch(
    batches: Iterator[pipeline.Batch], news: jax.Array | None
) -> tuple[pipeline.Batch, float]:
    """Return this process's next batch, and for how many seconds its devices were idle.

    That is 0 while the step in progress, whose `news` are given, was still being computed.
    """
    start = time.perf_counter()
    batch = next(batches)
    seconds = time.perf_counter() - start
    idle = news is None or news.is_ready()
    return batch, seconds if idle else 0.0


def is_due(step: int, every: ConfigDict, sizes: settings.Sizes) -> bool:
    """Whether an action is due after this step: at the end, and every so many epochs or steps."""
    epochs, steps = every.every_epochs, every.get('every_steps', 0)
    return (
        step == sizes.last_step
        or (epochs > 0 and step % (epochs * sizes.steps_per_epoch) == 0)
        or (steps > 0 and step % steps == 0)
    )
