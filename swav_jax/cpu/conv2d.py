"""The sums of a convolution and of its gradients, in arrangements that XLA is fast at on a CPU.

Measured with jax 0.10 on one core of an AMD EPYC, where XLA reaches its peak of 95 GFLOP/s in
matrix products and in convolutions of many channels over large maps. Each rule says what it fixes.
"""

import functools
import math

import jax
from jax import lax
from jax import numpy as jnp

from swav_jax.cpu.materialize import computed_once


def conv2d_xla(x, kernel, *, stride, padding, groups=1):
    """See `conv2d`; the stride may be a pair."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride) if isinstance(stride, int) else stride,
        padding=[(padding, padding)] * 2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def conv2d_cpu(x, kernel, *, stride, padding, groups):
    """See `conv2d`.

    The kernel's gradient of a grouped convolution takes XLA a second where PyTorch needs 10 ms.
    Here groups are merged into equal parts of at most 32 channels, which are fast, with zeros where
    a channel meets features of another group.
    """
    if groups == 1:
        return _ungrouped(x, kernel, stride, padding)
    *size, channels, features = kernel.shape
    parts = math.ceil(groups / max(1, 32 // channels))
    merged = math.ceil(groups / parts)
    own = jnp.arange(merged)[:, None, None, None] == jnp.arange(groups)[:, None] % merged
    kernel = kernel.reshape(*size, 1, channels, groups, features // groups)
    kernel = jnp.where(own, kernel, 0).reshape(*size, merged * channels, features)
    y = []
    for first in range(0, groups, merged):
        last = min(first + merged, groups)
        part = slice(first * features // groups, last * features // groups)
        x_part = x[..., first * channels : last * channels]
        y.append(_ungrouped(x_part, kernel[:, :, : x_part.shape[-1], part], stride, padding))
    return jnp.concatenate(y, axis=-1)


def _ungrouped(x, kernel, stride, padding):
    if kernel.shape[:2] == (1, 1) and padding == 0:
        return _conv(x[:, ::stride, ::stride], kernel, 1, 0)
    if x.shape[1] * x.shape[2] <= 4:
        return _few_pixels(x, kernel, stride, padding)
    return _conv(x, kernel, stride, padding)


def _few_pixels(x, kernel, stride, padding):
    """One matrix product over pixels and channels.

    Over 2×2 maps XLA falls to 1 GFLOP/s. There, a 3×3 kernel connects every pixel with every
    other: 16 products instead of the 36 of its definition.
    """
    batch, height, width, _ = x.shape
    out_height, out_width = _out_size(x, kernel, stride, padding)
    far = jnp.pad(kernel, [(height, height), (width, width), (0, 0), (0, 0)])
    rows = [height + padding - stride * i for i in range(out_height)]
    columns = [width + padding - stride * j for j in range(out_width)]
    outputs = [far[i : i + height, j : j + width] for i in rows for j in columns]
    x = x.reshape(batch, -1)
    y = jnp.dot(x, jnp.stack(outputs, axis=3).reshape(x.shape[1], -1))
    return y.reshape(batch, out_height, out_width, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x, kernel, stride, padding):
    *size, channels, features = kernel.shape
    if size == [1, 1] and padding == 0:
        return jnp.dot(x, kernel[0, 0])
    if channels >= 256:  # faster than XLA's convolution by a fifth to a half
        patches = _patches(x, size, stride, (padding, padding))
        return jnp.dot(patches, kernel.reshape(-1, features)).reshape(*patches.shape[:-1], -1)
    if channels < 32 and features <= 16:
        return _few_channels(x, kernel, stride, padding)
    return conv2d_xla(x, kernel, stride=stride, padding=padding)


def _few_channels(x, kernel, stride, padding):
    """With fewer than 32 channels and at most 16 features, XLA is at 20 to 45 GFLOP/s.

    A window that is some strides wider yields neighbouring outputs as further features. That adds
    products with zeros, and takes half of the time.
    """
    height, width = _out_size(x, kernel, stride, padding)
    features = kernel.shape[-1]
    block = 32 // features
    if width % block:
        return conv2d_xla(x, kernel, stride=stride, padding=padding)
    shifts = [(stride * i, stride * (block - 1 - i)) for i in range(block)]
    wide = jnp.stack([jnp.pad(kernel, [(0, 0), s, (0, 0), (0, 0)]) for s in shifts], axis=3)
    wide = wide.reshape(*wide.shape[:3], -1)
    y = conv2d_xla(x, wide, stride=(stride, stride * block), padding=padding)
    return y.reshape(-1, height, width, features)


def _forward(x, kernel, stride, padding):
    return _conv(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, operands, dy):
    dx = _image_gradient(*operands, dy, stride, padding)
    return dx, _kernel_gradient(*operands, dy, stride, padding)


_conv.defvjp(_forward, _backward)


def _kernel_gradient(x, kernel, dy, stride, padding):
    """One matrix product over all pixels, mostly 1.2 to 2.5 times as fast as XLA's convolution."""
    *size, channels, features = kernel.shape
    if size == [1, 1] and padding == 0:
        # 90 GFLOP/s with the narrower side first, 50 with the wider.
        narrow_first = channels <= features
        return (_rows_dot(x, dy) if narrow_first else _rows_dot(dy, x).T).reshape(kernel.shape)
    x, dy = computed_once(x), computed_once(dy)
    if stride == 1 and size == [2 * padding + 1] * 2:
        # Moving x along one axis and dy along the other copies each 3 times, instead of x 9 times.
        x = _patches(x, (1, size[1]), 1, (0, padding))
        dy = _patches(dy, (size[0], 1), 1, (padding, 0))
        dk = _rows_dot(dy, x).reshape(size[0], features, size[1], channels)
        return dk[::-1].transpose(0, 2, 3, 1)
    return _rows_dot(dy, _patches(x, size, stride, (padding, padding))).T.reshape(kernel.shape)


