"""Training of small networks from given crops, without any data, for the tests of the step."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from swav_jax import config, methods, models, optim, step
from swav_jax.parallel.layout import Layout
from swav_jax.parallel.mesh import AXES, make_mesh, put
from swav_jax.precision import LossScale


class OneLayer(nn.Module):
    """The least trunk that has all that a step has to care for; it compiles in a second."""

    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(self.norm(name='bn1')(self.conv(32, 3, 2, name='conv1')(x), train))
        return x.mean((1, 2))


def small_config(**changes):
    """Three crops of 16 and 8 pixels and a small head, with changes by dotted name."""
    c = config.default()
    c.data.num_crops, c.data.size_crops = (2, 1), (16, 8)
    c.data.batchsize_per_replica = 8
    c.model.trunk.depth, c.model.trunk.width_multiplier, c.model.trunk.stem = 18, 0.0625, 'small'
    c.model.head.dims, c.model.head.num_clusters = (0, 16, 8), (6,)
    c.model.temp_frozen_params_iter_map = ()
    c.optimizer.use_larc = False
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


def build(c, **kwargs):
    """The network of a config, with `OneLayer` for a trunk as narrow as `small_config`'s."""
    net = models.build(c.model, **kwargs)
    if c.model.trunk.get('width_multiplier') != 0.0625:
        return net
    return net.clone(trunk=OneLayer(net.trunk.conv, net.trunk.norm))


def start(c, devices, *, rate=0.1, dtype=jnp.float32, queue_batches=0, batch=16):
    """Mesh, network, optimizer and state for given crops, without any data: an epoch is a batch."""
    mesh = make_mesh(c.model.sync_bn, jax.devices()[:devices])
    plain = build(c, dtype=dtype)
    crops = [jnp.zeros((2, s, s, 3), dtype) for s in c.data.size_crops]
    variables = jax.jit(lambda: plain.init(jax.random.key(0), crops, train=True))()
    c.loss.queue.queue_length = queue_batches * batch
    sizes = SimpleNamespace(batch_size=batch, steps_per_epoch=1, num_images=batch)
    method = methods.make(c)
    params, own = method.init(variables['params'], variables['batch_stats'], sizes)
    tx = optim.make_optimizer(c.optimizer, rate, dict(c.model.temp_frozen_params_iter_map), params)
    state = first_state(tx, params, variables['batch_stats'], own, c.precision)
    net = build(c, dtype=dtype, axis_names=('member',), mesh_axes=AXES)
    turns = c.train.micro_batches
    layout = Layout(mesh, state, c.sharding, method.specs(own), turns)
    return layout, net, tx, layout.spread(put(mesh, jax.device_get(state)))


def first_state(tx, params, batch_stats, own, precision='float32'):
    """The state before the first step; `own` is the method's."""
    return step.TrainState(
        step=jnp.int32(0),
        failed=jnp.array(False),
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        method=own,
        loss_scale=LossScale.initial(precision),
    )


def state_of(variables):
    """A state with the variables of a network, for what evaluates it."""
    rest = dict.fromkeys(('step', 'failed', 'opt_state', 'method', 'loss_scale'))
    return step.TrainState(**variables, **rest)


def make_update(c, layout, net, tx):
    """The compiled update from crops (per group (n, B, S, S, C)) and weights (B,)."""
    return jax.jit(partial(step.update, net, tx, c, layout))


def random_crops(c, seed, batch=16, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((n, batch, s, s, 3)).astype(dtype)
        for n, s in zip(c.data.num_crops, c.data.size_crops, strict=True)
    ]
