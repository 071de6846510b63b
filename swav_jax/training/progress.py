"""The state of a run in progress, and the actions between its steps."""

import collections
import contextlib
import time

import jax

from swav_jax.data import pipeline
from swav_jax.data.bad_images import BadImages
from swav_jax.errors import StoppedError, UserError
from swav_jax.parallel import distributed
from swav_jax.parallel import mesh as meshes
from swav_jax.runs import nan_dump
from swav_jax.runs.collapse import Collapse
from swav_jax.runs.monitor import Monitor
from swav_jax.runs.nan_skip import SkipBatches, after_nan
from swav_jax.runs.results import UNTRAINED
from swav_jax.runs.signals import SAVE, STOP, STOP_FOR_USER, Interrupted, Signals
from swav_jax.training.setup import Setup


class Progress:
    """The state of a run in progress, and the actions between its steps.

    Attributes:
      state: after the last queued step.
      notes: what a checkpoint holds beside the state, as in `Setup`.
      skip: the batches to skip, set by `confirm` after a step that is not finite.
    """

    def __init__(self, setup: Setup, monitor: Monitor, signals: Signals):
        self.state, self.notes = setup.state, setup.notes
        self.skip: SkipBatches | None = None
        self._setup, self._monitor, self._signals = setup, monitor, signals
        self._queued: collections.deque[tuple[int, pipeline.Batch, jax.Array]] = collections.deque()
        self._collapse = Collapse(setup.config)
        self._last_save = time.monotonic()
        self._bad_images = BadImages(
            setup.source,
            setup.workdir / 'bad_images.txt',
            setup.config.data.max_bad_fraction,
            writes=jax.process_index() == 0,
        )

    @property
    def news(self) -> jax.Array | None:
        """News of the last queued step, see `make_train_step`; None once it is confirmed."""
        return self._queued[-1][2] if self._queued else None

    def wanted(self) -> int:
        """This process's request to all: 0, STOP or STOP_FOR_USER."""
        return max(self._signals.request, STOP if self._monitor.failure else 0)

    def request(self) -> int:
        """The same, or SAVE if a checkpoint is due by the clock of process 0."""
        minutes, now = self._setup.config.checkpoint.every_minutes, time.monotonic()
        due = minutes and jax.process_index() == 0 and now - self._last_save > 60 * minutes
        if due and not self.wanted():
            self._last_save = now
            return SAVE
        return self.wanted()

    def queued(self, step: int, batch: pipeline.Batch, news: jax.Array) -> None:
        """Record a step that was sent to the devices."""
        news.copy_to_host_async()
        read = {name: batch[name] for name in ('index', 'weight')}
        self._queued.append((step, read, news))

    def confirm(self, last: int) -> int:
        """Wait for the steps up to `last`, and return the largest request in them.

        Raises:
          RunFailedError: a step is not finite, and `config.train.on_nan` is 'stop'.
          UserError: too many images cannot be read.
        """
        request = 0
        while self._queued and self._queued[0][0] <= last and not self.skip:
            step, batch, news = self._queued.popleft()
            finite, asked, bad = (int(x) for x in jax.device_get(news))
            if not finite:
                self.skip = self._after_nan(step)
            elif bad:
                note_bad_images(self._bad_images, batch, self._monitor)
            request = max(request, asked)
        return request

    def _after_nan(self, step: int) -> SkipBatches:
        setup = self._setup
        self._monitor.flush()
        number = setup.batch_of_step(step)
        batch = meshes.put_batch(setup.mesh, next(setup.batches(number)))
        about = setup.about | {'step': step, 'batch': number}
        folder = nan_dump.write(
            setup.workdir, setup.net, setup.config, setup.layout, self.state, batch, about
        )
        setup.checkpoints.close()
        return after_nan(setup.config, folder, step, number, setup.skips)

    def look(self, row: dict[str, float] | None) -> None:
        """Warn of a collapse, or raise a RunFailedError: see `Collapse.look`."""
        if warning := self._collapse.look(row):
            self._monitor.say(warning)

    def evaluate(self, step: int) -> int:
        """Evaluate the network; return the request of a signal that interrupted it, or 0.

        Raises:
          UserError: the images to evaluate on cannot be used; the state is saved before.
        """
        self.notes['evaluated'] = False
        # Several processes evaluate together, and none may leave the others waiting.
        alone = jax.process_count() == 1
        try:
            with self._signals.interruptible() if alone else contextlib.nullcontext():
                whole = self._setup.layout.gather(self.state)
                learned = self._setup.evaluation.run(whole, self._monitor.say)
                pixels = {}
                if self._setup.config.evaluate.pixels and not self.notes['results']:
                    pixels = self._setup.evaluation.run_on_pixels()
        except Interrupted:
            return self._signals.request
        except UserError:
            if alone and step > self._setup.first_step:  # others may not know of it
                self.save(step)
            raise
        if step == 0:
            learned = {f'{name}{UNTRAINED}': value for name, value in learned.items()}
        learned |= pixels
        self.notes['results'] |= learned
        self.notes['evaluated'] = True
        self._monitor.events(learned, step=step)
        return 0

    def save(self, step: int) -> None:
        """Begin to save a checkpoint."""
        row = self._monitor.flush()
        state = self._setup.layout.gather(self.state)
        self._setup.checkpoints.save(step, state, self._setup.about | self.notes)
        self._last_save = time.monotonic()
        self.look(row)

    def stop(self, step: int, request: int) -> None:
        """Save a checkpoint and raise a StoppedError, which ends the run."""
        self.save(step)
        self._setup.checkpoints.close()
        with distributed.failing_together():
            self._monitor.check()
        raise StoppedError(step, by_user=request == STOP_FOR_USER)


def note_bad_images(bad_images: BadImages, batch: pipeline.Batch, monitor: Monitor) -> None:
    """Add the images of a step's batch that could not be read to the list.

    The processes communicate only in a step with such images, of which its news tell all of them.
    So all of them hold the same list, and stop at the same step.

    Raises:
      UserError: the list is too long; SaidElsewhereError on all processes but the first.
    """
    index, weight = distributed.rows_of_all(batch['index'], batch['weight'])
    with distributed.failing_together():
        for name in bad_images.update(index, weight):
            monitor.say(f'cannot be read, does not count: {name}')
