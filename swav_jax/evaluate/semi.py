r"""Fine-tuning on few labels: trunk and a linear classifier, each with its own learning rate.

    python -m swav_jax.evaluate.semi --workdir RUN --train folder:/imagenet/train \
        --test folder:/imagenet/val --share 0.01

The recipe is that of eval_semisup.py of facebookresearch/swav: 20 epochs, learning rates times 0.2
after 12 and 16, no weight decay, random resized crops and flips. Learning rates for 256 images a
step:

    --preset 10   10% of the labels   trunk 0.01, classifier 0.2
    --preset 1    1%                  trunk 0.02, classifier 5

The share is taken as evenly from each class as possible. Lists from the literature can be given as
--train filelist:/1percent.txt with --share 1. The accuracy is that after the last epoch, not the
best one on the way.
"""

if __name__ == '__main__':  # before the imports, so that mistakes are reported without them
    from swav_jax import commands

    commands.run('semi')

import argparse

import numpy as np

from swav_jax import cli
from swav_jax.cli.flags import semi as parse_semi
from swav_jax.data.images import Source
from swav_jax.evaluate import command, labelled, linear
from swav_jax.evaluate.classifier import Recipe

PRESETS = {
    '1': Recipe(20, learning_rate=5.0, trunk_learning_rate=0.02, milestones=(12, 16), gamma=0.2),
    '10': Recipe(20, learning_rate=0.2, trunk_learning_rate=0.01, milestones=(12, 16), gamma=0.2),
}


def take_share(source: Source, share: float) -> Source:
    """Take a share of the labelled images, at least one, as evenly from each class as possible."""
    known = np.flatnonzero(source.labels >= 0)
    count = max(round(share * len(known)), 1)
    by_class = known[np.argsort(source.labels[known], kind='stable')]
    return source.take(by_class[np.arange(count) * len(known) // count])


def run(flags: argparse.Namespace) -> None:
    """Fine-tune and test."""
    model = command.load(flags)
    train, test = command.open_pair(model, flags)
    train = take_share(train, flags.share)
    seen, classes = len(np.unique(train.labels)), len(train.class_names)
    print(f'{len(train):,} labelled images of {seen} classes')
    if seen < classes:
        command.say(
            [
                f'--share={flags.share} leaves {classes - seen} of {classes} classes without '
                'an image to learn from: test images of these count as wrong'
            ]
        )
    kept, notes = labelled.learnable(train, test, ('--train', '--test'))
    command.say(notes)
    preset = flags.preset or ('1' if flags.share < 0.05 else '10')
    linear.train_and_test(flags, 'semi', PRESETS[preset], model, train, test.take(kept))


main = cli.command(__doc__, parse_semi, run)
