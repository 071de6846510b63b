"""Batch normalisation with the semantics of PyTorch's SyncBatchNorm."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from swav_jax.models.remat import STATISTICS
from swav_jax.parallel.mesh import vary_alike


class BatchNorm(nn.Module):
    """Normalise over all axes but the last, with statistics shared over `axis_names`.

    Like torch.nn.SyncBatchNorm, and unlike flax.linen.BatchNorm, it normalises with the biased
    variance and updates the running variance with the unbiased one, over the values of all
    synchronised replicas. `momentum` has PyTorch's meaning: the weight of the new value.

    Statistics are float32 (float64 for float64 inputs) whatever the compute dtype. The sums of all
    replicas take one all-reduce forward and one backward.

    Running statistics are replicated over the mesh. If BatchNorm groups are smaller than the mesh,
    each group updates them with its own statistics and the average over the groups is kept
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

        shift = lax.stop_gradient(running_mean.value).astype(stats_dtype)
        if not train:
            var = running_var.value.astype(stats_dtype)
            gain = scale * lax.rsqrt(var + self.epsilon)
            return ((x.astype(stats_dtype) - shift) * gain + bias).astype(self.dtype)

        # Initialisation needs shapes only, and runs outside of the mesh.
        shared, groups = ((), ()) if self.is_initializing() else self._axes()
        x, scale, bias = vary_alike(x, scale.astype(stats_dtype), bias.astype(stats_dtype))
        y, moments = _normalize(x, scale, bias, shift, self.epsilon, shared, self.dtype)
        count = _count(x, shared)
        if not self.is_initializing():
            moments = lax.stop_gradient(moments)
            batch_mean, batch_var = lax.pmean(moments, groups) if groups else moments
            unbiased = batch_var * (count / max(count - 1, 1))
            running_mean.value += self.momentum * batch_mean
            running_var.value += self.momentum * (unbiased - running_var.value)
        return y

    def _axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Mesh axes that share statistics, and those along which groups differ.

        An axis of one device counts as shared. Otherwise it would take an all-reduce of its own to
        tell `shard_map` that nothing differs along it.
        """
        others = [name for name in self.mesh_axes if name not in self.axis_names]
        alone = tuple(name for name in others if lax.axis_size(name) == 1)
        return self.axis_names + alone, tuple(name for name in others if name not in alone)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _normalize(x, scale, bias, shift, epsilon, axes, dtype):
    """y, and the batch's mean relative to `shift` and variance (2, C), which get no gradient.

    The backward pass keeps x and two numbers for each channel. If JAX derived it, it would keep
    three arrays of the size of x, and read and write twice as much.
    """
    return _forward(x, scale, bias, shift, epsilon, axes, dtype)[0]


def _forward(x, scale, bias, shift, epsilon, axes, dtype):
    # Values are taken relative to the running mean. Any shift gives the same result; one near the
    # mean keeps the digits of a variance that is much smaller than the square of the mean.
    moved = x.astype(shift.dtype) - shift
    sums = _shared(jnp.stack([_sum(moved), _sum(jnp.square(moved))]), axes)
    mean, mean_of_squares = checkpoint_name(sums, STATISTICS) / _count(x, axes)
    var = jnp.maximum(mean_of_squares - jnp.square(mean), 0)
    inverse_std = lax.rsqrt(var + epsilon)
    y = ((moved - mean) * (scale * inverse_std) + bias).astype(dtype)
    return (y, jnp.stack([mean, var])), (x, shift, mean, inverse_std, scale)


def _backward(epsilon, axes, dtype, kept, cotangents):
    """Ioffe and Szegedy, 2015, section 3, with the sums over all replicas that share statistics."""
    x, shift, mean, inverse_std, scale = kept
    dy = cotangents[0].astype(mean.dtype)
    normal = (x.astype(mean.dtype) - shift - mean) * inverse_std
    sums = jnp.stack([_sum(dy), _sum(dy * normal)])
    dbias, dscale = sums
    dy_mean, dy_normal_mean = _shared(sums, axes) / _count(x, axes)
    dx = (dy - dy_mean - normal * dy_normal_mean) * (scale * inverse_std)
    return dx.astype(x.dtype), dscale, dbias, None


_normalize.defvjp(_forward, _backward)


def _sum(x):
    return jnp.sum(x, tuple(range(x.ndim - 1)))


def _shared(sums, axes):
    return lax.psum(sums, axes) if axes else sums


def _count(x, axes):
    """How many values each moment is taken over."""
    return x.size // x.shape[-1] * (lax.axis_size(axes) if axes else 1)
