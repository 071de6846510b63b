"""Prototypes as clusters: which image belongs to which, and how well that fits known labels.

    python -m swav_jax.evaluate.clusters --workdir RUN --source folder:/photos --out clusters

writes clusters/assignments.csv, a line per image with its name, its nearest prototype and that
one's probability; clusters/soft.npy with the probability of each prototype (N, K), in the order of
these lines; and for each prototype that has images a list of their names, nearest first, in
clusters/prototype_7.txt. Images that cannot be read are left out. Control characters in names are
escaped.
"""

if __name__ == '__main__':  # before the imports, so that mistakes are reported without them
    from swav_jax import commands

    commands.run('clusters')

import argparse
import csv
from pathlib import Path

import numpy as np

from swav_jax import cli
from swav_jax.cli.flags import clusters as parse_clusters
from swav_jax.data.images import Source
from swav_jax.errors import UserError, printable
from swav_jax.evaluate import command, outputs

_WRITTEN = r'assignments\.csv|soft\.npy|prototype_(0|[1-9]\d*)\.txt'


def run(flags: argparse.Namespace) -> None:
    """Assign images to prototypes and print how well that fits their labels."""
    model = command.load(flags)
    model.need_head()
    heads = model.config.model.head.num_clusters
    if not 0 <= flags.head < len(heads):
        raise UserError(f'--head={flags.head} is not there: use 0 to {len(heads) - 1}')
    out = outputs.folder(flags.out)
    outputs.check(out, 'clusters', _WRITTEN, below=heads[flags.head])
    source = command.open_source(model, flags.source or model.config.data.source, flags.limit)
    found = command.extract(model, source)
    scores, readable = found.scores[flags.head], found.readable
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
            command.say([f'{np.count_nonzero(~known):,} images without a label do not count'])
        if known.any():
            print(f'NMI {nmi(labels[known], assignments[known]):.4f}')
            print(f'purity {purity(labels[known], assignments[known]):.4f}')
    print(f'written to {printable(flags.out)}')


main = cli.command(__doc__, parse_clusters, run)


def assign(scores: np.ndarray) -> np.ndarray:
    """The nearest prototype (N,) of images with scores (N, K)."""
    return np.argmax(scores, axis=1)


def soften(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (N, K) of the prototypes: the softmax of scores (N, K) over `temperature`."""
    logits = (scores - scores.max(1, keepdims=True)) / temperature
    weights = np.exp(logits)
    return weights / weights.sum(1, keepdims=True)


def sizes(assignments: np.ndarray, num_clusters: int) -> np.ndarray:
    """The number of images (K,) of each of `num_clusters` prototypes."""
    return np.bincount(assignments, minlength=num_clusters)


def nmi(labels: np.ndarray, assignments: np.ndarray) -> float:
    """Mutual information (in [0, 1]) of two partitions (N,), over the mean of their entropies.

    Raises:
      ValueError: the two have different lengths.
    """
    from sklearn import metrics  # takes a second to import

    return float(metrics.normalized_mutual_info_score(labels, assignments))


def purity(labels: np.ndarray, assignments: np.ndarray) -> float:
    """The share of images that have the most frequent label of their cluster."""
    from sklearn.metrics.cluster import contingency_matrix

    return float(contingency_matrix(labels, assignments).max(0).sum() / len(labels))


def write(
    out: Path, source: Source, scores: np.ndarray, temperature: float, readable: np.ndarray
) -> np.ndarray:
    """Write the files that the module's docstring lists, and clusters.json with their names.

    Args:
      out: the folder.
      source: N images.
      scores: (N, K).
      temperature: of `soften`.
      readable: (N,) bool; M are True.

    Returns:
      The assignments (M,) of the readable images.

    Raises:
      UserError: `out` holds a file with the name of one of these that no call wrote.
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
