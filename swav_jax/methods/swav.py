"""SwAV's mathematics: Sinkhorn codes, the swapped prediction loss, the queue, the prototypes.

Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments"
(arXiv 2006.09882), as VISSL computes it. Letters: V crops of B images, A of them assigned to codes,
K prototypes, D dimensions, H prototype heads. Crops stand crop-major: all images of crop 0 first.

Every function works on one replica's share of the batch. Where images of other replicas count,
`axis_names` names the mesh axes to sum over; `()` is a single replica.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# Stands for log 0: finite, so that a replica without a single valid image computes no NaN.
LOG_ZERO = -1e30


@jax.named_scope('sinkhorn_codes')
def sinkhorn_codes(
    scores: Sequence[Float[Array, 'assign samples _']],
    *,
    epsilon: float,
    num_iters: int,
    weights: Float[Array, ' samples'] | None = None,
    powerlaw: float = 0.0,
    axis_names: Sequence[str] = (),
) -> list[Float[Array, 'assign samples _']]:
    """Codes of each sample: the entropic transport plan between samples and prototypes.

    Paper, equations 3 to 5: Q = Diag(u) exp(scores / epsilon) Diag(v), with u and v found by
    `num_iters` rounds of normalising the prototypes over all samples of the mesh, then each sample.
    Computed on logarithms: log Q = scores / epsilon + g, less its row's log-sum-exp, so that any
    epsilon is finite. The samples are normalised last: rows sum to 1.

    All assign crops and heads go through together. A round is one all-reduce of H·A·K sums, and one
    maximum goes before them all: after a round, column k of Q holds at least its share r_k of a
    sample, so later sums cannot underflow.

    Args:
      scores: for each head, (A, N, K_h), in [-1, 1]: this replica's N samples, queue included.
      epsilon: entropy regularisation, > 0. Smaller is sharper.
      num_iters: number of rounds, >= 1.
      weights: (N,) 1, or 0 for a sample that must not count. Its own code is still defined.
      powerlaw: prototype k's share is proportional to (k + 1)^-powerlaw; 0 is equal shares.
      axis_names: mesh axes that the samples are spread over.

    Returns:
      For each head, (A, N, K_h) codes, non-negative rows that sum to 1, without gradient.
    """
    logits = lax.stop_gradient(jnp.concatenate(scores, axis=-1)) / epsilon
    ends = [sum(s.shape[-1] for s in scores[: h + 1]) for h in range(len(scores) - 1)]
    log_shares = jnp.concatenate([_log_shares(s.shape[-1], powerlaw, logits.dtype) for s in scores])
    log_weights, tiny = jnp.zeros(logits.shape[1], logits.dtype), jnp.finfo(logits.dtype).tiny
    if weights is not None:
        log_weights = jnp.where(weights > 0, log_weights, LOG_ZERO)
    log_weights = log_weights[:, None]

    def normalise_samples(log_q):
        return jnp.concatenate([jax.nn.log_softmax(h) for h in jnp.split(log_q, ends, -1)], -1)

    # Any start common to all samples gives the same codes; this one keeps the first sums in range.
    g = -lax.pmax(jnp.max(logits + log_weights, axis=1, keepdims=True), axis_names)
    log_q = logits + g
    for _ in range(num_iters):
        sums = lax.psum(jnp.sum(jnp.exp(log_q + log_weights), axis=1, keepdims=True), axis_names)
        sums = jnp.maximum(sums, tiny)  # 0 where no sample of the whole mesh counts
        g = g + log_shares - jnp.log(sums)
        log_q = normalise_samples(logits + g)
    return jnp.split(jnp.exp(log_q), ends, axis=-1)


def _log_shares(num_prototypes: int, powerlaw: float, dtype) -> Float[Array, ' prototypes']:
    """Logarithm of each prototype's share of the samples; the shares sum to 1."""
    return jax.nn.log_softmax(-powerlaw * jnp.log(jnp.arange(1, num_prototypes + 1, dtype=dtype)))


def harden(codes: Float[Array, '*batch prototypes']) -> Float[Array, '*batch prototypes']:
    """One-hot codes at the largest entry, the first one of equals (VISSL's hard assignment)."""
    return jax.nn.one_hot(jnp.argmax(codes, -1), codes.shape[-1], dtype=codes.dtype)


def swapped_prediction(
    scores: Float[Array, 'crops images prototypes'],
    codes: Float[Array, 'assign images prototypes'],
    *,
    crops_for_assign: Sequence[int],
    temperature: float,
) -> Float[Array, ' images']:
    """Cross entropy between an image's codes and the predictions of its other crops.

    Paper, equations 1 and 2: the mean over assigned crops a, and over the crops v other than a, of
    -sum_k code[a, k] · log softmax(scores[v] / temperature)[k].

    Args:
      scores: (V, B, K) products of embeddings and prototypes; the gradient flows through these.
      codes: (A, B, K) codes of the crops named in `crops_for_assign`, in that order.
      crops_for_assign: A different indices of crops.
      temperature: of the softmax, > 0.

    Returns:
      (B,) the loss of each image.
    """
    log_p = jax.nn.log_softmax(scores / temperature)
    log_p_others = jnp.sum(log_p, 0) - log_p[jnp.asarray(crops_for_assign)]
    num_pairs = len(crops_for_assign) * (scores.shape[0] - 1)
    return -jnp.sum(codes * log_p_others, axis=(0, 2)) / num_pairs


