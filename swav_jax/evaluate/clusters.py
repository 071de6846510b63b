"""Prototypes as clusters: who belongs to which, and how well that fits labels nobody gave it."""

import numpy as np


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
    """
    table = contingency(labels, assignments) / len(labels)
    by_label, by_cluster = table.sum(1), table.sum(0)
    mean_entropy = (_entropy(by_label) + _entropy(by_cluster)) / 2
    if mean_entropy == 0:
        return 1.0
    information = _entropy(by_label) + _entropy(by_cluster) - _entropy(table)
    return float(np.clip(information / mean_entropy, 0, 1))


def purity(labels: np.ndarray, assignments: np.ndarray) -> float:
    """Share of images that have the most frequent label of their cluster."""
    return float(contingency(labels, assignments).max(0).sum() / len(labels))


def contingency(labels: np.ndarray, assignments: np.ndarray) -> np.ndarray:
    """How many images have label i and are in cluster j; int64 (labels, clusters) that occur.

    Raises:
      ValueError: the two are not equally many, or there are none.
    """
    if len(labels) != len(assignments) or len(labels) == 0:
        raise ValueError(f'{len(labels)} labels for {len(assignments)} assignments')
    _, i = np.unique(labels, return_inverse=True)
    _, j = np.unique(assignments, return_inverse=True)
    return np.bincount(i * (j.max() + 1) + j, minlength=(i.max() + 1) * (j.max() + 1)).reshape(
        i.max() + 1, j.max() + 1
    )


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-np.sum(p * np.log(p)))
