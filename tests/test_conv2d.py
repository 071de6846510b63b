"""Convolution and max-pooling against XLA's and PyTorch's, in values and gradients."""

import functools
import itertools

import jax
import numpy as np
import pytest
import torch
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from swav_jax.models.conv2d import conv2d
from swav_jax.models.pool import max_pool

# Every branch of the CPU's rules, and the edges between them.
# batch, height, width, channels, kernel, stride, padding, groups, features
CASES = {
    '1x1': (2, 5, 6, 16, 1, 1, 0, 1, 8),
    '1x1 to more features': (2, 5, 6, 8, 1, 1, 0, 1, 16),
    '1x1 with stride': (2, 7, 8, 6, 1, 2, 0, 1, 8),
    '1x1 padded': (2, 4, 4, 6, 1, 2, 1, 1, 8),
    '3x3': (2, 7, 6, 40, 3, 1, 1, 1, 24),
    '3x3 unpadded': (2, 8, 8, 4, 3, 1, 0, 1, 40),
    '3x3 padded by more than it reaches': (2, 5, 5, 4, 3, 1, 3, 1, 40),
    '3x3 with stride': (2, 9, 8, 12, 3, 2, 1, 1, 20),
    '3x3 with stride that skips the last pixels': (2, 8, 8, 12, 3, 3, 0, 1, 20),
    '7x7 stem': (2, 16, 18, 3, 7, 2, 3, 1, 64),
    'many channels': (2, 5, 6, 256, 3, 1, 1, 1, 8),
    'many channels with stride': (2, 6, 5, 256, 3, 2, 1, 1, 256),
    'a stride that the kernel does not reach': (2, 7, 8, 4, 2, 3, 0, 1, 20),
    'one channel': (2, 8, 8, 1, 3, 1, 1, 1, 8),
    'few channels': (2, 4, 16, 8, 3, 1, 1, 1, 8),
    'few channels with stride': (2, 8, 16, 8, 3, 2, 1, 1, 16),
    'few channels on a width that blocks do not divide': (2, 7, 7, 8, 3, 1, 1, 1, 8),
    'three features': (2, 8, 20, 4, 3, 1, 1, 1, 3),
    '2x2 maps': (3, 2, 2, 8, 3, 1, 1, 1, 12),
    '2x2 maps to one pixel': (3, 2, 2, 8, 3, 2, 1, 1, 12),
    '1x1 maps': (3, 1, 1, 8, 3, 1, 1, 1, 12),
    '1x4 maps': (3, 1, 4, 8, 3, 1, 1, 1, 12),
    '7x7 over 2x2 maps': (3, 2, 2, 4, 7, 2, 3, 1, 8),
    'groups': (2, 6, 6, 48, 3, 1, 1, 6, 48),
    'groups left over': (2, 6, 6, 40, 3, 2, 1, 5, 80),
    'wide groups': (2, 6, 6, 96, 3, 1, 1, 2, 96),
    'groups over 2x2 maps': (2, 2, 2, 16, 3, 1, 1, 4, 16),
    '1x1 with groups': (2, 4, 4, 16, 1, 2, 0, 4, 8),
    'one channel a group': (2, 5, 5, 34, 3, 1, 1, 34, 34),
    'many images': (67, 4, 4, 3, 3, 1, 1, 1, 4),
}


