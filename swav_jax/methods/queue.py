"""The queue: embeddings of earlier batches, for codes of small ones.

Letters: A crops with codes, S batches of B images, D dimensions.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Queue(NamedTuple):
    """Embeddings of the last S global batches, newest first: more samples for Sinkhorn.

    The images of a batch keep their place along axis 2. With this axis sharded like the batch, each
    device holds the embeddings that it computed, on any number of devices.
    """

    embeddings: Float[Array, 'assign batches images dim']
    weights: Float[Array, 'batches images']  # as in `sinkhorn_codes`; 0 where nothing is stored
    filled: Int[Array, '']  # number of stored batches, at most S

    @classmethod
    def empty(cls, num_assign: int, num_batches: int, num_images: int, dim: int, dtype=jnp.float32):
        """An empty queue."""
        return cls(
            jnp.zeros((num_assign, num_batches, num_images, dim), dtype),
            jnp.zeros((num_batches, num_images), jnp.float32),
            jnp.zeros((), jnp.int32),
        )

    def is_full(self) -> Bool[Array, '']:
        """Whether the queue is used; in half a queue a few old images would weigh too much."""
        return self.filled == self.weights.shape[0]

    def push(
        self,
        embeddings: Float[Array, 'assign images dim'],
        weights: Float[Array, ' images'],
    ) -> 'Queue':
        """The queue with this batch in front and its oldest batch dropped."""
        return Queue(
            jnp.concatenate([embeddings[:, None], self.embeddings[:, :-1]], axis=1),
            jnp.concatenate([weights[None], self.weights[:-1]]),
            jnp.minimum(self.filled + 1, self.weights.shape[0]),
        )
