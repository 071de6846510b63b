"""BatchNorm against PyTorch's, alone and synchronised over a mesh, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from swav_jax.models.norm import BatchNorm

MESH_AXES = ('group', 'member')


def variables(channels, seed=0):
    rng = np.random.default_rng(seed)
    return {
        'params': {'scale': rng.uniform(0.5, 2, channels), 'bias': rng.standard_normal(channels)},
        'batch_stats': {
            'mean': rng.standard_normal(channels),
            'var': rng.uniform(0.5, 2, channels),
        },
    }


def torch_norm(values, x, train, cotangent):
    """PyTorch's output, gradients of x, scale and bias, and running statistics."""
    norm = torch.nn.BatchNorm2d(x.shape[-1], dtype=torch.float64).train(train)
    norm.weight.data = torch.from_numpy(values['params']['scale'])
    norm.bias.data = torch.from_numpy(values['params']['bias'])
    norm.running_mean = torch.from_numpy(values['batch_stats']['mean']).clone()
    norm.running_var = torch.from_numpy(values['batch_stats']['var']).clone()
    x = torch.from_numpy(np.moveaxis(x, -1, 1)).requires_grad_()
    y = norm(x)
    y.backward(torch.from_numpy(np.moveaxis(cotangent, -1, 1)))
    result = dict(
        y=np.moveaxis(y.detach().numpy(), 1, -1),
        dx=np.moveaxis(x.grad.numpy(), 1, -1),
        scale=norm.weight.grad.numpy(),
        bias=norm.bias.grad.numpy(),
        mean=norm.running_mean.numpy(),
        var=norm.running_var.numpy(),
    )
    return result


def our_norm(norm, values, x, train, cotangent):
    """The same of ours; within shard_map, gradients are those of this replica's own loss."""

    def apply(params, x):
        y, new = norm.apply(
            {'params': params, 'batch_stats': values['batch_stats']},
            x,
            train,
            mutable=['batch_stats'],
        )
        return y, new.get('batch_stats', values['batch_stats'])

    y, pullback, stats = jax.vjp(apply, values['params'], x, has_aux=True)
    grads, dx = pullback(cotangent)
    return dict(y=y, dx=dx, **grads, **stats)


def assert_equal(ours, theirs, rtol=1e-10):
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize('train', [True, False])
def test_one_device_equals_torch(train):
    rng = np.random.default_rng(1)
    x, cotangent = rng.standard_normal((2, 4, 5, 3, 6)) + 3
    with jax.enable_x64(True):
        ours = our_norm(BatchNorm(jnp.float64), variables(6), x, train, cotangent)
        assert_equal(ours, torch_norm(variables(6), x, train, cotangent))


@pytest.mark.parametrize('sync', [MESH_AXES, ('member',), ('group',), ()])
def test_groups_on_a_mesh_equal_torch_on_each_groups_images(sync):
    rng = np.random.default_rng(2)
    x, cotangent = rng.standard_normal((2, 8, 3, 3, 6))
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), MESH_AXES)
    norm = BatchNorm(jnp.float64, axis_names=sync, mesh_axes=MESH_AXES)

    def replica(values, x, cotangent):
        values = values | {'params': lax.pcast(values['params'], MESH_AXES, to='varying')}
        out = our_norm(norm, values, x, True, cotangent)
        return out | {name: lax.pmean(out[name], MESH_AXES) for name in ('scale', 'bias')}

    specs = dict(y=P(MESH_AXES), dx=P(MESH_AXES), scale=P(), bias=P(), mean=P(), var=P())
    with jax.enable_x64(True):
        ours = jax.jit(
            jax.shard_map(
                replica, mesh=mesh, in_specs=(P(), P(MESH_AXES), P(MESH_AXES)), out_specs=specs
            )
        )(variables(6), x, cotangent)

    # Rows of the batch that share statistics: replica (g, m) has rows 2·(2·g + m) and the next.
    replicas = np.arange(8).reshape(2, 2, 2)
    groups = {
        MESH_AXES: [replicas],
        ('member',): [replicas[0], replicas[1]],
        ('group',): [replicas[:, 0], replicas[:, 1]],
        (): list(replicas.reshape(4, 2)),
    }[sync]
    parts = [torch_norm(variables(6), x[g.ravel()], True, cotangent[g.ravel()]) for g in groups]
    theirs = {name: np.zeros_like(x) for name in ('y', 'dx')}
    for rows, part in zip(groups, parts, strict=True):
        for name in ('y', 'dx'):
            theirs[name][rows.ravel()] = part[name]
    for name in ('mean', 'var'):  # replicated: the mean over the groups
        theirs[name] = np.mean([part[name] for part in parts], 0)
    for name in ('scale', 'bias'):  # DDP's average over replicas
        theirs[name] = np.sum([part[name] for part in parts], 0) / 4
    assert_equal(ours, theirs)


