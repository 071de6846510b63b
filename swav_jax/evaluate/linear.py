r"""Linear probe: a linear classifier on frozen features, trained on labelled images.

    python -m swav_jax.evaluate.linear --workdir RUN --train folder:/imagenet/train \
        --test folder:/imagenet/val [--preset vissl] [--crop_scale none]

Presets:

    swav   100 epochs, learning rate 0.3 for 256 images, half a cosine, weight decay 1e-6
           (eval_linear.py of facebookresearch/swav)
    vissl  28 epochs, 0.01 times 0.1 after 8, 16 and 24 of them, weight decay 5e-4, Nesterov,
           BatchNorm on the features (VISSL's eval_resnet_8gpu_transfer_in1k_linear.yaml, on the
           pooled features)
    logistic  no SGD: the optimum on the features of the images' centres, like scikit-learn's
           LogisticRegression, in minutes

The first two see random resized crops, flipped half of the time; with --crop_scale none they see
the centres, too, whose features are computed once. The accuracy is that after the last epoch, not
the best one on the way. An interrupted probe is resumed from its last epoch.
"""

if __name__ == '__main__':  # before the imports, so that mistakes are reported without them
    from swav_jax import commands

    commands.run('linear')

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swav_jax import cli, files
from swav_jax.cli.flags import linear as parse_linear
from swav_jax.cpu.host_memory import total_bytes
from swav_jax.data.images import Source
from swav_jax.errors import UserError, printable
from swav_jax.evaluate import command, labelled, logistic, outputs
from swav_jax.evaluate.classifier import Recipe, accuracies, describe, fit
from swav_jax.evaluate.model import Model

PRESETS = {
    'swav': Recipe(epochs=100, learning_rate=0.3, weight_decay=1e-6),
    'vissl': Recipe(
        epochs=28,
        learning_rate=0.01,
        milestones=(8, 16, 24),
        weight_decay=5e-4,
        nesterov=True,
        batch_norm=True,
    ),
}


def run(flags: argparse.Namespace) -> None:
    """Train and test the probe."""
    model = command.load(flags)
    train, test = command.open_pair(model, flags)
    if flags.preset == 'logistic':
        out = _folder(flags, 'logistic')
        result = regress(model, train, test, flags.c) | {'c': flags.c}
        _report(result, model, train, test, out)
    else:
        train_and_test(flags, 'linear', PRESETS[flags.preset], model, train, test)


main = cli.command(__doc__, parse_linear, run)


def train_and_test(
    flags: argparse.Namespace, name: str, recipe: Recipe, model: Model, train: Source, test: Source
) -> None:
    """Fit a classifier with the flags of `linear` or `semi`, print its accuracy, write result.json.

    The results go to --out, or the folder `name` in the run's. Flags change the recipe.

    Raises:
      UserError: a batch does not fit into memory, or as `classifier.fit` does.
    """
    names = ('epochs', 'learning_rate', 'trunk_learning_rate', 'batch_size')
    given = {name: value for name in names if (value := getattr(flags, name, None)) is not None}
    recipe = dataclasses.replace(recipe, **given)
    if flags.crop_scale is not None:
        _check_memory(min(recipe.batch_size, len(train)), model)
    out = _folder(flags, name)
    with outputs.locked(out):
        chosen = {'crop_scale': flags.crop_scale, 'seed': flags.seed}
        result = fit(model, train, test, recipe, out, **chosen)
        result |= {'recipe': dataclasses.asdict(recipe)} | chosen
        _report(result, model, train, test, out)


def regress(model: Model, train: Source, test: Source, c: float) -> dict[str, float]:
    """`top1` and `top5` on `test` of the logistic regression of the features of `train`.

    Classes are matched by name, like `labelled.pair` does.

    Raises:
      UserError: they cannot be matched, or too many images cannot be read.
    """
    matched = labelled.pair(train, test)

    def look(source):
        found = command.extract(model, source, of_head=())
        return found.trunk[found.readable], source.labels[found.readable]

    (train_x, train_y), (test_x, test_y) = look(matched.train), look(matched.test)
    weights, bias = logistic.fit(train_x, train_y, len(matched.train.class_names), c=c)
    return accuracies(test_x @ weights + bias, test_y)


def _folder(flags: argparse.Namespace, name: str) -> Path:
    """The folder for the results: --out, or `name` in the run's folder."""
    if not (flags.out or flags.workdir):
        raise UserError('--out is missing: with --weights, name a folder for the results')
    return outputs.folder(flags.out or flags.workdir / name)


def _report(
    result: Mapping[str, Any], model: Model, train: Source, test: Source, out: Path
) -> None:
    """Print top1 and top5; write the result, and what it was made from, to result.json."""
    made_from = describe(model, train) | {
        'test_images': len(test),
        'test_images_and_labels': test.digest(labels=True, contents=True),
    }
    with files.replacing(out / 'result.json') as path:
        text = json.dumps(result | {'made_from': made_from}, indent=2)
        path.write_text(f'{text}\n', encoding='utf-8')
    print(f'top-1 {result["top1"]:.2f}%')
    print(f'top-5 {result["top5"]:.2f}%')
    print(f'written to {printable(out)}')


def _check_memory(rows: int, model: Model) -> None:
    """Refuse a batch whose canvases, of which four wait at a time, do not fit into memory."""
    data = model.config.data
    needed = 4 * rows * data.canvas_size**2 * data.channels
    have = total_bytes()
    if needed > have:
        raise UserError(
            f'--batch_size={rows} images take {needed / 1e9:,.0f} GB, this machine has '
            f'{have / 1e9:,.0f} GB: use at most {rows * have // needed}'
        )
