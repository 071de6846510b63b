"""Spherical k-means of embeddings that lie on several devices."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def spherical_kmeans(
    rows: Float[Array, 'batches images dim'],
    valid: Bool[Array, 'batches images'],
    centroids: Float[Array, 'clusters dim'],
    *,
    num_iters: int,
    axis_names: Sequence[str] = (),
) -> tuple[Float[Array, 'clusters dim'], Int[Array, 'batches images']]:
    """Cluster rows by their angles.

    In each iteration a row goes to the centroid with the largest dot product, and a centroid
    becomes the sum of its rows, scaled to length 1. One without rows stays as it was.

    Args:
      rows: this device's, of length 1.
      valid: rows that count.
      centroids: to begin with, the same on all devices.
      num_iters: iterations.
      axis_names: mesh axes over which the rows are split.

    Returns:
      The centroids, the same on all devices; and for each row the number of the nearest one.
    """
    num_clusters, dim = centroids.shape

    def move(_, centroids):
        codes = jnp.where(valid, nearest(rows, centroids), num_clusters)
        counted = jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], -1)
        total = jnp.zeros((num_clusters, dim + 1), rows.dtype).at[codes].add(counted, mode='drop')
        sums, counts = jnp.split(lax.psum(total, axis_names), [dim], -1)
        moved = jnp.where(counts > 0, sums, centroids)
        return moved / jnp.maximum(jnp.linalg.norm(moved, axis=-1, keepdims=True), 1e-12)

    centroids = lax.fori_loop(0, num_iters, move, centroids)
    return centroids, nearest(rows, centroids)


def nearest(
    rows: Float[Array, 'batches images dim'], centroids: Float[Array, 'clusters dim']
) -> Int[Array, 'batches images']:
    """The number of the centroid with the largest dot product, of equal ones the first.

    One batch of rows after the other, so that all products never exist at once.
    """
    numbers = jnp.arange(len(centroids), dtype=jnp.int32)

    def of_batch(batch):
        products = jnp.matmul(batch, centroids.T, precision=lax.Precision.HIGHEST)
        largest = jnp.max(products, -1, keepdims=True)
        # XLA computes two plain reductions in much less time than an argmax on CPUs.
        return jnp.min(jnp.where(products == largest, numbers, len(centroids)), -1)

    return lax.map(of_batch, rows)
