"""Training: `run`, from the settings to the results."""

import contextlib
from pathlib import Path

from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax import methods
from swav_jax.evaluate.online import Results
from swav_jax.parallel import distributed
from swav_jax.runs.nan_skip import SkipBatches
from swav_jax.runs.signals import Signals
from swav_jax.runs.workdir import explained, locked, open_workdir
from swav_jax.training.loop import train
from swav_jax.training.setup import set_up


def run(
    config: ConfigDict,
    workdir: str | Path,
    *,
    signals: Signals | None = None,
    force: bool = False,
    profile: int = 0,
) -> Results:
    """Train with `config`, or resume the run in `workdir`.

    Writes config.json, metrics.jsonl, events.jsonl, tensorboard/, checkpoints/ and summary.json
    into `workdir`; with `config.evaluate.report` the page and the pictures of `evaluate.report`;
    and nan_dump/ if a step is not finite.

    Args:
      config: the settings.
      workdir: the run's folder.
      signals: entered; a signal ends the run with a checkpoint.
      force: resume also with settings or data that do not fit what was learned.
      profile: number of steps to trace, into profile/.

    Returns:
      The content of summary.json.

    Raises:
      UserError: a setting, the data or the folder cannot work.
      RunFailedError: not a number, or a collapse.
      StoppedError: a signal came; a checkpoint is saved.
    """
    with distributed.failing_together():
        settings.validate(config)
        methods.make(config).check()
    distributed.check_same_settings(config)
    with contextlib.ExitStack() as stack:
        with distributed.failing_together():
            workdir = open_workdir(workdir)
            stack.enter_context(explained(workdir))
            stack.enter_context(locked(workdir))
        skip = None
        while True:
            setup = set_up(config, workdir, force, skip)
            result = train(setup, signals or Signals(), profile)
            if not isinstance(result, SkipBatches):
                return result
            skip = result
            del setup  # and its arrays
