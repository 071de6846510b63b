"""Sinkhorn's codes: samples assigned to prototypes in given shares, over all devices of a mesh.

Letters: A crops of N samples, K prototypes of one of several heads.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Stands for log 0: finite, so that a device without a single valid image computes no NaN.
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

    All crops and heads are computed together. A round is one all-reduce of H·A·K sums, and one
    maximum precedes the first: after a round, column k of Q holds at least its share r_k of a
    sample, so later sums cannot underflow.

    Args:
      scores: for each head, (A, N, K_h), in [-1, 1]: this device's N samples, queue included.
      epsilon: entropy regularisation, > 0. Smaller is sharper.
      num_iters: number of rounds, >= 1.
      weights: (N,) 1, or 0 for a sample that must not count; it gets a code as well.
      powerlaw: prototype k's share is proportional to (k + 1)^-powerlaw; 0 is equal shares.
      axis_names: mesh axes over which the samples are split.

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

    # Any start that is the same for all samples gives the same codes; this one avoids overflow.
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
    """One-hot codes at the first largest entry (VISSL's hard assignment)."""
    return jax.nn.one_hot(jnp.argmax(codes, -1), codes.shape[-1], dtype=codes.dtype)
