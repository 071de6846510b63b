"""Weighted k-nearest-neighbour classification, the usual measure of self-supervised features.

    python -m swav_jax.evaluate.knn --workdir RUN --train demo --test demo:test --k 10 20 100 200

Each of the k neighbours by cosine similarity s votes for its class with weight
exp(s / config.evaluate.temperature) (Wu et al. 2018, arXiv 1805.01978, section 3.4).
"""

if __name__ == '__main__':  # before the imports, so that mistakes are reported without them
    from swav_jax import commands

    commands.run('knn')

import argparse
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from swav_jax import cli
from swav_jax.cli.flags import knn as parse_knn
from swav_jax.errors import UserError
from swav_jax.evaluate import command

# A block of similarities takes 256 MB at most.
_TEST_ROWS = 8192
_TRAIN_ROWS = 8192


def run(flags: argparse.Namespace) -> None:
    """Print the accuracy for each k."""
    model = command.load(flags)
    temperature = model.config.evaluate.temperature
    train, test = command.open_pair(model, flags)
    ks = sorted(flags.k or [model.config.evaluate.k])
    setting = '--k' if flags.k else 'config.evaluate.k'
    for k in (ks[0], ks[-1]):
        check(k, len(train), setting)
    if flags.features == 'embeddings':
        model.need_head()

    def look(source):
        found = command.extract(model, source)
        return getattr(found, flags.features)[found.readable], found.labels[found.readable]

    (train_x, train_y), (test_x, test_y) = look(train), look(test)
    check(ks[-1], len(train_y), setting)  # among the readable ones
    similarity, index = neighbors(train_x, test_x, k=ks[-1])
    print(f'{len(train_y):,} images vote on {len(test_y):,}; temperature {temperature}')
    for k in ks:
        predicted = vote(
            similarity[:, :k],
            train_y[index[:, :k]],
            temperature=temperature,
            num_classes=len(train.class_names),
        )
        print(f'k = {k:<4} top-1 {100 * np.mean(predicted == test_y):.2f}%')


main = cli.command(__doc__, parse_knn, run)


def accuracy(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    k: int,
    temperature: float,
) -> float:
    """Top-1 accuracy in percent of `classify` on the test images whose label is known.

    Raises:
      UserError: `k` is more than the number of labelled training images, or no test image has a
        label.
    """
    known = test_y >= 0
    if not known.any():
        raise UserError('there is no labelled image to test on')
    num_classes = int(max(train_y.max(), test_y.max())) + 1
    predicted = classify(
        train_x, train_y, test_x[known], k=k, temperature=temperature, num_classes=num_classes
    )
    return float(100 * np.mean(predicted == test_y[known]))


def classify(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    *,
    k: int,
    temperature: float,
    num_classes: int,
) -> np.ndarray:
    """Classify `test_x` (M, F) by the votes of `train_x` (N, F) of classes `train_y` (N,).

    Of equal votes the class with the lowest number wins. Training images of unknown class, with a
    negative label, do not vote and are no neighbours.

    Returns:
      The classes (M,).

    Raises:
      UserError: `k` is more than the training images of known class.
    """
    known = train_y >= 0
    train_x, train_y = train_x[known], train_y[known]
    similarity, index = neighbors(train_x, test_x, k=k)
    return vote(similarity, train_y[index], temperature=temperature, num_classes=num_classes)


def neighbors(train_x: np.ndarray, test_x: np.ndarray, *, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the `k` rows of `train_x` (N, F) that are nearest to each row of `test_x` (M, F).

    Both are processed in blocks, to bound the memory; the test rows are spread over the devices of
    this process.

    Returns:
      Cosine similarities (M, k), largest first, and row numbers of `train_x` (M, k). A row of zeros
      has similarity 0 to all.

    Raises:
      UserError: `k` is more than N.
    """
    check(k, len(train_x))
    mesh = Mesh(np.array(jax.local_devices()), ('row',))
    found = [_block_neighbors(train_x, rows, k, mesh) for rows in _blocks(test_x, _TEST_ROWS)]
    similarity, index = zip(*found, strict=True)
    return np.concatenate(similarity), np.concatenate(index)


def check(k: int, count: int, setting: str = 'config.evaluate.k') -> None:
    """Check that there are `k` neighbours among `count` images.

    Raises:
      UserError: there are not; `setting` is the name of k.
    """
    if not 1 <= k <= count:
        raise UserError(
            f'{setting}={k} neighbours cannot be found among {count} labelled images: use '
            f'1 to {count}'
        )


@functools.partial(jax.jit, static_argnames=('num_classes',))
def _vote(similarity, labels, temperature, num_classes):
    # Relative to the nearest one, because exp(1 / temperature) may overflow float32.
    weight = jnp.exp((similarity - similarity[:, :1]) / temperature)
    weight = jnp.where(labels >= 0, weight, 0)  # or a negative index counts from the end
    row = jnp.arange(len(labels))[:, None]
    return jnp.zeros((len(labels), num_classes)).at[row, labels].add(weight).argmax(1)


def vote(
    similarity: np.ndarray, labels: np.ndarray, *, temperature: float, num_classes: int
) -> np.ndarray:
    """The classes (M,) with the most weight among neighbours of given similarity, label (M, k).

    Neighbours with a negative label do not vote.
    """
    return np.asarray(_vote(similarity, labels, temperature, num_classes))


def _block_neighbors(train_x, test_x, k, mesh):
    rows = len(test_x)
    filling = -rows % mesh.size
    test_x = np.concatenate([test_x, np.zeros((filling, test_x.shape[1]), test_x.dtype)])
    spread = NamedSharding(mesh, P('row'))
    test = jax.device_put(np.asarray(test_x, np.float32), spread)
    best = (jnp.full((len(test), k), -jnp.inf), jnp.zeros((len(test), k), jnp.int32))
    best = jax.device_put(best, spread)
    merge = _make_merge(mesh)
    for number, train in enumerate(_blocks(train_x, _TRAIN_ROWS)):
        count = len(train)
        if number and count < _TRAIN_ROWS:  # so that several blocks have one shape
            train = np.concatenate([train, np.zeros((_TRAIN_ROWS - count, train.shape[1]))])
        best = merge(test, np.asarray(train, np.float32), best, number * _TRAIN_ROWS, count)
    return jax.tree.map(lambda x: np.asarray(x)[:rows], best)


@functools.cache
def _make_merge(mesh: Mesh):
    """Compile the step that merges a block of training rows into the best so far."""

    def merge(test, train, best, offset, count):
        similarity = jnp.matmul(_unit(test), _unit(train).T, precision=jax.lax.Precision.HIGHEST)
        column = jnp.arange(len(train))
        similarity = jnp.where(column < count, similarity, -jnp.inf)
        k = best[0].shape[1]
        new, place = jax.lax.top_k(similarity, min(k, len(train)))
        value = jnp.concatenate([best[0], new], 1)
        index = jnp.concatenate([best[1], (place + offset).astype(jnp.int32)], 1)
        value, place = jax.lax.top_k(value, k)
        return value, jnp.take_along_axis(index, place, 1)

    rows = P('row')
    return jax.jit(
        jax.shard_map(
            merge, mesh=mesh, in_specs=(rows, P(), (rows, rows), P(), P()), out_specs=(rows, rows)
        )
    )


def _unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _blocks(x: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    return (x[start : start + rows] for start in range(0, len(x), rows))
