r"""Fine-tuning on few labels: trunk and a linear classifier, each with its learning rate.

    python -m swav_jax.evaluate.semi --workdir RUN --train folder:/imagenet/train \
        --test folder:/imagenet/val --share 0.01

20 epochs, learning rates times 0.2 after 12 and 16, no weight decay, random resized crops and flips
(eval_semisup.py of facebookresearch/swav), for 256 images a step

    10% of the labels   trunk 0.01, classifier 0.2
    1%                  trunk 0.02, classifier 5

The share is taken as evenly from each class as it goes; the lists of the literature can be given as
--train filelist:/1percent.txt with --share 1. What is reported is the accuracy after the last
epoch, not the best one on the way.
"""

if __name__ == '__main__':  # before the imports: TensorFlow reads its settings as it is imported
    from swav_jax import commands

    commands.run('semi')

import argparse
from collections.abc import Sequence

import numpy as np

from swav_jax import cli
from swav_jax.data.images import Source
from swav_jax.evaluate import command, labelled, linear
from swav_jax.evaluate.classifier import Recipe

PRESETS = {
    '1': Recipe(20, learning_rate=5.0, trunk_learning_rate=0.02, milestones=(12, 16), gamma=0.2),
    '10': Recipe(20, learning_rate=0.2, trunk_learning_rate=0.01, milestones=(12, 16), gamma=0.2),
}


def take_share(source: Source, share: float) -> Source:
    """A share of labelled images, as evenly from each class as it goes; at least one image.

    Images whose label is not known (-1) are none of them.
    """
    known = np.flatnonzero(source.labels >= 0)
    count = max(round(share * len(known)), 1)
    by_class = known[np.argsort(source.labels[known], kind='stable')]
    return source.take(by_class[np.arange(count) * len(known) // count])


def _main(arguments: argparse.Namespace) -> None:
    """Fine-tune and test as the command line says."""
    model = command.load(arguments)
    train, test = labelled.open_pair(model, arguments)
    train = take_share(train, arguments.share)
    seen, classes = len(np.unique(train.labels)), len(train.class_names)
    print(f'{len(train):,} labelled images of {seen} classes')
    if seen < classes:
        labelled.say(
            [
                f'--share={arguments.share} leaves {classes - seen} of {classes} classes without '
                'an image to learn from: test images of these count as wrong'
            ]
        )
    kept, notes = labelled.learnable(train, test, ('--train', '--test'))
    labelled.say(notes)
    test = test.take(kept)
    preset = arguments.preset or ('1' if arguments.share < 0.05 else '10')
    linear.train_and_test(arguments, 'semi', PRESETS[preset], model, train, test)


def main(argv: Sequence[str]) -> int:
    """Run the command line that the module's docstring explains; returns the exit code."""
    parser = command.parser(__doc__)
    linear.add_flags(parser)
    parser.add_argument('--share', type=cli.positive(1), default=0.1, help='of the labelled images')
    parser.add_argument('--preset', choices=tuple(PRESETS), help='(default: by --share)')
    parser.add_argument('--trunk_learning_rate', type=cli.positive())
    return command.run(_main, parser, argv)
