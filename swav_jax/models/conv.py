"""The convolutional layer of all trunks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from swav_jax.models.conv2d import conv2d

# He et al., 2015, as PyTorch's `kaiming_normal_(mode='fan_out')`: variance 2 / (k·k·features),
# with all output channels counted, whatever the groups.
kaiming_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class Conv(nn.Module):
    """Square convolution with PyTorch's padding: (k - 1) / 2 on every side, also at stride 2.

    `SAME` would pad a stride-2 convolution by (0, 1) on even sizes and shift the features by a
    pixel against PyTorch's weights.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) → (N, H', W', features) in `dtype`; parameters are float32 or wider."""
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        size = self.kernel_size
        shape = (size, size, x.shape[-1] // self.groups, self.features)
        kernel = self.param('kernel', kaiming_fan_out, shape, param_dtype)
        y = conv2d(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            padding=(size - 1) // 2,
            groups=self.groups,
        )
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros, (self.features,), param_dtype)
            y = y + bias.astype(self.dtype)
        return y