def xla(x, kernel, *, stride, padding, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def operands(case, dtype=np.float64):
    batch, height, width, channels, size, stride, padding, groups, features = CASES[case]
    random = np.random.default_rng(0)
    x = random.normal(size=(batch, height, width, channels)).astype(dtype)
    kernel = random.normal(size=(size, size, channels // groups, features)).astype(dtype)
    return x, kernel, dict(stride=stride, padding=padding, groups=groups)


def value_and_gradients(conv, x, kernel, dy_seed=1):
    y, gradients = jax.vjp(conv, x, kernel)
    dy = np.random.default_rng(dy_seed).normal(size=y.shape).astype(y.dtype)
    return y, *gradients(dy)


@pytest.mark.parametrize('case', CASES)
def test_equals_xla(case):
    with jax.enable_x64(True):
        x, kernel, settings = operands(case)
        expected, actual = (
            jax.jit(functools.partial(value_and_gradients, functools.partial(conv, **settings)))(
                x, kernel
            )
            for conv in (xla, conv2d)
        )
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-11)


def test_kernels_need_not_be_square():
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        x, kernel = random.normal(size=(2, 8, 9, 4)), random.normal(size=(3, 2, 4, 5))
        for stride, padding in itertools.product((1, 2), (0, 1)):
            settings = dict(stride=stride, padding=padding)
            expected, actual = (
                jax.jit(
                    functools.partial(value_and_gradients, functools.partial(conv, **settings))
                )(x, kernel)
                for conv in (xla, conv2d)
            )
            for a, b in zip(actual, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    'case', ['1x1', '3x3 with stride', 'few channels', '2x2 maps', 'groups', 'many images']
)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_dtypes_round_once_or_twice(case, dtype):
    x, kernel, settings = operands(case, jnp.dtype(dtype))
    actual = value_and_gradients(functools.partial(conv2d, **settings), x, kernel)
    with jax.enable_x64(True):
        exact = value_and_gradients(
            functools.partial(xla, **settings), x.astype(np.float64), kernel.astype(np.float64)
        )
        for a, b in zip(actual, exact, strict=True):
            assert a.dtype == dtype
            error = np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
            assert error < 4 * jnp.finfo(dtype).eps


@pytest.mark.parametrize('case', ['1x1', '3x3 with stride', 'few channels', '2x2 maps', 'groups'])
@pytest.mark.parametrize('replicated', ['kernel', 'images', 'neither'])
def test_inside_shard_map(case, replicated):
    """Gradients of what devices share are summed over them, and of what they do not are not."""
    mesh = jax.make_mesh((2, 2), ('group', 'member'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.enable_x64(True):
        x, kernel, settings = operands(case)
        x = np.stack([x * (1 + i) for i in range(4)])
        dy = np.random.default_rng(1).normal(
            size=(4, *jax.eval_shape(functools.partial(xla, **settings), x[0], kernel).shape)
        )

        def gradients(conv, x, kernel, dy):
            x, kernel, dy = x[0], kernel[0], dy[0]
            if replicated == 'neither':
                kernel = lax.pcast(kernel, ('group', 'member'), to='varying')
            grads = jax.vjp(functools.partial(conv, **settings), x, kernel)[1](dy)
            return jax.tree.map(lambda a: a[None], grads)

        varying, same = P(('group', 'member')), P()
        x_spec, out_specs = {
            'kernel': (varying, (varying, same)),
            'images': (same, (same, varying)),
            'neither': (varying, (varying, varying)),
        }[replicated]
        kernels = np.stack([kernel] * 4) if replicated == 'images' else kernel[None]
        kernel_spec = varying if replicated == 'images' else same
        x = x[:1] if replicated == 'images' else x
        expected, actual = (
            jax.jit(
                jax.shard_map(
                    functools.partial(gradients, conv),
                    mesh=mesh,
                    in_specs=(x_spec, kernel_spec, varying),
                    out_specs=out_specs,
                )
            )(x, kernels, dy)
            for conv in (xla, conv2d)
        )
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-10)


def test_rematerialised():
    x, kernel, settings = operands('few channels', np.float32)

    def gradients(wrap):
        conv = wrap(functools.partial(conv2d, **settings))
        return jax.jit(jax.grad(lambda x, k: jnp.sin(conv(x, k)).sum(), argnums=(0, 1)))(x, kernel)

    plain, checkpointed = gradients(lambda conv: conv), gradients(jax.checkpoint)
    for a, b in zip(checkpointed, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize('case', ['3x3 with stride', 'few channels', '2x2 maps', 'groups'])
def test_gpu_programs_leave_all_to_cudnn(case):
    x, kernel, settings = operands(case, np.float32)

    def program(conv):
        function = jax.jit(
            functools.partial(value_and_gradients, functools.partial(conv, **settings))
        )
        return jax.export.export(function, platforms=['cuda'])(x, kernel).mlir_module()

    operations = ('stablehlo.convolution', 'stablehlo.dot_general', 'stablehlo.pad', 'inlineable')
    ours, theirs = program(conv2d), program(xla)
    for operation in operations:
        assert ours.count(operation) == theirs.count(operation), operation
    assert ours.count('stablehlo.convolution') == 3


@pytest.mark.parametrize('size', [(8, 8), (7, 9), (1, 1), (2, 5), (16, 6)])
def test_max_pool_equals_torch(size):
    """With few distinct values, so that nearly every window has several maxima."""
    random = np.random.default_rng(0)
    x = random.integers(0, 3, size=(3, *size, 5)).astype(np.float64)
    theirs = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    y = torch.nn.functional.max_pool2d(theirs, 3, 2, 1)
    dy = random.normal(size=y.shape)
    y.backward(torch.tensor(dy))
    with jax.enable_x64(True):
        ours, gradient = jax.vjp(jax.jit(max_pool), x)
        np.testing.assert_array_equal(ours, y.detach().permute(0, 2, 3, 1))
        (dx,) = gradient(dy.transpose(0, 2, 3, 1))
        np.testing.assert_allclose(dx, theirs.grad.permute(0, 2, 3, 1), rtol=1e-14, atol=1e-14)


def test_max_pool_shows_nan_and_infinities():
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 1, 1, 0], x[0, 3, 3, 0] = np.nan, -np.inf
    expected = torch.nn.functional.max_pool2d(torch.tensor(x[..., 0]), 3, 2, 1)
    np.testing.assert_array_equal(max_pool(x)[..., 0], expected)
    np.testing.assert_array_equal(max_pool(np.full_like(x, -np.inf)), -np.inf)
