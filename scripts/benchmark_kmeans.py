"""The time of DeepCluster-v2's k-means beside a plain matrix product of the same operations."""

import time
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from swav_jax.methods.kmeans import spherical_kmeans

BATCHES, IMAGES, DIM, CLUSTERS, ITERS = 313, 64, 128, 3000, 3
FLOPS = 2 * BATCHES * IMAGES * DIM * CLUSTERS * (ITERS + 1)


def measure(rounds: int) -> dict[str, float]:
    """Seconds of both, one after the other in each round, and the median of their ratios."""
    rows = np.random.default_rng(0).standard_normal((BATCHES, IMAGES, DIM)).astype(np.float32)
    rows = jnp.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))
    flat, valid = rows.reshape(-1, DIM), jnp.ones(rows.shape[:2], bool)
    centroids = flat[:CLUSTERS]
    cluster = jax.jit(lambda: spherical_kmeans(rows, valid, centroids, num_iters=ITERS))
    product = jax.jit(lambda x, c: x @ c.T)
    found = {'kmeans_ms': [], 'product_ms': [], 'ratio_kmeans': []}
    for timed in (False, *[True] * rounds):
        ours = seconds(cluster)
        theirs = sum(seconds(product, flat, centroids) for _ in range(ITERS + 1))
        if timed:
            found['kmeans_ms'].append(1e3 * ours)
            found['product_ms'].append(1e3 * theirs)
            found['ratio_kmeans'].append(ours / theirs)
    medians = {name: median(values) for name, values in found.items()}
    return {'kmeans_gflops': FLOPS / 1e6 / medians['kmeans_ms']} | medians


def seconds(function, *args) -> float:
    """Time of a call, until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start
