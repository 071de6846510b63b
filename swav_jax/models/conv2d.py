"""The convolution of all models: cuDNN's on a GPU, and on the CPU one that is fast there.

The platform is chosen when a program is lowered, so a GPU program contains nothing of
`conv2d_cpu`.
"""

import functools

import jax
from jax import lax

from swav_jax.cpu.conv2d import conv2d_cpu, conv2d_xla
from swav_jax.parallel.mesh import vary_alike


def conv2d(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: int, groups: int = 1
) -> jax.Array:
    """Convolve images with a kernel like torch.nn.functional.conv2d, with channels last.

    Args:
      x: (B, H, W, C) images.
      kernel: (kh, kw, C / groups, D), of the same dtype.
      stride: in pixels, along both axes.
      padding: zero pixels on each of the four sides.
      groups: number of groups of channels, each convolved with its own kernels.

    Returns:
      (B, H', W', D) with H' = (H + 2·padding - kh) // stride + 1, and W' likewise.
    """
    x, kernel = vary_alike(x, kernel)
    return _conv2d(x, kernel, stride, padding, groups)


# Forward and backward pass choose separately: differentiated itself, the choice would keep what
# the backward passes of both platforms need.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv2d(x, kernel, stride, padding, groups):
    cpu, default = _implementations(stride, padding, groups)
    return lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def _forward(x, kernel, stride, padding, groups):
    return _conv2d(x, kernel, stride, padding, groups), (x, kernel)


def _backward(stride, padding, groups, operands, dy):
    conv_cpu, conv_xla = _implementations(stride, padding, groups)

    def cpu(x, kernel, dy):
        return jax.vjp(conv_cpu, x, kernel)[1](dy)

    def default(x, kernel, dy):  # linear in each: no forward pass is traced again
        (dx,) = jax.linear_transpose(lambda x: conv_xla(x, kernel), x)(dy)
        (dkernel,) = jax.linear_transpose(lambda kernel: conv_xla(x, kernel), kernel)(dy)
        return dx, dkernel

    return lax.platform_dependent(*operands, dy, cpu=cpu, default=default)


_conv2d.defvjp(_forward, _backward)


def _implementations(stride, padding, groups):
    settings = dict(stride=stride, padding=padding, groups=groups)
    return functools.partial(conv2d_cpu, **settings), functools.partial(conv2d_xla, **settings)
