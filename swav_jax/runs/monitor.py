"""What a run reports: the progress line, metrics.jsonl, TensorBoard, the summary.

No step waits for a report: metrics stay on the devices and are fetched at the next logged step,
when they have long been computed. Process 0 writes; the others only fetch, which keeps them from
running ahead of their devices.
"""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from swav_jax import files
from swav_jax.runs.progress_line import ProgressLine, sentence
from swav_jax.runs.rows import Rows, put_aside_if_no_json, read_rows
from swav_jax.runs.tensorboard import TensorBoard
from swav_jax.runs.workdir import explanation

_COLUMNS = ('epoch', 'loss', 'lr', 'images_per_second', 'data_wait', 'loss_over_ln_k')
_MOST_WAITING = 0.05  # share of the time that devices may wait for data without a warning


class Monitor:
    """Metrics of a run in `workdir`.

    Args:
      workdir: gets metrics.jsonl, events.jsonl, tensorboard/ and, at the end, summary.json.
      total_steps, steps_per_epoch: of the run.
      batch_size: images a step, over all processes.
      num_prototypes: K, or that of each head; ln K is the loss of a model that cannot tell images
        apart.
      log_every_steps: steps between logged ones; the first and the last step are logged too.
      first_step: steps done before, when a run is resumed. Rows of later steps are dropped, since
        those steps are run again; a damaged file is set aside.
      console: where to print (default: stdout).

    Attributes:
      failure: why metrics.jsonl or events.jsonl can no longer be written, or None. It is not raised
        at once, so that the run can save its state; `finish` and `check` raise it.

    Raises:
      OSError: `workdir` cannot be written.
    """

    def __init__(
        self,
        workdir: Path | str,
        *,
        total_steps: int,
        steps_per_epoch: int,
        batch_size: int,
        num_prototypes: int | Sequence[int],
        log_every_steps: int,
        first_step: int = 0,
        console: Console | None = None,
    ):
        self._workdir = Path(workdir)
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._ln_k = float(np.mean(np.log(num_prototypes)))
        self._log_every_steps = log_every_steps
        self._pending: dict[str, Any] | None = None
        self._logged_step, self._logged_at, self._waited = first_step, time.monotonic(), 0.0
        self._writes = jax.process_index() == 0
        self._has_compiled = self._warned = self._closed = False
        self.failure: OSError | None = None
        if self._writes:
            self._metrics = Rows(self._workdir / 'metrics.jsonl')
            self._events = Rows(self._workdir / 'events.jsonl')
            damaged = [
                self._metrics.keep(first_step, _COLUMNS),
                self._events.keep(first_step),
                put_aside_if_no_json(self._workdir / 'summary.json'),
            ]
            self._tensorboard = TensorBoard(self._workdir / 'tensorboard', first_step + 1)
            self._line = ProgressLine(console or Console(), total_steps, first_step)
            for line in filter(None, damaged):
                self.say(line)

    def __enter__(self) -> 'Monitor':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(
        self, step: int, metrics: Mapping[str, jax.Array], data_wait: float = 0.0
    ) -> dict[str, Any] | None:
        """Record a step; call it after every one.

        Args:
          step: steps done, including this one.
          metrics: scalars, at least `loss` and `lr`, the same on all devices.
          data_wait: seconds that the step waited for its batch.

        Returns:
          The row of the *previously* logged step if this one is logged, else None.
        """
        self._waited += data_wait
        if self._writes:
            self._line.move(step)
        if step % self._log_every_steps and step not in (1, self._total_steps):
            return None
        now, steps = time.monotonic(), step - self._logged_step
        row = self.flush()
        self._pending = {
            'step': step,
            'epoch': round(step / self._steps_per_epoch, 4),
            'images_per_second': round(steps * self._batch_size / (now - self._logged_at), 2),
            'data_wait': round(self._waited / steps, 6),
            'metrics': metrics,
        }
        self._logged_step, self._logged_at, self._waited = step, now, 0.0
        return row

    def flush(self) -> dict[str, Any] | None:
        """Write the last logged step's row now, if it is not written yet, and return it.

        Call it before a checkpoint is saved: a run that resumes from there does not repeat the
        step, so its row has to be on disk.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        metrics = {name: float(x) for name, x in jax.device_get(pending.pop('metrics')).items()}
        loss, lr = metrics.pop('loss'), metrics.pop('lr')
        row = {'step': pending.pop('step'), 'epoch': pending.pop('epoch'), 'loss': loss, 'lr': lr}
        row |= pending | {'loss_over_ln_k': loss / self._ln_k} | dict(sorted(metrics.items()))
        if self._writes:
            self._note(self._metrics, row)
            self._line.tell(row['step'], sentence(row, self._total_steps, self._left(row)))
            self._warn_of_waiting(row)
            self._has_compiled = True
        return row

    def _left(self, row: Mapping[str, Any]) -> float | None:
        """Seconds to the end at a row's speed; unknown from the row that includes compilation."""
        images = (self._total_steps - row['step']) * self._batch_size
        return images / row['images_per_second'] if self._has_compiled else None

    def _warn_of_waiting(self, row: Mapping[str, Any]) -> None:
        """Report once that the devices wait for data, and what helps."""
        share = row['data_wait'] * row['images_per_second'] / self._batch_size
        if self._has_compiled and share > _MOST_WAITING and not self._warned:
            self._warned = True
            self.say(
                f'the devices wait for data in {share:.0%} of the time: more CPU cores, a faster '
                'disk or a smaller config.data.canvas_size help'
            )

    def events(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers that few steps have, such as the accuracy of a kNN classifier."""
        if self._writes and values:
            epoch = round(step / self._steps_per_epoch, 4)
            self._note(self._events, {'step': step, 'epoch': epoch} | dict(values))
            numbers = ', '.join(f'{name} {value:.4g}' for name, value in values.items())
            self.say(f'step {step}/{self._total_steps}  {numbers}')

    def _note(self, rows: Rows, row: dict[str, Any]) -> None:
        """Write a row into its file and, as far as that works, into TensorBoard."""
        try:
            rows.append(row)
        except OSError as error:
            self.failure = self.failure or error
        if self._tensorboard is None:
            return
        try:
            for name, value in row.items():
                if name != 'step' and math.isfinite(value):
                    self._tensorboard.scalar(name, value, row['step'])
        except OSError as error:
            self._tensorboard.close()
            self._tensorboard = None
            self.say(f'TensorBoard gets no more events: {error.strerror}')

    def check(self) -> None:
        """Raise a UserError if rows could not be written."""
        if self.failure is not None:
            raise explanation(self.failure, self._workdir) from self.failure

    def say(self, text: str) -> None:
        """Print lines that stay, above the progress line."""
        if self._writes:
            self._line.say(text)

    def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write summary.json, print it as a table, and close.

        Args:
          summary: results beyond those that follow from metrics.jsonl.

        Returns:
          All of them: steps, epochs, loss_first, loss_last, loss_last_over_ln_k, images_per_second
          (the median over the logged steps) and data_wait_share (of the time), then `summary`.

        Raises:
          UserError: rows could not be written.
          OSError: summary.json cannot be written.
        """
        self.flush()
        self.check()
        if not self._writes:
            return dict(summary)
        rows = read_rows(self._workdir / 'metrics.jsonl', _COLUMNS)
        summary = _in_short(rows, self._batch_size) | summary
        with files.replacing(self._workdir / 'summary.json') as path:
            path.write_text(json.dumps(summary, indent=2) + '\n')
        self.close()
        self._line.table(summary)
        return summary

    def close(self) -> None:
        """Close TensorBoard's file and give the terminal back; harmless when called twice."""
        if self._writes and not self._closed:
            self._closed = True
            self._line.stop()
            if self._tensorboard is not None:
                self._tensorboard.close()


def _in_short(rows: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    if not rows:
        return {'steps': 0}
    steady = rows[1:] or rows  # the first one holds the compilation
    rate = _median(steady, 'images_per_second')
    return {
        'steps': rows[-1]['step'],
        'epochs': rows[-1]['epoch'],
        'loss_first': rows[0]['loss'],
        'loss_last': rows[-1]['loss'],
        'loss_last_over_ln_k': rows[-1]['loss_over_ln_k'],
        'images_per_second': rate,
        'data_wait_share': _median(steady, 'data_wait') * rate / batch_size,
    }


def _median(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.median([row[name] for row in rows if row[name] is not None] or [0.0])
