"""Batch normalisation with the semantics of PyTorch's SyncBatchNorm."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from swav_jax.models.remat import STATISTICS


class BatchNorm(nn.Module):
    """Normalises over all axes but the last, with statistics shared over `axis_names`.

    As torch.nn.SyncBatchNorm does, and unlike flax.linen.BatchNorm, it normalises with the biased
    variance and moves the running variance by the unbiased one, whose count is that of all
    synchronised replicas. `momentum` has PyTorch's meaning: the weight of the new value.

    Statistics are float32 (float64 for float64 inputs) whatever the compute dtype. All replicas'
    sums travel in one all-reduce forward and, as its transpose, in one backward.

    Running statistics are replicated over the mesh. Where BatchNorm groups are smaller than the
    mesh, each group moves them by its own statistics and the average over the groups is kept
    (PyTorch saves those of rank 0).

    Attributes:
      dtype: of the normalised output.
      axis_names: mesh axes whose replicas share statistics; () synchronises nothing.
      mesh_axes: all axes of the `shard_map` this runs in, () outside of one.
      scale_init: 1, or 0 for the last normalisation of a residual branch.
    """

    dtype: Any = jnp.float32
    axis_names: tuple[str, ...] = ()
    mesh_axes: tuple[str, ...] = ()
    momentum: float = 0.1
    epsilon: float = 1e-5
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(..., C) → the same shape in `dtype`; `train` uses and records the batch's statistics."""
        features = x.shape[-1:]
        stats_dtype = jnp.promote_types(x.dtype, jnp.float32)
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        scale = self.param('scale', self.scale_init, features, param_dtype)
        bias = self.param('bias', nn.initializers.zeros, features, param_dtype)
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, features, param_dtype)
        running_var = self.variable('batch_stats', 'var', jnp.ones, features, param_dtype)

        # All is relative to the running mean. Any shift gives the same moments; one near the mean
        # keeps the digits of a variance much smaller than the mean's square.
        x = x.astype(stats_dtype) - lax.stop_gradient(running_mean.value).astype(stats_dtype)
        mean, var = 0.0, running_var.value.astype(stats_dtype)
        if train:
            # Initialisation wants shapes only, and happens outside of the mesh.
            shared, groups = ((), ()) if self.is_initializing() else self._axes()
            moments, count = _moments(x, shared)
            if not self.is_initializing():
                replicated = lax.pmean(moments, groups) if groups else moments
                batch_mean, batch_var = lax.stop_gradient(replicated)
                unbiased = batch_var * (count / max(count - 1, 1))
                running_mean.value += self.momentum * batch_mean
                running_var.value += self.momentum * (unbiased - running_var.value)
            if shared:
                # Cast before they part, so that the cotangents of both come back in one psum.
                moments = lax.pcast(moments, shared, to='varying')
            mean, var = moments

        gain = scale.astype(stats_dtype) * lax.rsqrt(var + self.epsilon)
        return ((x - mean) * gain + bias.astype(stats_dtype)).astype(self.dtype)

    def _axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Mesh axes that share statistics, and those along which groups differ.

        An axis of one device counts as shared: it then takes no all-reduce of its own to tell
        `shard_map` that nothing differs along it.
        """
        others = [name for name in self.mesh_axes if name not in self.axis_names]
        alone = tuple(name for name in others if lax.axis_size(name) == 1)
        return self.axis_names + alone, tuple(name for name in others if name not in alone)


def _moments(x: jax.Array, axis_names: tuple[str, ...]) -> tuple[jax.Array, int]:
    """Mean and biased variance, stacked (2, C), and how many values each is taken over."""
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    sums = jnp.stack([x.sum(axes), jnp.square(x).sum(axes)])
    if axis_names:
        sums = lax.psum(sums, axis_names)
        count *= lax.axis_size(axis_names)
    sums = checkpoint_name(sums, STATISTICS)
    mean, mean_of_squares = sums / count
    return jnp.stack([mean, jnp.maximum(mean_of_squares - jnp.square(mean), 0)]), count
