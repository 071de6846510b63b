"""What the evaluation commands have in common: opening a network and its images, and notes."""

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from swav_jax.data.images import Source
from swav_jax.errors import UserError, printable
from swav_jax.evaluate import extraction, labelled
from swav_jax.evaluate import model as models
from swav_jax.evaluate.extraction import Features
from swav_jax.evaluate.model import Model


def load(flags: argparse.Namespace) -> Model:
    """Load the network that the flags name, with the settings that they change.

    Raises:
      UserError: it cannot be loaded, or a setting is unknown.
    """
    if flags.workdir:
        return models.load(flags.workdir, step=flags.step, changes=flags.changes)
    return models.load_weights(flags.weights, flags.config)


def open_source(model: Model, spec: str, limit: int) -> Source:
    """Open images and print the notes on them.

    Raises:
      UserError: there are none.
    """
    source = model.open(spec, limit)
    say(source.notes)
    return source


def open_pair(model: Model, flags: argparse.Namespace) -> tuple[Source, Source]:
    """Open the images of --train and --test, match their classes, and print what is left out.

    Raises:
      UserError: there are none, or their classes cannot be matched.
    """
    opened, names = [], []
    for flag in ('train', 'test'):
        spec = getattr(flags, flag) or model.config.evaluate[f'{flag}_source']
        if not spec:
            raise UserError(f'--{flag} is missing: name labelled images, as folder:/path/{flag}')
        opened.append(model.open(spec, flags.limit))
        names.append(f'--{flag}={spec}')
        say(f'{names[-1]}: {note}' for note in opened[-1].notes)
    pair = labelled.pair(*opened, names)
    say(pair.notes)
    return pair.train, pair.test


def extract(model: Model, source: Source, **options: Any) -> Features:
    """Compute features with a progress bar, and print a note on images that cannot be read.

    Raises:
      UserError: as `extraction.check` does.
    """
    found = model.extract(source, progress=True, **options)
    say(extraction.check(found, source, model.config))
    return found


def say(notes: Iterable[str]) -> None:
    """Print lines to stderr."""
    for note in notes:
        print(f'note: {printable(note)}', file=sys.stderr)
