"""Metrics of health for methods with embeddings, prototypes and codes."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from swav_jax.parallel.mesh import AXES

NEAR_LN_K = 0.01  # of ln K: a loss that is nearer to ln K is a sign of collapse
NEAR_CONSTANT = 0.01  # of 1/√D, the standard deviation of spread embeddings: so is a smaller one


@jax.named_scope('health')
def health(
    loss: jax.Array,
    embeddings: jax.Array,
    scores: jax.Array,
    codes: jax.Array,
    weights: jax.Array,
) -> dict[str, jax.Array]:
    """Loss and signs of collapse of the global batch, in one all-reduce.

    Args:
      loss: () this device's loss.
      embeddings: (A, B, D) of the crops that get codes.
      scores, codes: (A, B, K) of the same crops, for one prototype head.
      weights: (B,) 1, or 0 for an image that must not count.

    Returns:
      A dict of scalars:

      - `loss`;
      - `code_entropy`: mean entropy of an image's code in nats; ln K when codes are uniform;
      - `active_prototypes`: number of prototypes that are the nearest one of any crop;
      - `largest_prototype_share`: share of the crops whose nearest prototype is the same;
      - `embedding_std`: mean over dimensions; 0 when all are equal, 1/√D when they spread;
      - `bad_images`: number of images of weight 0.
    """
    nearest = jnp.argmax(scores, -1)
    votes = jnp.sum(jax.nn.one_hot(nearest, codes.shape[-1]) * weights[:, None], (0, 1))
    entropy = -jnp.sum(jax.scipy.special.xlogy(codes, codes), -1)
    total = lax.psum(
        jnp.concatenate(
            [
                jnp.stack([loss, 1.0, jnp.sum(weights), len(weights), jnp.sum(weights * entropy)]),
                jnp.sum(weights[:, None] * embeddings, (0, 1)),
                jnp.sum(weights[:, None] * jnp.square(embeddings), (0, 1)),
                votes,
            ],
            dtype=loss.dtype,
        ),
        AXES,
    )
    dim = embeddings.shape[-1]
    scalars, sums, squares, votes = jnp.split(total, [5, 5 + dim, 5 + 2 * dim])
    loss, devices, counted, images, entropy = scalars
    samples = jnp.maximum(counted * len(codes), 1.0)
    variance = squares / samples - jnp.square(sums / samples)
    return {
        'loss': loss / devices,
        'code_entropy': entropy / samples,
        'active_prototypes': jnp.sum(votes > 0),
        'largest_prototype_share': jnp.max(votes) / samples,
        'embedding_std': jnp.mean(jnp.sqrt(jnp.maximum(variance, 0.0))),
        'bad_images': images - counted,
    }


def sign_of_collapse(row: Mapping[str, Any], dim: int) -> tuple[str, str] | None:
    """Look for a loss of ln K (all images look alike to the prototypes) or equal embeddings.

    Args:
      row: of metrics.jsonl.
      dim: of the embeddings.

    Returns:
      As `Method.sign_of_collapse`.
    """
    if abs(row['loss_over_ln_k'] - 1) < NEAR_LN_K:
        return 'the loss stayed within 1% of ln K', 'Stuck at ln K'
    if row['embedding_std'] < NEAR_CONSTANT / math.sqrt(dim):
        return 'all embeddings stayed the same', 'Equal embeddings'
    return None
