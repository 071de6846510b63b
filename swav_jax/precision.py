"""The dynamic loss scale that float16 needs, and the check that float64 is enabled.

`config.precision` names the compute dtype. With half precision, parameters, BatchNorm statistics,
prototypes, Sinkhorn, softmax, loss and the all-reduced gradients stay float32. With float64, which
is for checking the arithmetic, everything is float64.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from swav_jax.errors import UserError

MIN_SCALE, MAX_SCALE = 1.0, 2.0**24
GROWTH_INTERVAL = 2000  # steps without overflow until the scale doubles


class LossScale(NamedTuple):
    """A factor that keeps float16 gradients from underflowing (NVIDIA apex, Amp)."""

    scale: jax.Array  # () float32
    good_steps: jax.Array  # () int32, since the scale last changed
    overflows: jax.Array  # () int32, number of skipped steps

    @classmethod
    def initial(cls, precision: str) -> 'LossScale | None':
        """Return 2^16 for float16, None for other precisions."""
        if precision != 'float16':
            return None
        return cls(jnp.float32(2.0**16), jnp.int32(0), jnp.int32(0))

    def adjust(self, finite: jax.Array) -> 'LossScale':
        """Halve after an overflow, double after 2,000 good steps, within [1, 2^24]."""
        good_steps = jnp.where(finite, self.good_steps + 1, 0)
        grow = good_steps == GROWTH_INTERVAL
        factor = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5)
        return LossScale(
            jnp.clip(self.scale * factor, MIN_SCALE, MAX_SCALE),
            jnp.where(grow, 0, good_steps),
            self.overflows + jnp.where(finite, 0, 1),
        )


def all_finite(tree) -> jax.Array:
    """Whether no entry of any leaf is NaN or infinite; () bool."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def need_float64(setting: str) -> None:
    """Refuse a setting that needs float64, which JAX would silently replace by float32.

    Raises:
      UserError: float64 is not enabled.
    """
    if not jax.config.jax_enable_x64:
        raise UserError(
            f'config.{setting} asks for float64, which JAX leaves off: set JAX_ENABLE_X64=True in '
            'the environment'
        )
