"""Pretrain a convnet with SwAV.

    python -m swav_jax.main --config FILE[:ARGUMENT] --workdir RUN [--config.SETTING=VALUE ...]

  --config   a file whose get_config() returns the settings, as configs/swav_r50.py. Some take an
             argument after a colon, as configs/swav_r50.py:800; the head of the file says which.
  --workdir  the folder of the run. A run that is found there goes on from its last checkpoint.
  --help     this page and, with --config, every setting with its value.

  --config.data.source=folder:/imagenet/train --config.data.batchsize_per_replica=64
             set single settings of the file.

Exit codes: 0 done, 2 something to mend, said in one line.
"""

import difflib
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from swav_jax import config as settings
from swav_jax.errors import UserError
from swav_jax.host_memory import keep_freed_memory


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """The flags `config`, `workdir` and `help`.

    Raises:
      UserError: a flag or a setting is not known, a value does not fit, or the file fails.
    """
    _check_settings(argv, _load([arg for arg in argv if not _is_override(arg)]))
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    flags.DEFINE_string('workdir', None, 'Folder of the run.', flag_values=values)
    flags.DEFINE_bool('help', False, 'Explain.', short_name='h', flag_values=values)
    try:
        extra = values(argv)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error).replace('flag --config.', '--config.')) from error
    if extra:
        raise UserError(f'{extra[0]!r} is not a flag: flags begin with --, as --config=FILE')
    return values


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
    known = dict(flatten(config)) if names else {}
    for name in names:
        if name.partition('[')[0] not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
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


def flatten(config: ConfigDict, prefix: str = 'config') -> Iterator[tuple[str, object]]:
    """Every setting of a config with its full name, as ('config.loss.epsilon', 0.05)."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f'{prefix}.{key}')
        else:
            yield f'{prefix}.{key}', value


def main(argv: Sequence[str]) -> int:
    """Run what the command line says; returns the exit code."""
    try:
        values = parse(argv)
        if values.help:
            print(__doc__)
            for name, value in flatten(values.config or ConfigDict()):
                print(f'  --{name}={settings.to_dict(value)}')
            return 0
        if values.config is None:
            raise UserError('--config is missing: name a file of settings, as configs/swav_r50.py')
        if not values.workdir:
            raise UserError('--workdir is missing: name a folder for the run, as runs/first')
        keep_freed_memory()
        from swav_jax import train  # late, so that --help and mistakes in flags answer at once

        train.run(values.config, values.workdir)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