@pytest.mark.parametrize(('shape', 'sync'), [((2, 4), MESH_AXES), ((1, 8), ('member',))])
def test_one_all_reduce_forward_and_one_backward(shape, sync):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), MESH_AXES)
    norm = BatchNorm(axis_names=sync, mesh_axes=MESH_AXES)
    values = jax.tree.map(np.float32, variables(6))
    x = np.ones((16, 3, 3, 6), np.float32)

    def replica(values, x, cotangent):
        params = lax.pcast(values['params'], MESH_AXES, to='varying')
        out = our_norm(norm, values | {'params': params}, x, True, cotangent)
        return out['y'], out['dx'], out['mean'], out['var']

    step = jax.shard_map(
        replica,
        mesh=mesh,
        in_specs=(P(), P(MESH_AXES), P(MESH_AXES)),
        out_specs=(P(MESH_AXES), P(MESH_AXES), P(), P()),
    )
    program = jax.jit(step).lower(values, x, x).compile().as_text()
    assert program.count(' all-reduce(') + program.count(' all-reduce-start(') == 2


def test_running_statistics_move_once_per_call():
    rng = np.random.default_rng(3)
    batches = [rng.standard_normal((4, 2, 2, 6)), rng.standard_normal((8, 3, 3, 6)) + 1]
    with jax.enable_x64(True):
        values = variables(6)
        for x in batches:
            _, new = BatchNorm(jnp.float64).apply(values, x, True, mutable=['batch_stats'])
            values = values | new
    norm = torch.nn.BatchNorm2d(6, dtype=torch.float64)
    norm.running_mean = torch.from_numpy(variables(6)['batch_stats']['mean'])
    norm.running_var = torch.from_numpy(variables(6)['batch_stats']['var'])
    for x in batches:
        norm(torch.from_numpy(np.moveaxis(x, -1, 1)))
    np.testing.assert_allclose(values['batch_stats']['mean'], norm.running_mean, rtol=1e-10)
    np.testing.assert_allclose(values['batch_stats']['var'], norm.running_var, rtol=1e-10)


def test_a_large_mean_does_not_cancel_the_variance():
    """Once the running mean is near, float32 keeps the digits of a variance 1e8 times smaller."""
    x = 1e4 + np.random.default_rng(4).standard_normal((256, 6)).astype(np.float32)
    stats = {'mean': np.full(6, 1e4, np.float32), 'var': np.ones(6, np.float32)}
    params = {'scale': np.ones(6, np.float32), 'bias': np.zeros(6, np.float32)}
    y, _ = BatchNorm().apply(
        {'params': params, 'batch_stats': stats}, x, True, mutable=['batch_stats']
    )
    exact = x.astype(np.float64)
    np.testing.assert_allclose(y, (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5), atol=2e-6)


def test_a_constant_channel_is_finite_forward_and_backward():
    x = np.full((8, 2, 2, 3), 7.0, np.float32)
    values = jax.tree.map(np.float32, variables(3))
    out = our_norm(BatchNorm(), values, x, True, jnp.ones(x.shape))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    np.testing.assert_allclose(out['y'][0, 0, 0], values['params']['bias'], atol=1e-3)


def test_one_value_per_channel_keeps_the_running_variance_finite():
    values = jax.tree.map(np.float32, variables(3))
    _, new = BatchNorm().apply(values, np.ones((1, 3), np.float32), True, mutable=['batch_stats'])
    assert np.isfinite(new['batch_stats']['var']).all()


def test_half_precision_input_has_float32_statistics():
    x = np.random.default_rng(5).standard_normal((64, 4, 4, 3))
    values = jax.tree.map(np.float32, variables(3))
    y, new = BatchNorm(jnp.bfloat16).apply(
        values, jnp.asarray(x, jnp.bfloat16), True, mutable=['batch_stats']
    )
    assert y.dtype == jnp.bfloat16
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    expected = torch_norm(variables(3), rounded, True, np.zeros_like(x))
    np.testing.assert_allclose(new['batch_stats']['mean'], expected['mean'], rtol=1e-5)
    np.testing.assert_allclose(new['batch_stats']['var'], expected['var'], rtol=1e-5)
    np.testing.assert_allclose(np.float64(y), expected['y'], atol=0.03)
