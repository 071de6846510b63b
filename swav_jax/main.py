r"""Pretrain a convnet with SwAV.

    python -m swav_jax.main --config FILE[:WORDS] --workdir RUN [--config.SETTING=VALUE ...]

For example, on images of your own:

    python -m swav_jax.main --config configs/swav_r50.py --workdir runs/r50 \
        --config.data.source=folder:/imagenet/train --config.data.batchsize_per_replica=64

The same command resumes the run. SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and end it; a second
Ctrl-C ends it at once.

Exit codes: 0 done, or stopped by SIGTERM or SIGUSR1 with a checkpoint; 2 a mistake that you can
fix, reported in one line; 3 not a number, or a collapse; 4 stopped by Ctrl-C with a checkpoint.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence

from swav_jax import cli, commands
from swav_jax import config as settings
from swav_jax.cpu.host_memory import keep_freed_memory
from swav_jax.errors import RunFailedError, StoppedError, UserError
from swav_jax.runs.signals import Signals


def run(flags: argparse.Namespace) -> int:
    """Train, or print the plan; returns the exit code."""
    place = flags.coordinator, flags.num_processes, flags.process_id
    alone = not flags.distributed and place == (None, None, None)
    if alone:  # before JAX is imported; several processes check their settings together
        settings.validate(flags.config)
    if flags.plan:
        from swav_jax.commands import plan

        plan.show(flags.config, flags.replicas, flags.images_per_second, flags.memory)
        return 0
    if not flags.workdir:
        raise UserError('--workdir is missing: name a folder for the run, for example runs/first')
    keep_freed_memory()
    cli.go_on_without_output()
    with Signals() as signals:  # before JAX starts threads, which would get the signals instead
        from swav_jax import xla_flags

        xla_flags.set_defaults()
        return _train(flags, signals) if alone else _train_with_others(flags, signals)


def _train(flags: argparse.Namespace, signals: Signals) -> int:
    try:
        from swav_jax import training

        training.run(
            flags.config,
            flags.workdir,
            signals=signals,
            force=flags.force,
            profile=flags.profile,
        )
    except RunFailedError as error:
        cli.tell(str(error))
        return 3
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return 4 if stopped.by_user else 0
    except UserError:
        raise
    except Exception as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        rows = flags.config.data.batchsize_per_replica
        raise UserError(
            f'the devices have too little memory ({cli.first_line(error)}): divide '
            f'config.data.batchsize_per_replica={rows} and multiply config.train.micro_batches '
            '(BatchNorm then takes its statistics over fewer images), '
            "or use config.model.remat='block', config.precision='bfloat16' or "
            "config.sharding='zero'; --plan --memory=SIZE proposes numbers"
        ) from error
    return 0


def _train_with_others(flags: argparse.Namespace, signals: Signals) -> int:
    """Join the other processes and train; does not return if something fails."""
    from swav_jax.parallel import distributed, ending

    line = 'see its output'
    try:
        distributed.join(flags.coordinator, flags.num_processes, flags.process_id)
        code = _train(flags, signals)
    except Exception as error:
        code, line = _failure_beside_others(error)
    ending.leave(code, line)
    return code


def _failure_beside_others(error: Exception) -> tuple[int, str]:
    """Report what ends this process; returns the exit code and a line for the other processes."""
    line = cli.failure(error)
    if line is not None:
        cli.tell(line)
        return 2, line or str(error)
    reason = cli.first_line(error)
    # On the CPU an error of Gloo is a ValueError.
    if type(error).__name__ == 'JaxRuntimeError' or 'Gloo' in str(error):
        line = f'another process has ended ({reason})'
        cli.tell(f'{line}: start all of them again, and the run resumes from its last checkpoint')
    else:
        traceback.print_exc()
        line = f'{type(error).__name__}: {reason}'
    return 1, line


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags; `config` holds the settings.

    Raises:
      UserError: a flag or a setting is unknown, missing or out of range, or a file fails.
    """
    return commands.parse('train', argv)


def main(argv: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    return commands.main(['train', *argv])


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
