"""The sums of a convolution and of its gradients, in arrangements that XLA is fast at on a CPU.

Measured with jax 0.10 on one core of an AMD EPYC, where XLA reaches its peak of 95 GFLOP/s in
matrix products and in convolutions of many channels over large maps. Each rule says what it mends.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata


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
    Here groups are merged, with zeros between them, until they have the 32 channels that are fast.
    """
    if groups == 1:
        return _ungrouped(x, kernel, stride, padding)
    *size, channels, features = kernel.shape
    kernel = kernel.reshape(*size, channels, groups, features // groups)
    y = []
    for first in range(0, groups, max(1, 32 // channels)):
        part = kernel[:, :, None, :, first : first + max(1, 32 // channels)]
        n = part.shape[4]
        part = jnp.where(jnp.eye(n, dtype=bool)[:, None, :, None], part, 0)
        part = part.reshape(*size, n * channels, -1)
        x_part = x[..., first * channels : (first + n) * channels]
        y.append(_ungrouped(x_part, part, stride, padding))
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
    """With fewer than 32 channels and at most 16 features, XLA is at 20 to 45 GFLOP/s.

    A window that is some strides wider yields neighbouring outputs as further features. That adds
    products with zeros, and takes half of the time.
    """
    *size, channels, features = kernel.shape
    if size == [1, 1] and padding == 0:
        return jnp.dot(x, kernel[0, 0])
    height, width = _out_size(x, kernel, stride, padding)
    block = 32 // features
    if channels >= 32 or features > 16 or width % block:
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
    *size, channels, features = kernel.shape
    if size == [1, 1] and padding == 0:
        # 90 GFLOP/s with the narrower side first, 50 with the wider.
        x, dy = x.reshape(-1, channels), dy.reshape(-1, features)
        rows = (((0,), (0,)), ((), ()))
        narrow_first = channels <= features
        dk = lax.dot_general(x, dy, rows) if narrow_first else lax.dot_general(dy, x, rows).T
        return dk.reshape(kernel.shape)
    # XLA transposes both operands, and in each transposition computes what made them (normalisation
    # and rectifier) again, element by element: a tenth of a step. And it halves its speed where
    # it sums over more than 32 images.
    x, dy = _computed_once(x), _computed_once(dy)
    images = max(32, -(-len(x) // 8))

    def part(i):
        conv = functools.partial(conv2d_xla, x[i : i + images], stride=stride, padding=padding)
        return jax.vjp(conv, kernel)[1](dy[i : i + images])[0]

    return sum(part(i) for i in range(0, len(x), images))


def _image_gradient(x, kernel, dy, stride, padding):
    """The convolution of dy with the mirrored kernel; with strides, products and their sums.

    XLA would put zeros between the elements of a strided dy, and multiply with them.
    """
    kernel_height, kernel_width, channels, features = kernel.shape
    if stride == 1 and kernel_height == kernel_width > padding:
        mirrored = kernel[::-1, ::-1].swapaxes(2, 3)
        return _conv(dy, mirrored, 1, kernel_height - 1 - padding)
    height, width = _out_size(x, kernel, stride, padding)

    def windows(x):
        x = jnp.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
        rows = [slice(i, i + stride * (height - 1) + 1, stride) for i in range(kernel_height)]
        columns = [slice(j, j + stride * (width - 1) + 1, stride) for j in range(kernel_width)]
        return jnp.stack([x[:, i, j] for i in rows for j in columns], axis=3)

    sum_dtype = jnp.promote_types(x.dtype, jnp.float32)
    products = lax.dot_general(
        dy.reshape(-1, features),
        kernel.reshape(-1, features),
        (((1,), (1,)), ((), ())),
        preferred_element_type=sum_dtype,
    ).reshape(*dy.shape[:3], -1, channels)
    return jax.vjp(windows, x.astype(sum_dtype))[1](products)[0].astype(x.dtype)


def _out_size(x, kernel, stride, padding):
    return tuple((x.shape[i + 1] + 2 * padding - kernel.shape[i]) // stride + 1 for i in (0, 1))


@jax.jit
def _identity(a):
    return a


def _computed_once(a):
    """`a`, handed through a function whose border XLA does not fuse across.

    On the CPU it drops `lax.optimization_barrier` before it fuses.
    """
    with set_xla_metadata(inlineable='false'):
        return _identity(a)
