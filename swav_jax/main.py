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

import difflib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from swav_jax import config as settings
from swav_jax.errors import RunFailedError, SaidElsewhereError, StoppedError, UserError
from swav_jax.host_memory import keep_freed_memory
from swav_jax.signals import Signals


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """The command line: `config` and the flags that the module's docstring explains.

    Raises:
      UserError: a flag or a setting is not known, a value does not fit, or the file fails.
    """
    _check_settings(argv, _load([arg for arg in argv if not _is_override(arg)]))
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    flags.DEFINE_string('workdir', None, 'Folder of the run.', flag_values=values)
    flags.DEFINE_bool('distributed', False, 'Train with other processes.', flag_values=values)
    flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0.', flag_values=values)
    flags.DEFINE_integer('num_processes', None, 'How many.', 1, flag_values=values)
    flags.DEFINE_integer('process_id', None, 'Number of this one.', 0, flag_values=values)
    flags.DEFINE_bool('plan', False, 'Say what the run will take.', flag_values=values)
    flags.DEFINE_integer('replicas', 0, 'Devices to plan for.', 0, flag_values=values)
    flags.DEFINE_float('images_per_second', 1000, 'Planned input.', 1, flag_values=values)
    flags.DEFINE_integer('profile', 0, 'Steps to trace.', 0, flag_values=values)
    flags.DEFINE_bool('force', False, 'Go on all the same.', flag_values=values)
    flags.DEFINE_bool('help', False, 'Explain.', short_name='h', flag_values=values)
    try:
        extra = values(argv)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error).replace('flag --config.', '--config.')) from error
    if extra:
        raise UserError(f'{extra[0]!r} is not a flag: flags begin with --, as --config=FILE')
    return values


def _is_distributed(values: flags.FlagValues) -> bool:
    alone = (values.coordinator, values.num_processes, values.process_id) == (None, None, None)
    return values.distributed or not alone


def _load(argv: Sequence[str]) -> ConfigDict | None:
    """The settings as the file has them; None where no file is named."""
    values = flags.FlagValues()
    file = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    try:
        values(argv, known_only=True)
        if values['config'].present:
            path = Path(config_flags.get_config_filename(values['config']))
            if not path.is_file():
                raise UserError(f'--config={path}: there is no such file; see configs/ for some')
        return file.value
    except UserError:
        raise
    except Exception as error:  # the file is the user's own Python
        raise UserError(f'--config: {_where(error)}') from error


def _check_settings(argv: Sequence[str], config: ConfigDict | None) -> None:
    """Refuse a --config.… that the file does not have."""
    names = [arg.lstrip('-').partition('=')[0] for arg in argv if _is_override(arg)]
    if names and config is None:
        raise UserError(f'--{names[0]} needs a --config that it can change')
    known = dict(settings.flatten(config)) if names else {}
    for name in names:
        if name.partition('[')[0] not in known:
            last = name.rpartition('.')[2]
            same = [n for n in known if n.rpartition('.')[2] == last]  # in another section
            near = difflib.get_close_matches(name, same or known, n=1, cutoff=0)[0]
            raise UserError(f'--{name} is not a setting; the nearest one is --{near}')


def _is_override(arg: str) -> bool:
    return arg.startswith(('--config.', '-config.'))


def _where(error: Exception) -> str:
    """One line that says what failed in a config file, and where."""
    if isinstance(error, SyntaxError):
        return f'{error.filename}, line {error.lineno}: {error.msg}: {(error.text or "").strip()}'
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f for f in reversed(frames) if f.name == 'get_config'), frames[-1])
    what = ' '.join(str(error).partition(' Other fields')[0].split()).strip('\'"')
    return f'{place.filename}, line {place.lineno}: {type(error).__name__}: {what}'


def main(argv: Sequence[str]) -> int:
    """Run what the command line says; returns the exit code."""
    try:
        values = parse(argv)
        if values.help:
            print(__doc__)
            for name, value in settings.flatten(values.config or ConfigDict()):
                print(f'  --{name}={settings.to_dict(value)}')
            return 0
        if values.config is None:
            raise UserError('--config is missing: name a file of settings, as configs/swav_r50.py')
        if values.plan:
            from swav_jax import plan

            plan.show(values.config, values.replicas, values.images_per_second)
            return 0
        if not values.workdir:
            raise UserError('--workdir is missing: name a folder for the run, as runs/first')
    except UserError as error:
        return _tell(error)
    keep_freed_memory()
    with Signals() as signals:  # before JAX starts threads, to which signals would go instead
        from swav_jax import xla_settings  # late, so that --help and mistakes answer at once

        xla_settings.set_defaults()
        if not _is_distributed(values):
            return _train(values, signals)
        return _train_with_others(values, signals)


def _train(values: flags.FlagValues, signals: Signals) -> int:
    try:
        from swav_jax import train

        train.run(
            values.config,
            values.workdir,
            signals=signals,
            force=values.force,
            profile=values.profile,
        )
    except UserError as error:
        return _tell(error)
    except RunFailedError as error:
        print(f'error: {error}', file=sys.stderr)
        return 3
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return 4 if stopped.by_user else 0
    except Exception as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return _tell(UserError(_out_of_memory(values.config, error)))
    return 0


def _out_of_memory(config: ConfigDict, error: Exception) -> str:
    reason = str(error).strip().partition('\n')[0]
    return (
        f'the devices have too little memory ({reason}): lower config.data.batchsize_per_replica='
        f"{config.data.batchsize_per_replica}, or use config.model.remat='block', "
        "config.precision='bfloat16' or config.sharding='zero'; --plan says what each saves"
    )


def _train_with_others(values: flags.FlagValues, signals: Signals) -> int:
    """Join the other processes and train; does not return where something fails.

    At a regular exit JAX would wait minutes for the other processes, which may wait for this one.
    """
    from swav_jax import distributed

    try:
        distributed.join(values.coordinator, values.num_processes, values.process_id)
        code = _train(values, signals)
    except UserError as error:
        code = _tell(error)
    except Exception as error:
        code = 1
        # A step on the CPU, made when it is called, raises what Gloo says as a ValueError.
        if type(error).__name__ == 'JaxRuntimeError' or 'Gloo' in str(error):
            reason = str(error).strip().partition('\n')[0]
            print(
                f'error: another process has ended ({reason}): start all of them again, the run '
                'goes on from its last checkpoint',
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        if distributed.is_first():
            time.sleep(10)  # the others abort when its coordination service ends before they do
        os._exit(code)
    return code


def _tell(error: UserError) -> int:
    """Print what the user can mend, once over all processes; returns the exit code."""
    if not isinstance(error, SaidElsewhereError):
        print(f'error: {error}', file=sys.stderr)
    return 2


if __name__ == '__main__':
    sys.exit(main(sys.argv))
