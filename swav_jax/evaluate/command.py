"""What the command lines of `python -m swav_jax.evaluate.…` have in common."""

import argparse
import ast
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax.errors import UserError


def parser(description: str, *, weights: bool = True) -> argparse.ArgumentParser:
    """A parser with the flags that say which network and how many images.

    Args:
      description: what --help says first.
      weights: whether PyTorch weights will do; else it has to be a run.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument('--workdir', help='folder of a run')
    if weights:
        which.add_argument('--weights', help='PyTorch weights: .pth or .safetensors')
        made.add_argument('--config', help='with --weights: the config file of their network')
    made.add_argument('--step', type=int, help='which checkpoint of the run (default: newest)')
    made.add_argument('--limit', type=int, default=0, help='use N images, evenly spread (0: all)')
    made.epilog = 'Settings of the run can be changed, as --config.evaluate.size=160.'
    return made


def run(
    main: Callable[[argparse.Namespace], None],
    made: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the command line, call `main`, and return the exit code: 2 for the user's mistakes."""
    arguments, rest = made.parse_known_args(argv)
    try:
        for argument in rest:
            if not argument.startswith('--config.'):
                raise UserError(f'{argument!r} is not known: see --help')
        arguments.changes = rest
        main(arguments)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


def load(arguments: argparse.Namespace):
    """The model that the command line names, with the settings that it changes.

    Raises:
      UserError: it cannot be loaded, or a setting is not known.
    """
    from swav_jax.evaluate import model

    if arguments.workdir:
        loaded = model.load(arguments.workdir, step=arguments.step)
    else:
        loaded = model.load_weights(arguments.weights, read_config(arguments.config))
    for change in arguments.changes:
        name, _, value = change.removeprefix('--config.').partition('=')
        _set(loaded.config, name, value)
    settings.validate(loaded.config)
    return loaded


def read_config(spec: str | None) -> ConfigDict:
    """The settings of a config file, FILE or FILE:ARGUMENT, or the defaults, VISSL's ResNet-50.

    Raises:
      UserError: there is no such file, or it fails.
    """
    if spec is None:
        return settings.default()
    path, _, argument = spec.partition(':')
    if not Path(path).is_file():
        raise UserError(f'--config={path}: there is no such file; see configs/ for some')
    try:
        return runpy.run_path(path)['get_config'](argument)
    except Exception as error:  # the file is the user's own Python
        raise UserError(f'--config={spec}: {type(error).__name__}: {error}') from error


def _set(config: ConfigDict, name: str, text: str) -> None:
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    *folders, leaf = name.split('.')
    try:
        for folder in folders:
            config = config[folder]
        config[leaf] = value
    except (AttributeError, KeyError, TypeError) as error:
        reason = ' '.join(str(error).split()).strip('"\'')
        raise UserError(f'--config.{name}={text}: {reason}') from error
