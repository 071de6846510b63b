"""Convolution whose forward and backward passes are fast on the CPU, too.

On a GPU, XLA leaves convolutions to cuDNN. On the CPU it is as fast as PyTorch for many channels
and large maps, and much slower elsewhere. There, `conv2d` arranges the same sums in other ways. The
platform is chosen when the program is lowered: a GPU program contains nothing of it.

Measured with jax 0.10 on an AMD EPYC core whose peak XLA reaches at about 95 GFLOP/s; each rule
below names the case that it mends.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata


def conv2d(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: int, groups: int = 1
) -> jax.Array:
    """Convolves images with a kernel, as torch.nn.functional.conv2d, with channels last.

    Args:
      x: (B, H, W, C) images.
      kernel: (kh, kw, C / groups, D), of the same dtype.
      stride: in pixels, along both axes.
      padding: zero pixels on each of the four sides.
      groups: the channels are cut into so many groups, each convolved with its own kernels.

    Returns:
      (B, H', W', D) with H' = (H + 2·padding - kh) // stride + 1, and W' likewise.
    """
    # Inside shard_map, kernels are often replicated while images vary between devices. The cast's
    # transpose sums over the devices; with it outside, the backward pass below sees equal types.
    axes = _varying_axes(x) | _varying_axes(kernel)
    x, kernel = (lax.pcast(a, tuple(axes - _varying_axes(a)), to='varying') for a in (x, kernel))
    return _conv(x, kernel, stride, padding, groups)


def _varying_axes(a: jax.Array) -> frozenset[str]:
    return jax.typeof(a).manual_axis_type.varying


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x, kernel, stride, padding, groups):
    cpu, default = _by_platform(stride, padding, groups)
    return lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def _conv_forward(x, kernel, stride, padding, groups):
    return _conv(x, kernel, stride, padding, groups), (x, kernel)


def _conv_backward(stride, padding, groups, operands, dy):
    def gradients(conv):
        return lambda x, kernel, dy: jax.vjp(conv, x, kernel)[1](dy)

    cpu, default = map(gradients, _by_platform(stride, padding, groups))
    return lax.platform_dependent(*operands, dy, cpu=cpu, default=default)


_conv.defvjp(_conv_forward, _conv_backward)


def _by_platform(stride, padding, groups):
    settings = dict(stride=stride, padding=padding, groups=groups)
    return functools.partial(_cpu, **settings), functools.partial(_xla, **settings)


def _xla(x, kernel, *, stride, padding, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride) if isinstance(stride, int) else stride,
        padding=[(padding, padding)] * 2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def _cpu(x, kernel, *, stride, padding, groups):
    """Convolution without groups; a few of them side by side where there are groups.

    The kernel's gradient of a grouped convolution takes XLA over a second where PyTorch needs 10
    ms. Groups are merged, with zeros in between, until they have the 32 channels XLA is good at.
    """
    if groups == 1:
        return _cpu_ungrouped(x, kernel, stride, padding)
    channels, features = kernel.shape[2], kernel.shape[3] // groups
    kernels = kernel.reshape(*kernel.shape[:3], groups, features)
    merged = max(1, 32 // channels)
    y = []
    for first in range(0, groups, merged):
        chunk = kernels[:, :, None, :, first : first + merged]
        n = chunk.shape[4]
        chunk = jnp.where(jnp.eye(n, dtype=bool)[:, None, :, None], chunk, 0)
        chunk = chunk.reshape(*kernel.shape[:2], n * channels, n * features)
        start = first * channels
        y.append(_cpu_ungrouped(x[..., start : start + n * channels], chunk, stride, padding))
    return jnp.concatenate(y, axis=-1)


def _cpu_ungrouped(x, kernel, stride, padding):
    if kernel.shape[:2] == (1, 1) and padding == 0:
        return _ungrouped(x[:, ::stride, ::stride], kernel, 1, padding)
    if x.shape[1] * x.shape[2] <= 4:
        return _few_pixels(x, kernel, stride, padding)
    return _ungrouped(x, kernel, stride, padding)


def _few_pixels(x, kernel, stride, padding):
    """One matrix product over pixels and channels: few pixels all see each other.

    A 3×3 convolution of 2×2 maps with 512 channels runs at 1 GFLOP/s in XLA, and this above the
    peak (there is less to do: 16 products of pixels instead of 36).
    """
    batch, height, width, channels = x.shape
    features = kernel.shape[3]
    out_height, out_width = _out_size(x, kernel, stride, padding)
    far = jnp.pad(kernel, [(height, height), (width, width), (0, 0), (0, 0)])
    rows = [height + padding - stride * i for i in range(out_height)]
    columns = [width + padding - stride * j for j in range(out_width)]
    outputs = [far[i : i + height, j : j + width] for i in rows for j in columns]
    matrix = jnp.stack(outputs, axis=3).reshape(height * width * channels, -1)
    return (x.reshape(batch, -1) @ matrix).reshape(batch, out_height, out_width, features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _ungrouped(x, kernel, stride, padding):
    """Convolution as XLA does it, but with more than 16 features, or as a matrix product.

    With fewer than 32 channels and at most 16 features XLA falls back to Eigen and 20–40 GFLOP/s. A
    window that is wider by a few strides yields neighbouring outputs as further features: some
    products with zeros, at twice to four times the speed.
    """
    kernel_height, kernel_width, channels, features = kernel.shape
    if (kernel_height, kernel_width, padding) == (1, 1, 0) and stride == 1:
        return x @ kernel[0, 0]
    height, width = _out_size(x, kernel, stride, padding)
    block = 32 // features
    if channels >= 32 or features > 16 or width % block:
        return _xla(x, kernel, stride=stride, padding=padding)
    shifts = [(stride * i, stride * (block - 1 - i)) for i in range(block)]
    wide = jnp.stack([jnp.pad(kernel, [(0, 0), s, (0, 0), (0, 0)]) for s in shifts], axis=3)
    wide = wide.reshape(kernel_height, -1, channels, block * features)
    y = _xla(x, wide, stride=(stride, stride * block), padding=padding)
    return y.reshape(-1, height, width, features)


def _ungrouped_forward(x, kernel, stride, padding):
    return _ungrouped(x, kernel, stride, padding), (x, kernel)


def _ungrouped_backward(stride, padding, operands, dy):
    x, kernel = operands
    dx = _input_gradient(x, kernel, dy, stride, padding)
    return dx, _kernel_gradient(x, kernel, dy, stride, padding)


_ungrouped.defvjp(_ungrouped_forward, _ungrouped_backward)


def _kernel_gradient(x, kernel, dy, stride, padding):
    *size, channels, features = kernel.shape
    if size == [1, 1] and padding == 0:
        # Products that contract the rows of both sides run at 90 GFLOP/s with the narrower side
        # first, and at 50 with the wider.
        x, dy = x.reshape(-1, channels), dy.reshape(-1, features)
        rows = (((0,), (0,)), ((), ()))
        narrow_first = channels <= features
        dk = lax.dot_general(x, dy, rows) if narrow_first else lax.dot_general(dy, x, rows).T
        return dk.reshape(kernel.shape)
    # XLA transposes both operands, and computes what made them (normalisation, rectifier) again in
    # each transposition, element by element: a tenth of a step. Its speed halves where it sums over
    # more than 32 images.
    x, dy = _computed_once(x), _computed_once(dy)
    images = max(32, -(-len(x) // 8))

    def part(i):
        conv = functools.partial(_xla, x[i : i + images], stride=stride, padding=padding)
        return jax.vjp(conv, kernel)[1](dy[i : i + images])[0]

    return sum(part(i) for i in range(0, len(x), images))


def _input_gradient(x, kernel, dy, stride, padding):
    """A convolution of dy with the mirrored kernel, or, with strides, products and their sums.

    XLA convolves with zeros between the elements of a strided dy: up to four times the work.
    """
    kernel_height, kernel_width, channels, features = kernel.shape
    if stride == 1 and kernel_height == kernel_width > padding:
        mirrored = kernel[::-1, ::-1].swapaxes(2, 3)
        return _ungrouped(dy, mirrored, 1, kernel_height - 1 - padding)
    height, width = _out_size(x, kernel, stride, padding)

    def windows(x):
        x = jnp.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
        rows = [slice(i, i + stride * (height - 1) + 1, stride) for i in range(kernel_height)]
        columns = [slice(j, j + stride * (width - 1) + 1, stride) for j in range(kernel_width)]
        return [x[:, i, j] for i in rows for j in columns]

    wide = jnp.promote_types(x.dtype, jnp.float32)
    products = lax.dot_general(
        dy.reshape(-1, features),
        kernel.reshape(-1, features),
        (((1,), (1,)), ((), ())),
        preferred_element_type=wide,
    ).reshape(*dy.shape[:3], -1, channels)
    parts = [products[:, :, :, i] for i in range(products.shape[3])]
    return jax.vjp(windows, x.astype(wide))[1](parts)[0].astype(x.dtype)


def _out_size(x, kernel, stride, padding):
    return tuple((x.shape[i + 1] + 2 * padding - kernel.shape[i]) // stride + 1 for i in (0, 1))


@jax.jit
def _identity(a):
    return a


def _computed_once(a):
    """`a` behind the call of a function, over whose border XLA:CPU fuses nothing.

    (It drops `lax.optimization_barrier` before it fuses.)
    """
    with set_xla_metadata(inlineable='false'):
        return _identity(a)
