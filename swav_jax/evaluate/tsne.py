"""Points in a plane that are neighbours where high-dimensional ones are: t-SNE.

van der Maaten and Hinton 2008, JMLR 9. Exact, hence for a few thousand points at most.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def embed(
    x: np.ndarray, *, perplexity: float = 30.0, steps: int = 750, exaggerated_steps: int = 250
) -> np.ndarray:
    """A map (N, 2) of points (N, D). The same points give the same map.

    Args:
      x: N points, at least 4.
      perplexity: about how many neighbours a point has; lowered to a third of N.
      steps: of gradient descent.
      exaggerated_steps: of these, how many at first pull neighbours together 12 times as much.
    """
    x = jnp.asarray(x, jnp.float32)
    centred = x - x.mean(0)
    _, _, axes = jnp.linalg.svd(centred, full_matrices=False)
    start = centred @ axes[:2].T
    start = start / jnp.maximum(start[:, 0].std(), 1e-12) * 1e-4
    neighbors = _joint_probabilities(x, min(perplexity, len(x) / 3))
    return np.asarray(_descend(neighbors, start, steps, exaggerated_steps))


def _square_distances(x):
    norms = jnp.sum(x * x, 1)
    products = jnp.matmul(x, x.T, precision=lax.Precision.HIGHEST)
    return jnp.maximum(norms[:, None] + norms - 2 * products, 0)


@jax.jit
def _joint_probabilities(x, perplexity):
    """P (N, N): Gaussian neighbourhoods, each as wide as its entropy ln(perplexity) wants."""
    distances = _square_distances(x)
    itself = jnp.eye(len(x), dtype=bool)

    def conditional(precision):
        logits = jnp.where(itself, -jnp.inf, -distances * precision[:, None])
        return jax.nn.softmax(logits, 1)

    def halve(_, bounds):
        low, high = bounds  # of the logarithm of the precision
        middle = (low + high) / 2
        p = conditional(jnp.exp(middle))
        entropy = -jnp.sum(jax.scipy.special.xlogy(p, p), 1)
        too_wide = entropy > jnp.log(perplexity)
        return jnp.where(too_wide, middle, low), jnp.where(too_wide, high, middle)

    bounds = jnp.full(len(x), -20.0), jnp.full(len(x), 20.0)
    low, high = lax.fori_loop(0, 40, halve, bounds)
    p = conditional(jnp.exp((low + high) / 2))
    return (p + p.T) / (2 * len(x))


@functools.partial(jax.jit, static_argnames=('steps', 'exaggerated_steps'))
def _descend(p, y, steps, exaggerated_steps):
    rate = jnp.maximum(len(y) / 48, 50.0)

    def move(step, carry):
        y, velocity, gains = carry
        early = step < exaggerated_steps
        kernel = 1 / (1 + _square_distances(y))
        kernel = kernel - jnp.diag(jnp.diag(kernel))
        pull = (jnp.where(early, 12.0, 1.0) * p - kernel / kernel.sum()) * kernel
        gradient = 4 * (pull.sum(1, keepdims=True) * y - pull @ y)
        same_way = jnp.sign(gradient) == jnp.sign(velocity)
        gains = jnp.maximum(jnp.where(same_way, gains * 0.8, gains + 0.2), 0.01)
        velocity = jnp.where(early, 0.5, 0.8) * velocity - rate * gains * gradient
        return y + velocity, velocity, gains

    return lax.fori_loop(0, steps, move, (y, jnp.zeros_like(y), jnp.ones_like(y)))[0]
