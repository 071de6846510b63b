"""Prototypes as clusters: who belongs to which, and how well that fits labels nobody gave it.

    python -m swav_jax.evaluate.clusters --workdir RUN --source folder:/photos --out clusters

writes clusters/assignments.csv, a line an image with its name, its nearest prototype and how
likely that one is, clusters/soft.npy with the probability of each prototype (N, K), line by line,
and a list of names for each prototype that has images, clusters/prototype_7.txt, nearest first.
Images that cannot be read are left out. Control characters in names are escaped.
"""

if __name__ == '__main__':  # before the imports: TensorFlow reads its settings as it is imported
    from swav_jax import commands

    commands.run('clusters')

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from swav_jax import cli
from swav_jax.data.images import Source
from swav_jax.errors import UserError
from swav_jax.evaluate import command, extraction, labelled, outputs
from swav_jax.terminal import printable

_WRITTEN = r'assignments\.csv|soft\.npy|prototype_(0|[1-9]\d*)\.txt'


def assign(scores: np.ndarray) -> np.ndarray:
    """The nearest prototype (N,) of images with scores (N, K)."""
    return np.argmax(scores, axis=1)


def soften(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (N, K) of the prototypes: the softmax of scores (N, K) over `temperature`."""
    logits = (scores - scores.max(1, keepdims=True)) / temperature
    weights = np.exp(logits)
    return weights / weights.sum(1, keepdims=True)


def sizes(assignments: np.ndarray, num_clusters: int) -> np.ndarray:
    """How many images (K,) each of `num_clusters` prototypes has; 0 for the unused ones."""
    return np.bincount(assignments, minlength=num_clusters)


def nmi(labels: np.ndarray, assignments: np.ndarray) -> float:
    """Normalised mutual information in [0, 1], over the arithmetic mean of the two entropies.

    Two partitions that both have one part alone agree: 1.

    Raises:
      ValueError: the labels (N,) and assignments (N,) are not equally many.
    """
    from sklearn import metrics  # takes a second to import, which not every command has to spend

    return float(metrics.normalized_mutual_info_score(labels, assignments))


def purity(labels: np.ndarray, assignments: np.ndarray) -> float:
    """Share of images that have the most frequent label of their cluster."""
    from sklearn.metrics.cluster import contingency_matrix

    return float(contingency_matrix(labels, assignments).max(0).sum() / len(labels))


def write(
    out: Path, source: Source, scores: np.ndarray, temperature: float, readable: np.ndarray
) -> np.ndarray:
    """Write the files that the module's docstring describes.

    Args:
      out: the folder; gets clusters.json, too, with the names of the files that are written.
      source: N images.
      scores: (N, K).
      temperature: of `soften`.
      readable: (N,) bool, which images to write of: M.

    Returns:
      The assignments (M,).

    Raises:
      UserError: `out` holds such files that no call wrote.
    """
    scores = scores[readable]
    assignments, soft = assign(scores), soften(scores, temperature)
    names = [printable(source.name(int(i))) for i in np.flatnonzero(readable)]
    with outputs.replacing(out, 'clusters', _WRITTEN, below=scores.shape[1]) as folder:
        with (folder / 'assignments.csv').open('w', newline='', encoding='utf-8') as file:
            table = csv.writer(file)
            table.writerow(['name', 'prototype', 'probability'])
            for name, prototype, row in zip(names, assignments, soft, strict=True):
                table.writerow([name, prototype, f'{row[prototype]:.4f}'])
        np.save(folder / 'soft.npy', soft)
        for prototype in np.unique(assignments):
            members = np.flatnonzero(assignments == prototype)
            nearest = members[np.argsort(-scores[members, prototype], kind='stable')]
            lines = ''.join(f'{names[i]}\n' for i in nearest)
            (folder / f'prototype_{prototype}.txt').write_text(lines, encoding='utf-8')
    return assignments


def _main(arguments: argparse.Namespace) -> None:
    """Assign the images that the command line names and say how well that went."""
    model = command.load(arguments)
    model.need_head()
    heads = model.config.model.head.num_clusters
    if not 0 <= arguments.head < len(heads):
        raise UserError(f'--head={arguments.head} is not there: use 0 to {len(heads) - 1}')
    out = outputs.folder(arguments.out)
    outputs.check(out, 'clusters', _WRITTEN, below=heads[arguments.head])
    source = model.open(arguments.source or model.config.data.source, arguments.limit)
    labelled.say(source.notes)
    found = model.extract(source, progress=True)
    labelled.say(extraction.check(found, source, model.config))
    scores, readable = found.scores[arguments.head], found.readable
    assignments = write(out, source, scores, model.config.loss.temperature, readable)
    used = np.sort(sizes(assignments, scores.shape[1]))[::-1]
    print(
        f'{len(assignments):,} images, nearest to {np.count_nonzero(used)} of {len(used)} '
        f'prototypes; largest {used[0]:,}, median {int(np.median(used)):,}'
    )
    if source.labels is not None:
        labels = source.labels[readable]
        known = labels >= 0
        if not known.all():
            labelled.say([f'{np.count_nonzero(~known):,} images without a label do not count'])
        if known.any():
            print(f'NMI {nmi(labels[known], assignments[known]):.4f}')
            print(f'purity {purity(labels[known], assignments[known]):.4f}')
    print(f'written to {printable(arguments.out)}')


def main(argv: Sequence[str]) -> int:
    """Run the command line that the module's docstring explains; returns the exit code."""
    parser = command.parser(__doc__)
    parser.add_argument('--source', help='images (default: those the run trained on)')
    parser.add_argument('--out', required=True, help='folder for the lists')
    parser.add_argument('--head', type=cli.integer(), default=0, help='which head of prototypes')
    return command.run(_main, parser, argv)
