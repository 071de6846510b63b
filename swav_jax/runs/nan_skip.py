"""After a step that is not finite: the run ends, or skips the batches that led to it."""

import sys
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from swav_jax.errors import RunFailedError


class SkipBatches(NamedTuple):
    """Resume from the last checkpoint and skip the batches up to `last`, for the `count`th time."""

    last: int
    count: int


def after_nan(config: ConfigDict, folder: Path, step: int, batch: int, skips: int) -> SkipBatches:
    """End the run, or return the batches to skip.

    Args:
      config: the settings.
      folder: of the dump.
      step, batch: numbers of the step and of its batch.
      skips: how often batches were skipped before.

    Raises:
      RunFailedError: `config.train.on_nan` is 'stop', or batches were skipped too often.
    """
    again = f'python -m swav_jax.commands.replay {folder} shows it again'
    text = f'step {step:,} is not finite; {again}'
    most = config.train.max_nan_skips
    if config.train.on_nan == 'skip' and skips < most:
        if jax.process_index() == 0:
            print(f'{text}. Leaving out the batches since the last checkpoint', file=sys.stderr)
        return SkipBatches(batch, skips + 1)
    if config.train.on_nan == 'skip':
        text += f'. Batches were left out config.train.max_nan_skips={most} times already'
    raise RunFailedError(
        f'{text}. A lower learning rate (config.optimizer.param_schedulers.lr), a longer warm-up, '
        "config.precision='bfloat16' instead of float16 or config.train.on_nan='skip' may help"
    )


def batch_of_step(step: int, left_out: list[list[int]]) -> int:
    """Return the number of a step's batch, from 0.

    Args:
      step: from 1, after all skipped batches.
      left_out: (first, last) of each range of skipped batches.
    """
    return step - 1 + sum(last - first + 1 for first, last in left_out)