def _rows_dot(a, b):
    """(..., m), (..., n) → (m, n), summed over all but the last axis."""
    # As matrices: summing over several axes, XLA would first write a transposed.
    a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def _image_gradient(x, kernel, dy, stride, padding):
    """Convolutions of dy with the mirrored kernel's parts, one for each phase of the pixels.

    Pixels (stride·q + r, stride·q' + r') meet every stride-th element of the kernel only. XLA would
    put zeros between the elements of a strided dy, and multiply with them.
    """
    batch, *size, channels = x.shape
    height, width = (-(-n // stride) for n in size)

    def part(r, outputs, pixels, axis):
        first, shift = (r + padding) % stride, (r + padding) // stride
        length = len(range(first, kernel.shape[axis], stride))
        return slice(first, None, stride), (length - 1 - shift, outputs + shift - pixels, 0)

    def phase(row, column):
        rows, pad_rows = part(row, height, dy.shape[1], 0)
        columns, pad_columns = part(column, width, dy.shape[2], 1)
        mirrored = kernel[rows, columns][::-1, ::-1].swapaxes(2, 3)
        if 0 in mirrored.shape:
            return jnp.zeros((batch, height, width, channels), x.dtype)
        padded = lax.pad(dy, jnp.zeros((), dy.dtype), [(0,) * 3, pad_rows, pad_columns, (0,) * 3])
        return _conv(padded, mirrored, 1, 0)

    phases = [[phase(i, j) for j in range(stride)] for i in range(stride)]
    dx = jnp.stack([jnp.stack(row, axis=3) for row in phases], axis=2)
    return dx.reshape(batch, stride * height, stride * width, -1)[:, : size[0], : size[1]]


def _patches(x, size, stride, padding):
    """What a kernel of `size` meets at each pixel: (B, H', W', kh·kw·C)."""
    x = jnp.pad(x, [(0, 0), (padding[0],) * 2, (padding[1],) * 2, (0, 0)])
    rows, columns = (
        [slice(i, n - k + i + 1, stride) for i in range(k)]
        for n, k in zip(x.shape[1:3], size, strict=True)
    )
    return jnp.concatenate([x[:, i, j] for i in rows for j in columns], axis=-1)


def _out_size(x, kernel, stride, padding):
    return tuple((x.shape[i + 1] + 2 * padding - kernel.shape[i]) // stride + 1 for i in (0, 1))
