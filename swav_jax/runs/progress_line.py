"""What a terminal shows of a run: a line of progress, and the summary as a table."""

import math
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from swav_jax.runs.results import WITHOUT_TRAINING, without_end

_SECONDS_BETWEEN_LINES = 30  # where the output is not a terminal


class ProgressLine:
    """A line that moves on a terminal; elsewhere a plain line every so often."""

    def __init__(self, console: Console, total: int, first: int):
        self._console = console
        self._said_at = -math.inf
        self._total = total
        self._progress = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._progress = Progress(
                BarColumn(bar_width=16),
                TextColumn('{task.description}', markup=False),
                console=console,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task('compiling …', total=total, completed=first)
            self._progress.start()

    def move(self, step: int) -> None:
        """Advance the bar."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def tell(self, step: int, text: str) -> None:
        """Show the text of a logged step."""
        if self._progress:
            self._progress.update(self._task, description=text)
        elif step == self._total or time.monotonic() - self._said_at > _SECONDS_BETWEEN_LINES:
            self._said_at = time.monotonic()
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Give the terminal back."""
        if self._progress:
            self._progress.stop()

    def table(self, summary: Mapping[str, Any]) -> None:
        """Print names and values, beside a result what it is without training."""
        ends = [end for end in WITHOUT_TRAINING if any(name.endswith(end) for name in summary)]
        names = dict.fromkeys(without_end(name) for name in summary)
        table = Table(show_header=bool(ends))
        table.add_column()
        for title in ('this run', *(WITHOUT_TRAINING[end] for end in ends)):
            table.add_column(title, justify='right')
        for name in names:
            table.add_row(name, *(_shown(summary.get(f'{name}{end}', '')) for end in ('', *ends)))
        self._console.print(table)


def _shown(value: Any) -> str:
    return f'{value:,.4g}' if isinstance(value, float) else str(value)


def sentence(row: Mapping[str, Any], total: int, seconds_left: float | None) -> str:
    """A row of metrics.jsonl as the text of the line."""
    text = (
        f'step {row["step"]}/{total}  epoch {row["epoch"]:.2f}  loss {row["loss"]:.4f}  '
        f'lr {row["lr"]:.3g}'
    )
    if seconds_left is None:
        return text
    minutes, seconds = divmod(round(seconds_left), 60)
    time_left = f'{minutes // 60}:{minutes % 60:02}:{seconds:02}'
    return f'{text}  {row["images_per_second"]:,.0f} images/s  {time_left} left'
