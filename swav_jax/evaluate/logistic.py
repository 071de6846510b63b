"""Multinomial logistic regression, solved to its optimum: the best linear probe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

# Takes seconds; further steps move the accuracy by some tenths of a percent.
_ENOUGH = {'tolerance': 1e-4, 'max_steps': 300}


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    c: float = 1.0,
    tolerance: float = 1e-5,
    max_steps: int = 2000,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise the mean cross entropy plus ‖W‖² / (2 c N), like scikit-learn's LogisticRegression.

    L-BFGS over all N images at once.

    Args:
      features: (N, F).
      labels: (N,).
      num_classes: C.
      c: inverse strength of the penalty on the weights; the bias has none.
      tolerance: the largest derivative at which to stop.
      max_steps: the number of steps after which to stop in any case.

    Returns:
      Weights (F, C) and bias (C,).
    """
    # Steps are taken in units of each feature's spread, or they would be tiny; the penalty is on
    # the weights of the original features.
    mean, spread = features.mean(0), np.maximum(features.std(0), 1e-6)
    x = jnp.asarray((features - mean) / spread, jnp.float32)
    shape = (features.shape[1], num_classes)
    unit = jnp.asarray(1 / spread, jnp.float32)  # not float64 where a run enables it
    weights, bias = _minimise(
        x, jnp.asarray(labels), unit, shape, 1 / (c * len(x)), tolerance, max_steps
    )
    weights = np.asarray(weights) / spread[:, None]
    return weights, np.asarray(bias) - mean @ weights


def accuracy(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
) -> float:
    """Top-1 accuracy in percent on test images (M, F) of a regression on train images (N, F).

    Every feature is standardised by its mean and its deviation over the training images, so that
    the penalty, c = 1, does not depend on the features' scale. Images without a label (< 0) do not
    count.
    """
    train_x, train_y = train_x[train_y >= 0], train_y[train_y >= 0]
    test_x, test_y = test_x[test_y >= 0], test_y[test_y >= 0]
    mean, spread = train_x.mean(0), np.maximum(train_x.std(0), 1e-6)
    weights, bias = fit((train_x - mean) / spread, train_y, int(train_y.max()) + 1, **_ENOUGH)
    logits = (test_x - mean) / spread @ weights + bias
    return float(100 * np.mean(logits.argmax(1) == test_y))


@functools.partial(jax.jit, static_argnames=('shape', 'max_steps'))
def _minimise(x, labels, unit, shape, decay, tolerance, max_steps):
    def objective(params):
        weights, bias = params
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ weights + bias, labels)
        return losses.mean() + decay / 2 * jnp.sum((weights * unit[:, None]) ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def move(carry):
        step, params, state, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=objective
        )
        steepest = jnp.max(jnp.array([jnp.max(jnp.abs(g)) for g in grad]))
        return step + 1, optax.apply_updates(params, updates), state, steepest

    start = jnp.zeros(shape, x.dtype), jnp.zeros(shape[1], x.dtype)
    carry = 0, start, solver.init(start), jnp.float32(jnp.inf)
    return lax.while_loop(lambda c: (c[0] < max_steps) & (c[3] > tolerance), move, carry)[1]
