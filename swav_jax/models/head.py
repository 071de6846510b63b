"""SwAV's head: a projection to L2-normalised embeddings, and prototypes that score them."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from swav_jax.models.relu import relu

ACTIVATIONS = {
    'relu': relu,
    'gelu': lambda x: nn.gelu(x, approximate=False),
    'none': lambda x: x,
}

# PyTorch's default for a linear layer: uniform within ±1/sqrt(fan_in).
torch_linear_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def torch_bias_init(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for a linear layer's bias: uniform within ±1/sqrt(fan_in)."""
    limit = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)


class Prototypes(nn.Module):
    """Scores of embeddings against K prototypes, the columns of `kernel`, in full precision.

    With `weight_norm` (torch.nn.utils.weight_norm with an initial gain of 1) prototype k is
    gain_k · kernel_k / ‖kernel_k‖.
    """

    num_clusters: int
    weight_norm: bool

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Embeddings (N, D) → scores (N, K), in the dtype of `z`: float32 or float64."""
        shape = (z.shape[-1], self.num_clusters)
        kernel = self.param('kernel', torch_linear_init, shape, z.dtype).astype(z.dtype)
        if self.weight_norm:
            gain = self.param('gain', nn.initializers.ones, shape[1:], z.dtype).astype(z.dtype)
            kernel = kernel * (gain / jnp.linalg.norm(kernel, axis=0))
        # GPUs would multiply float32 in TF32, and Sinkhorn's 1/epsilon magnifies its rounding.
        return jnp.matmul(z, kernel, precision=lax.Precision.HIGHEST)


def prototype_scores(head_params: dict, z: jax.Array) -> tuple[jax.Array, ...]:
    """Scores of embeddings, computed with the prototypes alone, like those of a queue.

    Args:
      head_params: the head's parameters.
      z: embeddings (..., D).

    Returns:
      for each prototype head, scores (..., K).
    """
    names = sorted(
        (n for n in head_params if n.startswith('prototypes')), key=lambda n: int(n[10:])
    )
    return tuple(
        Prototypes(head_params[n]['kernel'].shape[1], 'gain' in head_params[n]).apply(
            {'params': head_params[n]}, z
        )
        for n in names
    )


class SwAVHead(nn.Module):
    """Linear → BatchNorm → activation, …, linear → L2 normalisation → prototypes.

    Attributes:
      dims: output widths of the linear layers.
      num_clusters: number of prototypes in each prototype head.
      use_bn: normalise after each linear layer.
      use_bias: in the linear layers.
      skip_last_bn: end the projection with the last linear layer, without BatchNorm and activation.
      normalize_feats: scale embeddings to length 1.
      activation_name: one of `ACTIVATIONS`.
      weight_norm_prototypes: see `Prototypes`.
      norm: a BatchNorm with dtype and synchronisation already set.
      dtype: of the linear layers.
    """

    dims: tuple[int, ...]
    num_clusters: tuple[int, ...]
    use_bn: bool
    use_bias: bool
    skip_last_bn: bool
    normalize_feats: bool
    activation_name: str
    weight_norm_prototypes: bool
    norm: Callable[..., nn.Module]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Features (N, F) → embeddings (N, D) and, for each prototype head, scores (N, K)."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        activation = ACTIVATIONS[self.activation_name]
        for i, dim in enumerate(self.dims):
            x = nn.Dense(
                dim,
                self.use_bias,
                self.dtype,
                wide,
                kernel_init=torch_linear_init,
                bias_init=torch_bias_init(x.shape[-1]),
                name=f'linear{i}',
            )(x)
            if i == len(self.dims) - 1 and self.skip_last_bn:
                break
            if self.use_bn:
                x = self.norm(name=f'bn{i}')(x, train)
            x = activation(x)
        z = x.astype(wide)
        if self.normalize_feats:
            z = normalize(z)
        scores = tuple(
            Prototypes(clusters, self.weight_norm_prototypes, name=f'prototypes{i}')(z)
            for i, clusters in enumerate(self.num_clusters)
        )
        return z, scores


def normalize(x: jax.Array) -> jax.Array:
    """Rows of length 1, or 0 for a zero row, like torch.nn.functional.normalize."""
    # ‖x‖ is at least 1e-12. The derivative of the square root is infinite at 0.
    squares = jnp.sum(jnp.square(x), -1, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(squares, 1e-24))
