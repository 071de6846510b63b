"""What the command lines of `python -m swav_jax.evaluate.…` have in common."""

import argparse
from collections.abc import Callable, Sequence

from swav_jax import cli
from swav_jax import config as settings
from swav_jax.errors import UserError


def parser(description: str, *, weights: bool = True) -> cli.Parser:
    """A parser with the flags that say which network and how many images.

    Args:
      description: what --help says first.
      weights: whether PyTorch weights will do; else it has to be a run.
    """
    made = cli.Parser(description, changes=True)
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument('--workdir', type=cli.path, help='folder of a run')
    if weights:
        which.add_argument('--weights', type=cli.path, help='PyTorch weights: .pth, .safetensors')
        made.add_argument('--config', help='with --weights: the config file of their network')
    made.add_argument('--step', type=cli.integer(), help='which checkpoint (default: the newest)')
    made.add_argument(
        '--limit', type=cli.integer(), default=0, help='use N images, evenly spread (0: all)'
    )
    made.epilog = 'Settings can be changed, as --config.evaluate.size=160.'
    return made


def run(main: Callable[[argparse.Namespace], None], made: cli.Parser, argv: Sequence[str]) -> int:
    """Parse the command line, call `main`, and return the exit code: 2 for the user's mistakes.

    Args:
      main: does what the flags say.
      made: of `parser`, with more flags.
      argv: the flags.
    """
    return cli.run(lambda words: main(made.parse(words)), argv)


def load(arguments: argparse.Namespace):
    """The model that the command line names, with the settings that it changes.

    Raises:
      UserError: it cannot be loaded, or a setting is not known.
    """
    from swav_jax.evaluate import model

    for flag, needs in (('config', 'weights'), ('step', 'workdir')):
        if getattr(arguments, flag, None) is not None and not getattr(arguments, needs, None):
            raise UserError(f'--{flag}={getattr(arguments, flag)} goes with --{needs}')
    if arguments.workdir:
        return model.load(arguments.workdir, step=arguments.step, changes=arguments.changes)
    config = cli.load_config(arguments.config) if arguments.config else settings.default()
    return model.load_weights(arguments.weights, cli.override(config, arguments.changes))
