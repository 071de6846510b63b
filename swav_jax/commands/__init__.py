"""All commands by name: `swav_jax NAME FLAGS`, or `python -m` and the module of that command."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from swav_jax import cli
from swav_jax.errors import UserError

# The module whose `main` a name calls, with flags that the name stands for, and what it does. None
# is imported before it is called for: a mistake is told at once, without JAX and TensorFlow.
COMMANDS = {
    'train': ('swav_jax.main', [], 'pretrain a network, or resume a run'),
    'plan': ('swav_jax.main', ['--plan'], 'what a run will take: batch, steps, memory, FLOPs'),
    'preview': ('swav_jax.commands.preview', [], 'a picture of what the network sees'),
    'knn': ('swav_jax.evaluate.knn', [], 'weighted kNN accuracy of the features'),
    'linear': ('swav_jax.evaluate.linear', [], 'accuracy of a linear probe'),
    'semi': ('swav_jax.evaluate.semi', [], 'accuracy of fine-tuning on a share of the labels'),
    'clusters': ('swav_jax.evaluate.clusters', [], 'which image belongs to which prototype'),
    'features': ('swav_jax.evaluate.features', [], 'features, embeddings and scores as arrays'),
    'report': ('swav_jax.evaluate.report', [], 'one HTML page of what a run learned'),
    'export': ('swav_jax.export', [], "a run's weights as a file for PyTorch"),
    'replay': ('swav_jax.commands.replay', [], 'a step that was not finite, once more'),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, with the flags after it; returns the exit code.

    Args:
      argv: the words (default: those of the process, whose name in usage lines becomes
        `swav_jax NAME`).
    """
    if argv is None:
        argv = sys.argv[1:]
        sys.argv[:2] = [' '.join(['swav_jax', *argv[:1]])]
    if not argv or argv[0] not in COMMANDS:
        return cli.run(_list_or_refuse, argv)
    cli.quiet_libraries()
    module, flags, _ = COMMANDS[argv[0]]
    return importlib.import_module(module).main([*flags, *argv[1:]])


def run(name: str) -> NoReturn:
    """Run a command with the flags of the process, and exit: what `python -m` its module does."""
    sys.exit(main([name, *sys.argv[1:]]))


def _list_or_refuse(argv: Sequence[str]) -> None:
    if argv and argv[0] in ('-h', '--help'):
        print('usage: swav_jax COMMAND [--help] [FLAGS]\n')
        for name, (_, _, does) in COMMANDS.items():
            print(f'  {name:<10}{does}')
        return
    if not argv:
        raise UserError('the name of a command is missing: see swav_jax --help')
    near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
    hint = f'. Did you mean: {near[0]}?' if near else ': see swav_jax --help'
    raise UserError(f'{argv[0]!r} is not a command{hint}')
