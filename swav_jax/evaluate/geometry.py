"""How features and embeddings fill their space, which needs no labels."""

import numpy as np

_MOST_PAIRED = 2000  # embeddings whose pairs are all compared


def effective_rank(features: np.ndarray) -> float:
    """RankMe of features (N, F): how many directions they use, from 1 to min(N, F).

    The exponential of the entropy of the singular values as shares of their sum (Garrido et al.
    2023, 2210.02885). Like there, the features are not centred.
    """
    x = np.asarray(features, np.float64)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0))
    if not singular.any():
        return 1.0
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))


def alignment(one: np.ndarray, other: np.ndarray) -> float:
    """Mean squared distance of the unit embeddings (N, D) of two crops of the same images.

    0 if crops of an image lie on one point, 2 if they are unrelated (Wang and Isola 2020,
    2005.10242, with α = 2).
    """
    return float(np.mean(np.sum((unit(one) - unit(other)) ** 2, axis=1)))


def uniformity(embeddings: np.ndarray) -> float:
    """Logarithm of the mean Gaussian potential of unit embeddings (N, D), over all pairs.

    0 if all are equal, towards -4 if they spread evenly over the sphere (Wang and Isola 2020,
    2005.10242, with t = 2). Of more than 2,000 embeddings, so many are used, evenly spread.
    """
    count = min(len(embeddings), _MOST_PAIRED)
    x = unit(embeddings[np.arange(count) * len(embeddings) // count])
    cosines = (x @ x.T)[np.triu_indices(count, 1)]
    return float(np.log(np.mean(np.exp(-2.0 * (2.0 - 2.0 * cosines)))))


def near_duplicates(prototypes: np.ndarray, cosine: float = 0.99) -> int:
    """The number of prototypes (K, D) that have another one within this cosine."""
    x, found = unit(prototypes), 0
    for start in range(0, len(x), 1024):  # blocks, because K × K may be a gigabyte
        similar = x[start : start + 1024] @ x.T
        similar[np.arange(len(similar)), start + np.arange(len(similar))] = -1
        found += int(np.count_nonzero(similar.max(1) > cosine))
    return found


def unit(x: np.ndarray) -> np.ndarray:
    """Rows (N, D) scaled to length 1, in float64; a row of zeros stays."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
