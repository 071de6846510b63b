"""Pretrain a convnet with SwAV.

    python -m swav_jax.main --config FILE[:ARGUMENT] --workdir RUN [--config.SETTING=VALUE ...]

  --config   a file whose get_config() returns the settings, as configs/swav_r50.py. Some take an
             argument after a colon, as configs/swav_r50.py:800; the head of the file says which.
  --workdir  the folder of the run. A run that is found there goes on from its last checkpoint.
  --distributed
             this process is one of several that are one run; SLURM, Open MPI and Kubernetes tell
             it the rest. Started by other means, each process is told
             --coordinator=HOST:PORT --num_processes=N --process_id=I.
  --plan     say what the run will take and exit: batch, steps, learning rate, memory, FLOPs, bytes
             sent, host cores, with warnings. --replicas=64 plans for other devices than are here,
             --images_per_second=6000 for so fast an input.
  --force    go on with a run although the model, the optimizer or the data have changed.
  --profile=N  write a trace of N steps into RUN/profile, for TensorBoard or Perfetto.
  --help     this page and, with --config, every setting with its value.

  --config.data.source=folder:/imagenet/train --config.data.batchsize_per_replica=64
             set single settings of the file.

SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and end the run; a Ctrl-C after that ends it at once.

Exit codes: 0 done, or stopped by SIGTERM or SIGUSR1 with a checkpoint; 2 something to mend, said in
one line; 3 not a number or a collapse; 4 stopped by Ctrl-C with a checkpoint.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence

from ml_collections import ConfigDict

from swav_jax import cli
from swav_jax import config as settings
from swav_jax.cpu.host_memory import keep_freed_memory
from swav_jax.errors import RunFailedError, StoppedError, UserError
from swav_jax.runs.signals import Signals


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags that the module's docstring explains; `config` holds the settings, or None.

    Raises:
      UserError: a flag or a setting is not known, a value does not fit, or the file fails.
    """
    parser = cli.Parser(__doc__, changes=True, add_help=False)
    parser.add_argument('--config')
    parser.add_argument('--workdir', type=cli.new_folder)
    parser.add_argument('--coordinator')
    parser.add_argument('--num_processes', type=cli.integer(1))
    parser.add_argument('--process_id', type=cli.integer())
    parser.add_argument('--replicas', type=cli.integer(), default=0)
    parser.add_argument('--images_per_second', type=cli.number(1, 1e9), default=1000)
    parser.add_argument('--profile', type=cli.integer(), default=0)
    switch = dict(type=cli.boolean, nargs='?', const=True, default=False)
    for name in ('--distributed', '--plan', '--force'):
        parser.add_argument(name, **switch)
    parser.add_argument('-h', '--help', **switch)
    found = parser.parse(argv)
    found.config = cli.read_config(found.config, found.changes)
    return found


def main(argv: Sequence[str]) -> int:
    """Run what the command line says; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    flags = parse(argv)
    if flags.help:
        print(__doc__)
        for name, value in settings.flatten(flags.config or ConfigDict()):
            print(f'  --{name}={settings.to_dict(value)}')
        return 0
    if flags.config is None:
        raise UserError('--config is missing: name a file of settings, as configs/swav_r50.py')
    if flags.plan:
        from swav_jax.commands import plan

        plan.show(flags.config, flags.replicas, flags.images_per_second)
        return 0
    if not flags.workdir:
        raise UserError('--workdir is missing: name a folder for the run, as runs/first')
    keep_freed_memory()
    cli.go_on_without_output()
    with Signals() as signals:  # before JAX starts threads, to which signals would go instead
        # Late, so that --help and mistakes answer at once.
        from swav_jax.cpu import xla_settings

        xla_settings.set_defaults()
        alone = (flags.coordinator, flags.num_processes, flags.process_id) == (None, None, None)
        if alone and not flags.distributed:
            return _train(flags, signals)
        return _train_with_others(flags, signals)


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
        raise UserError(_out_of_memory(flags.config, error)) from error
    return 0


def _out_of_memory(config: ConfigDict, error: Exception) -> str:
    reason = str(error).strip().partition('\n')[0]
    return (
        f'the devices have too little memory ({reason}): lower config.data.batchsize_per_replica='
        f"{config.data.batchsize_per_replica}, or use config.model.remat='block', "
        "config.precision='bfloat16' or config.sharding='zero'; --plan says what each saves"
    )


def _train_with_others(flags: argparse.Namespace, signals: Signals) -> int:
    """Join the other processes and train; does not return where something fails."""
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
    """Say what ends this process; the exit code, and what the others should say of it."""
    line = cli.failure(error)
    if line is not None:
        cli.tell(line)
        return 2, line or str(error)
    reason = str(error).strip().partition('\n')[0]
    # A step on the CPU, made when it is called, raises what Gloo says as a ValueError.
    if type(error).__name__ == 'JaxRuntimeError' or 'Gloo' in str(error):
        line = f'another process has ended ({reason})'
        cli.tell(f'{line}: start all of them again, the run goes on from its last checkpoint')
    else:
        traceback.print_exc()
        line = f'{type(error).__name__}: {reason}'
    return 1, line


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