class Queue(NamedTuple):
    """Embeddings of the last S global batches, newest first: samples that fill Sinkhorn's columns.

    The images of a batch keep their place along axis 2, so that sharding this axis like the batch
    gives each replica the embeddings that it computed, on any number of devices.
    """

    embeddings: Float[Array, 'assign batches images dim']
    weights: Float[Array, 'batches images']  # as in `sinkhorn_codes`; 0 where nothing came yet
    filled: Int[Array, '']  # batches that it holds, at most S

    @classmethod
    def empty(cls, num_assign: int, num_batches: int, num_images: int, dim: int, dtype=jnp.float32):
        """A queue that holds nothing yet."""
        return cls(
            jnp.zeros((num_assign, num_batches, num_images, dim), dtype),
            jnp.zeros((num_batches, num_images), jnp.float32),
            jnp.zeros((), jnp.int32),
        )

    def is_full(self) -> Bool[Array, '']:
        """Whether it is used: half a queue would weigh few old images like all of the new ones."""
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


def swav_loss(
    scores: Sequence[Float[Array, 'crops_x_images _']],
    queue_scores: Sequence[Float[Array, 'assign batches images _']] | None,
    queue: Queue | None,
    weights: Float[Array, ' images'],
    *,
    num_crops: int,
    crops_for_assign: Sequence[int],
    temperature: float,
    epsilon: float,
    num_iters: int,
    hard_assignment: bool | Bool[Array, ''] = False,
    powerlaw: float = 0.0,
    use_double_precision: bool = False,
    axis_names: Sequence[str] = (),
) -> tuple[Float[Array, ''], list[Float[Array, 'assign images _']]]:
    """This replica's SwAV loss; the mean over replicas is the loss of the global batch.

    Args:
      scores: for each head, (V·B, K_h), crop-major.
      queue_scores: for each head, (A, S, B, K_h) scores of the queue with the current prototypes.
      queue: the queue itself, for its weights; it counts once it is full.
      weights: (B,) 1, or 0 for an image that must not count.
      num_crops: V.
      crops_for_assign: the A crops that get codes.
      temperature, epsilon, num_iters, powerlaw: see `sinkhorn_codes` and `swapped_prediction`.
      hard_assignment: round the codes to one-hot ones.
      use_double_precision: codes and loss in float64 (needs jax_enable_x64).
      axis_names: mesh axes that the batch is spread over.

    Returns:
      The loss, and for each head the (A, B, K_h) codes of this replica's images.
    """
    if use_double_precision:
        scores = [s.astype(jnp.float64) for s in scores]
    assign = jnp.asarray(crops_for_assign)
    num_images = weights.shape[0]
    scores = [s.reshape(num_crops, num_images, s.shape[-1]) for s in scores]

    samples, sample_weights = [s[assign] for s in scores], weights
    if queue is not None:
        old = [
            q.reshape(len(assign), -1, q.shape[-1]).astype(scores[0].dtype) for q in queue_scores
        ]
        samples = [jnp.concatenate(pair, axis=1) for pair in zip(samples, old, strict=True)]
        sample_weights = jnp.append(weights, jnp.where(queue.is_full(), queue.weights, 0.0))
    codes = sinkhorn_codes(
        samples,
        epsilon=epsilon,
        num_iters=num_iters,
        weights=sample_weights,
        powerlaw=powerlaw,
        axis_names=axis_names,
    )
    codes = [c[:, :num_images] for c in codes]
    codes = [jnp.where(hard_assignment, harden(c), c) for c in codes]

    losses = [
        swapped_prediction(s, c, crops_for_assign=crops_for_assign, temperature=temperature)
        for s, c in zip(scores, codes, strict=True)
    ]
    # Images of weight 0 leave the mean over the mesh, whichever replica they fell to.
    mean_weight = lax.pmean(jnp.mean(weights), axis_names)
    loss = jnp.mean(weights * sum(losses) / len(losses)) / jnp.maximum(mean_weight, 1e-12)
    return loss, codes


def normalize_prototypes(params: dict) -> dict:
    """The head's parameters with every prototype (a column of (D, K_h)) scaled to length 1.

    Done before the first step and after every update, frozen ones included
    (`normalize_last_layer`). Length 0 stays 0, as in torch.nn.functional.normalize.
    """
    head = dict(params['head'])
    for name in head:
        if name.startswith('prototypes'):
            kernel = head[name]['kernel']
            length = jnp.linalg.norm(kernel, axis=0, keepdims=True)
            head[name] = {**head[name], 'kernel': kernel / jnp.maximum(length, 1e-12)}
    return {**params, 'head': head}
