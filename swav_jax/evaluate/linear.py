r"""Linear probe: a linear classifier on frozen features, trained on labelled images.

    python -m swav_jax.evaluate.linear --workdir RUN --train folder:/imagenet/train \
        --test folder:/imagenet/val [--preset vissl] [--crop_scale none]

Presets:

    swav   100 epochs, learning rate 0.3 for 256 images, half a cosine, weight decay 1e-6
           (eval_linear.py of facebookresearch/swav)
    vissl  28 epochs, 0.01 times 0.1 after 8, 16 and 24 of them, weight decay 5e-4, Nesterov,
           BatchNorm on the features (VISSL's eval_resnet_8gpu_transfer_in1k_linear.yaml, on the
           pooled features)
    logistic  no SGD: the optimum on the features of the images' centres, as scikit-learn's
           LogisticRegression finds it, in minutes

The first two see random resized crops, flipped half of the time; with --crop_scale none they, too,
see the centres, whose features are computed once. What is reported is the accuracy after the last
epoch, not the best one on the way. An interrupted probe goes on from its last epoch.
"""

if __name__ == '__main__':  # before the imports: TensorFlow reads its settings as it is imported
    from swav_jax import commands

    commands.run('linear')

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swav_jax import atomic, cli
from swav_jax.cpu.host_memory import total_bytes
from swav_jax.data.images import Source
from swav_jax.errors import UserError
from swav_jax.evaluate import command, labelled, logistic, outputs
from swav_jax.evaluate.classifier import Recipe, accuracies, describe, fit
from swav_jax.evaluate.extraction import check
from swav_jax.evaluate.model import Model
from swav_jax.terminal import printable

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


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what trains a classifier."""
    labelled.add_flags(parser)
    parser.add_argument('--epochs', type=cli.integer(1))
    parser.add_argument('--learning_rate', type=cli.positive(), help='for 256 images a step')
    parser.add_argument('--batch_size', type=cli.integer(1))
    parser.add_argument(
        '--crop_scale', nargs='+', default=['0.08', '1'], help='least and largest share of the area'
    )
    parser.add_argument('--seed', type=cli.integer(0, 2**32 - 1), default=0)
    parser.add_argument('--out', help="folder for the results (default: in the run's)")


def folder(arguments: argparse.Namespace, name: str) -> Path:
    """Where the results go: --out, or `name` in the run's folder.

    Raises:
      UserError: there is neither.
    """
    if not (arguments.out or arguments.workdir):
        raise UserError('--out is missing: with --weights, name a folder for the results')
    return outputs.folder(arguments.out or Path(arguments.workdir) / name)


def train_and_test(
    arguments: argparse.Namespace,
    name: str,
    recipe: Recipe,
    model: Model,
    train: Source,
    test: Source,
) -> None:
    """Fit a classifier as the command line says, print its accuracy, and write result.json.

    Args:
      arguments: with the flags of `add_flags`.
      name: of the folder for the results, unless --out names one.
      recipe: what the flags do not set.
      model, train, test: as in `classifier.fit`.

    Raises:
      UserError: a flag cannot be meant so.
    """
    scale = _crop_scale(arguments.crop_scale, recipe)
    recipe = _change(recipe, arguments)
    if scale is not None:
        _check_memory(min(recipe.batch_size, len(train)), model)
    out = folder(arguments, name)
    with outputs.locked(out):
        result = fit(model, train, test, recipe, out, crop_scale=scale, seed=arguments.seed)
        result |= {
            'recipe': dataclasses.asdict(recipe),
            'crop_scale': scale,
            'seed': arguments.seed,
            'made_from': describe(model, train) | _tested_on(test),
        }
        report(result, out)


def report(result: Mapping[str, Any], out: Path) -> None:
    """Print top1 and top5, and write all of the result to result.json."""
    with atomic.replacing(out / 'result.json') as path:
        path.write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')
    print(f'top-1 {result["top1"]:.2f}%')
    print(f'top-5 {result["top5"]:.2f}%')
    print(f'written to {printable(out)}')


def regress(model: Model, train: Source, test: Source, c: float) -> dict[str, float]:
    """`top1` and `top5` on `test` of the logistic regression of the features of `train`.

    Classes are matched by name, unless that is done: see `labelled.pair`.

    Raises:
      UserError: they cannot be matched, or too many images cannot be read.
    """
    matched = labelled.pair(train, test)

    def look(source):
        found = model.extract(source, has_head=False, progress=True)
        labelled.say(check(found, source, model.config))
        return found.trunk[found.readable], source.labels[found.readable]

    (train_x, train_y), (test_x, test_y) = look(matched.train), look(matched.test)
    weights, bias = logistic.fit(train_x, train_y, len(matched.train.class_names), c=c)
    return accuracies(test_x @ weights + bias, test_y)


def _tested_on(test: Source) -> dict[str, Any]:
    return {
        'test_images': len(test),
        'test_images_and_labels': test.digest(labels=True, contents=True),
    }


def _check_memory(rows: int, model: Model) -> None:
    """Refuse a batch whose canvases, of which several wait, are more than this machine holds."""
    data = model.config.data
    needed = 4 * rows * data.canvas_size**2 * data.channels
    have = total_bytes()
    if needed > have:
        raise UserError(
            f'--batch_size={rows} images take {needed / 1e9:,.0f} GB, this machine has '
            f'{have / 1e9:,.0f} GB: use at most {rows * have // needed}'
        )


def _change(recipe: Recipe, arguments: argparse.Namespace) -> Recipe:
    names = ('epochs', 'learning_rate', 'trunk_learning_rate', 'batch_size')
    given = {name: getattr(arguments, name, None) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(recipe, **given)


def _crop_scale(given: list[str], recipe: Recipe) -> tuple[float, float] | None:
    if given == ['none'] and recipe.trunk_learning_rate == 0:
        return None
    try:
        low, high = map(float, given)
    except ValueError:
        low = high = 0.0
    if not 0 < low <= high <= 1:
        raise UserError(
            f'--crop_scale {" ".join(given)}: give two numbers above 0 and at most 1'
            + (', or none' if recipe.trunk_learning_rate == 0 else '')
        )
    return low, high


def _main(arguments: argparse.Namespace) -> None:
    """Train and test the probe that the command line names."""
    model = command.load(arguments)
    train, test = labelled.open_pair(model, arguments)
    if arguments.preset == 'logistic':
        out = folder(arguments, 'logistic')
        result = regress(model, train, test, arguments.c)
        made_from = describe(model, train) | _tested_on(test)
        report(result | {'c': arguments.c, 'made_from': made_from}, out)
    else:
        train_and_test(arguments, 'linear', PRESETS[arguments.preset], model, train, test)


def main(argv: Sequence[str]) -> int:
    """Run the command line that the module's docstring explains; returns the exit code."""
    parser = command.parser(__doc__)
    add_flags(parser)
    parser.add_argument('--preset', choices=(*PRESETS, 'logistic'), default='swav')
    parser.add_argument(
        '--c', type=cli.positive(), default=1.0, help='of logistic: the inverse penalty'
    )
    return command.run(_main, parser, argv)
