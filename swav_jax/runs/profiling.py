"""`--profile`: a trace of a few steps, for TensorBoard's profile plugin or Perfetto."""

from pathlib import Path

import jax

SKIPPED = 3  # steps after a start, which compile and fill queues


class Profile:
    """Traces `steps` steps after the first few; leaving the `with` ends an unfinished trace.

    Args:
      folder: for the trace.
      first_step: steps done before.
      steps: number of steps to trace, or 0.
    """

    def __init__(self, folder: Path, first_step: int, steps: int):
        self._folder = folder
        self._first, self._last = first_step + SKIPPED + 1, first_step + SKIPPED + steps
        self._running = False

    def __enter__(self) -> 'Profile':
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Call it before every step."""
        if self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Call it after every step, with the step's metrics."""
        if self._running and step >= self._last:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
