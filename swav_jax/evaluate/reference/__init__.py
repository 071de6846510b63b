"""Reference curves of recipes: how runs of a recipe go, and whether a run goes like them.

Beside this file is one NAME.json for each recipe, which `scripts/reference.py` writes: for each
curve and epoch the lowest, median and highest value over several seeds, with what made them.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from swav_jax.evaluate import records
from swav_jax.runs.results import PIXELS, UNTRAINED

FOLDER = Path(__file__).parent
LOGGED = ('loss_over_ln_k', 'active_prototypes', 'code_entropy', 'embedding_std')

# Settings that do not move the curves. Others than these make a run another recipe; those that say
# how features are judged are among the others, since they move the figures.
FREE = (
    'seed', 'recipe', 'choices', 'sharding', 'checkpoint', 'data.max_bad_fraction', 'model.remat',
    'train.max_steps', 'train.log_every_steps', 'train.on_nan', 'train.max_nan_skips',
    'train.on_collapse', 'train.collapse_patience',
    'evaluate.every_epochs', 'evaluate.batch_size', 'evaluate.report',
)  # fmt: skip

# A run of another seed leaves the range of five seeds at every third epoch, so the band is wider:
# by half its width on each side, and by at least 2% of the median, where seeds agree by chance.
WIDER, LEAST = 0.5, 0.02
INSIDE = 'inside the band'
OUTSIDE = 0.2  # a curve may leave the band at this share of its epochs

# What it usually means that a curve leaves the band.
MEANING = {
    ('loss_over_ln_k', 'above'): 'learns more slowly: another learning rate, softer codes, harder '
    'crops, or fewer images',
    ('loss_over_ln_k', 'below'): 'an easier task: larger crops, weaker distortions, or a sharper '
    'epsilon; it is good only if kNN accuracy does not suffer',
    ('active_prototypes', 'above'): 'a larger batch, or more prototypes',
    ('active_prototypes', 'below'): 'a smaller batch, or prototypes that die: the learning rate is '
    'too high or epsilon too large',
    ('code_entropy', 'above'): 'codes are softer: epsilon is larger, or embeddings are more alike',
    ('code_entropy', 'below'): 'codes are sharper: epsilon is smaller',
    ('embedding_std', 'above'): 'embeddings keep more differences between images: usually good',
    ('embedding_std', 'below'): 'embeddings become alike: the learning rate is too high, or the '
    'run collapses',
    ('knn_top1', 'above'): 'better features, or easier images',
    ('knn_top1', 'below'): 'worse features: look at the loss and at the prototypes first',
    ('linear_top1', 'above'): 'better features, or easier images',
    ('linear_top1', 'below'): 'worse features: look at the loss and at the prototypes first',
    ('prototypes_empty', 'above'): 'more prototypes than kinds of images, or prototypes that die',
    ('prototypes_near_duplicates', 'above'): 'more prototypes than kinds of images',
}

Rows = Sequence[Mapping[str, float]]
Curve = dict[float, float]  # value by epoch


@dataclass(frozen=True)
class Reference:
    """Curves of a recipe.

    Attributes:
      recipe, version, machine, command: what was run, with what, where, and how to repeat it.
      seeds: of the runs.
      config: their settings.
      steps_per_epoch: of the runs.
      curves: for each name an array (epochs, 4) of epoch, lowest, median and highest value.
    """

    recipe: str
    version: str
    machine: str
    command: str
    seeds: tuple[int, ...]
    config: Mapping[str, Any]
    steps_per_epoch: int
    curves: Mapping[str, np.ndarray]

    def bands(self) -> dict[str, np.ndarray]:
        """The curves to draw: the mean over an epoch belongs to its middle."""
        return {
            name: points - [0.5, 0, 0, 0] if name in LOGGED else points
            for name, points in self.curves.items()
        }


@dataclass(frozen=True)
class Verdict:
    """How a curve of a run lies to the band.

    Attributes:
      name: of the curve.
      epochs: number of epochs that were compared.
      outside: those outside the band.
      side: '' if the curve counts as inside, 'above', 'below', or 'on both sides of'.
    """

    name: str
    epochs: tuple[float, ...]
    outside: tuple[float, ...]
    side: str

    def __str__(self) -> str:
        if not self.side:
            return INSIDE
        if len(self.outside) == len(self.epochs):
            return f'{self.side} the band'
        first = self.outside[0]
        if self.outside == tuple(epoch for epoch in self.epochs if epoch >= first):
            return f'{self.side} the band from epoch {first:g} on'
        return f'{self.side} the band at {len(self.outside)} of {len(self.epochs)} epochs'


def read(recipe: str, folder: Path = FOLDER) -> Reference | None:
    """Return the reference curves of a recipe, or None if there are none.

    Raises:
      ValueError: the file is damaged.
    """
    if recipe not in {path.stem for path in folder.glob('*.json')}:
        return None
    try:
        content = json.loads((folder / f'{recipe}.json').read_bytes())
        curves = {
            name: np.array(points, float).reshape(-1, 4)
            for name, points in content.pop('curves').items()
        }
        if not all(np.isfinite(points).all() for points in curves.values()):
            raise ValueError('not finite')
        content['seeds'] = tuple(content['seeds'])
        return Reference(**content, curves=curves)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'the reference curves of {recipe!r} are damaged') from error


def curves(rows: Rows, events: Rows) -> dict[str, Curve]:
    """The curves of a run at its whole epochs.

    Of metrics.jsonl, an epoch's value is the mean over its rows: a single batch says little. Of
    online evaluations it is the value at the epoch's end; those before training are of epoch 0.
    Missing values are left out.
    """
    found: dict[str, Curve] = {}
    last = max((row.get('epoch') or 0 for row in rows), default=0)
    for name in LOGGED:
        values: dict[float, list[float]] = {}
        for row in rows:
            if row.get('epoch') is not None and row.get(name) is not None:
                values.setdefault(float(math.ceil(row['epoch'])), []).append(row[name])
        if curve := {epoch: fmean(x) for epoch, x in values.items() if 0 < epoch <= last}:
            found[name] = curve
    for row in events:
        epoch = row.get('epoch')
        for name, value in row.items():
            if name in ('step', 'epoch') or name.endswith(PIXELS) or value is None:
                continue  # the last are of the data, not of the run
            if epoch is not None and epoch % 1 == 0:
                found.setdefault(name.removesuffix(UNTRAINED), {})[float(epoch)] = value
    return found


def steps_per_epoch(rows: Rows) -> int | None:
    """Steps of an epoch by a log; None if no row has both."""
    known = [row for row in rows if row.get('epoch') and row.get('step')]
    return round(known[-1]['step'] / known[-1]['epoch']) if known else None


def band(runs: Sequence[Curve]) -> list[list[float]]:
    """Epoch, lowest, median and highest value, at the epochs that all runs have."""
    epochs = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    values = [[run[epoch] for run in runs] for epoch in epochs]
    return [[epoch, min(x), median(x), max(x)] for epoch, x in zip(epochs, values, strict=True)]


def compare(reference: Reference, found: Mapping[str, Curve]) -> Iterator[Verdict]:
    """Judge each curve that the reference has, at the epochs that the run has reached."""
    for name, points in reference.curves.items():
        curve = found.get(name, {})
        both = [point for point in points if point[0] in curve]
        if not both:
            continue
        sides = []
        for epoch, low, middle, high in both:
            margin = max(WIDER * (high - low), LEAST * abs(middle))
            value = curve[epoch]
            sides.append((value > high + margin) * 1 - (value < low - margin) * 1)
        epochs = tuple(float(point[0]) for point in both)
        out = tuple(epoch for epoch, side in zip(epochs, sides, strict=True) if side)
        side = ''
        if len(out) > OUTSIDE * len(both):
            side = 'above' if sum(sides) > 0 else 'below' if sum(sides) < 0 else 'on both sides of'
        yield Verdict(name, epochs, out, side)


def differences(reference: Reference, config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, the recipe's JSON and the run's of each setting that differs and moves the curves.

    Settings that only one of the two has are those of another version, and are left out.
    """
    theirs, ours = records.settings(reference.config), records.settings(config)
    free = tuple(f'config.{name}' for name in FREE)
    return [
        (name, theirs[name], ours[name])
        for name in theirs
        if name in ours
        and theirs[name] != ours[name]
        and not name.startswith(tuple(f'{each}.' for each in free))
        and name not in free
    ]
