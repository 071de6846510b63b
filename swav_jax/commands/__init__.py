"""All commands by name: `swav_jax NAME FLAGS`, or `python -m` and the module of that command."""

import argparse
import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import NoReturn

from swav_jax import cli
from swav_jax.cli import flags
from swav_jax.errors import UserError

# By name: the module whose `run` does the work, how the flags are parsed, what the command does.
# The module is imported once the flags are right, so mistakes are reported without loading JAX.
COMMANDS = {
    'train': ('swav_jax.main', flags.train, 'pretrain a network, or resume a run'),
    'plan': ('swav_jax.main', flags.plan, 'what a run will take: batch, steps, memory, FLOPs'),
    'preview': ('swav_jax.commands.preview', flags.preview, 'a picture of what the network sees'),
    'knn': ('swav_jax.evaluate.knn', flags.knn, 'weighted kNN accuracy of the features'),
    'linear': ('swav_jax.evaluate.linear', flags.linear, 'accuracy of a linear probe'),
    'semi': ('swav_jax.evaluate.semi', flags.semi, 'accuracy of fine-tuning on few labels'),
    'clusters': ('swav_jax.evaluate.clusters', flags.clusters, 'the prototype of each image'),
    'features': ('swav_jax.evaluate.features', flags.features, 'features of images as arrays'),
    'report': ('swav_jax.evaluate.report', flags.report, 'one HTML page of what a run learned'),
    'compare': ('swav_jax.evaluate.compare', flags.compare, 'one HTML page over several runs'),
    'export': ('swav_jax.export', flags.export, "a run's weights as a file for PyTorch"),
    'replay': ('swav_jax.commands.replay', flags.replay, 'run a step that was not finite again'),
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
    return cli.run(_main, argv)


def run(name: str) -> NoReturn:
    """Run a command with the flags of the process and exit, like `python -m` with its module."""
    sys.exit(main([name, *sys.argv[1:]]))


def parse(name: str, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of a command.

    Raises:
      UserError: a flag or a setting is unknown, missing or out of range, or a file fails.
    """
    module, parse_flags, _ = COMMANDS[name]
    return parse_flags(cli.Parser(_page(module)), argv)


def _main(argv: Sequence[str]) -> int | None:
    if not argv:
        raise UserError('the name of a command is missing: see swav_jax --help')
    name, *words = argv
    if name in ('-h', '--help'):
        print('usage: swav_jax COMMAND [--help] [FLAGS]\n')
        for command, (_, _, does) in COMMANDS.items():
            print(f'  {command:<10}{does}')
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f'. Did you mean: {near[0]}?' if near else ': see swav_jax --help'
        raise UserError(f'{name!r} is not a command{hint}')
    found = parse(name, words)
    return importlib.import_module(COMMANDS[name][0]).run(found)


def _page(module: str) -> str:
    """The docstring of a module, read without importing it."""
    source = importlib.util.find_spec(module).loader.get_source(module)
    return ast.get_docstring(ast.parse(source))
