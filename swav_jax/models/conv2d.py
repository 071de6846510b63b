"""Convolution whose forward and backward passes are fast on the CPU too.

XLA leaves a convolution to cuDNN on a GPU. On the CPU it leaves it to Eigen, which falls behind
where a map has very few pixels or very few channels and in most backward passes. `conv2d` is
`lax.conv_general_dilated` with another arrangement of the same sums there, chosen by platform when
the program is lowered, so a GPU program contains nothing of it.
"""

import functools
from collections.abc import Callable

import jax
from jax import lax
from jax import numpy as jnp


def conv2d(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: int, groups: int = 1
) -> jax.Array:
    """Convolves images with a kernel, as torch.nn.functional.conv2d does in channels-last.

    Args:
      x: (B, H, W, C) images.
      kernel: (kh, kw, C / groups, D).
      stride: in pixels, along both axes.
      padding: zero pixels added on each of the four sides.
      groups: the channels are cut into that many groups, each convolved with its own kernels.

    Returns:
      (B, H', W', D) with H' = (H + 2·padding - kh) // stride + 1, and W' likewise.
    """
    # Inside shard_map, parameters are often replicated while images differ between devices. The
    # cast is transposed into the sum over devices, so the rule below sees equal types only.
    axes = _axes(x) | _axes(kernel)
    x, kernel = (_varying(a, axes) for a in (x, kernel))
    return _conv2d(x, kernel, stride, padding, groups)


def _axes(a: jax.Array) -> frozenset[str]:
    """The mesh axes along which a's values differ, inside shard_map."""
    return jax.typeof(a).manual_axis_type.varying


def _varying(a: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - _axes(a)))
    return lax.pcast(a, missing, to='varying') if missing else a


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv2d(x, kernel, stride, padding, groups):
    reference = functools.partial(_xla, stride=stride, padding=padding, groups=groups)
    rearranged = _arrangement(x.shape, kernel.shape, stride, padding, groups)
    return lax.platform_dependent(x, kernel, cpu=rearranged or reference, default=reference)


def _forward(x, kernel, stride, padding, groups):
    return _conv2d(x, kernel, stride, padding, groups), (x, kernel)


def _backward(stride, padding, groups, saved, dy):
    x, kernel = saved
    reference = functools.partial(_xla, stride=stride, padding=padding, groups=groups)
    rearranged = _arrangement(x.shape, kernel.shape, stride, padding, groups)

    def default(x, kernel, dy):
        return jax.vjp(reference, x, kernel)[1](dy)

    def cpu(x, kernel, dy):
        if rearranged:
            return jax.vjp(rearranged, x, kernel)[1](dy)
        return default(x, kernel, dy)

    return lax.platform_dependent(x, kernel, dy, cpu=cpu, default=default)


_conv2d.defvjp(_forward, _backward)


def _xla(x, kernel, *, stride, padding, groups):
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def _arrangement(x_shape, kernel_shape, stride, padding, groups) -> Callable | None:
    """A function of (x, kernel) that is faster on the CPU than XLA's convolution, if any."""
    _, height, width, _ = x_shape
    kernel_height, kernel_width, _, features = kernel_shape
    if groups > 1:
        return None
    if kernel_height == kernel_width == 1 and padding == 0:
        return functools.partial(_pointwise, stride=stride)
    if height * width <= 4:
        return functools.partial(_dense, stride=stride, padding=padding)
    out_width = width + 2 * padding - kernel_width + 1
    if stride == 1 and features <= 8 and out_width % 4 == 0:
        return functools.partial(_blocked, padding=padding, block=4 if features <= 4 else 2)
    return None


def _pointwise(x, kernel, *, stride):
    return x[:, ::stride, ::stride] @ kernel[0, 0]


def _dense(x, kernel, *, stride, padding):
    """One matrix product over all pixels and channels: there are few pixels, and all meet."""
    batch, height, width, channels = x.shape
    kernel_height, kernel_width, _, features = kernel.shape
    out_height = (height + 2 * padding - kernel_height) // stride + 1
    out_width = (width + 2 * padding - kernel_width) // stride + 1
    padded = jnp.pad(kernel, ((height, height), (width, width), (0, 0), (0, 0)))
    matrix = jnp.stack(
        [
            padded[top : top + height, left : left + width]
            for top in (height + padding - stride * i for i in range(out_height))
            for left in (width + padding - stride * j for j in range(out_width))
        ],
        axis=3,
    )
    y = x.reshape(batch, -1) @ matrix.reshape(height * width * channels, -1)
    return y.reshape(batch, out_height, out_width, features)


def _blocked(x, kernel, *, padding, block):
    """A wider window yields `block` neighbouring outputs at once, as so many more channels."""
    kernel_height, kernel_width, channels, features = kernel.shape
    wide = jnp.stack(
        [jnp.pad(kernel, ((0, 0), (i, block - 1 - i), (0, 0), (0, 0))) for i in range(block)],
        axis=3,
    )
    y = lax.conv_general_dilated(
        x,
        wide.reshape(kernel_height, kernel_width + block - 1, channels, block * features),
        window_strides=(1, block),
        padding=[(padding, padding)] * 2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return y.reshape(y.shape[0], y.shape[1], y.shape[2] * block, features)
