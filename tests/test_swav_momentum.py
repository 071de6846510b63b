"""SwAV with a momentum encoder against VISSL's, over whole trainings; either encoder in use."""

import json
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from processes import TINY
from small_run import random_variables, write_run
from small_training import first_state

from swav_jax import commands, methods, models, step
from swav_jax import config as settings
from swav_jax.config.file import load_config
from swav_jax.errors import UserError
from swav_jax.evaluate.model import load, load_weights
from swav_jax.methods import swav
from swav_jax.methods.method import Batch, Network, Outputs
from swav_jax.methods.swav_momentum import MomentumState
from swav_jax.models import SwAVNet
from swav_jax.models.head import SwAVHead
from swav_jax.models.norm import BatchNorm
from swav_jax.parallel.layout import Layout
from swav_jax.parallel.mesh import AXES, make_mesh, put
from swav_jax.runs.checkpoint import Checkpoints

GOLDEN = np.load(Path(__file__).parent / 'golden' / 'swav_momentum.npz')
META = json.loads(str(GOLDEN['meta']))
LOSSES = [name for name, meta in META.items() if meta['kind'] == 'loss']
TRAJECTORIES = [name for name, meta in META.items() if meta['kind'] == 'trajectory']


assert_equal = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


def make_config(meta):
    c = settings.default()
    c.method, c.precision = 'swav_momentum', 'float64'
    c.data.num_crops, c.data.size_crops = (meta['num_crops'],), (8,)
    c.data.crop_scales = ((0.2, 1.0),)
    c.data.batchsize_per_replica = meta['batch_per_replica']
    c.model.head.num_clusters = tuple(meta['num_prototypes'])
    c.loss.crops_for_assign = tuple(meta['crops_for_assign'])
    for name in ('temperature', 'epsilon', 'num_iters'):
        c.loss[name] = meta[name]
    c.loss.queue.queue_length = meta['local_queue_length'] * meta['world']
    c.loss.queue.start_iter = meta['start_iter']
    for name in ('momentum', 'momentum_eval_mode_iter_start'):
        c.loss[name] = meta.get(name, c.loss[name])
    return c


def heads_of(case, name):
    """A head's parameters from the golden prototypes (K, D)."""
    count = len(META[case]['num_prototypes'])
    return {
        f'prototypes{h}': {'kernel': jnp.asarray(GOLDEN[f'{case}/{name}{h}'].T, jnp.float64)}
        for h in range(count)
    }


def score(params, z):
    """Scores of embeddings for each head; `params` as of a network."""
    head = params['head']
    return tuple(z @ head[name]['kernel'] for name in sorted(head))


def stored(case, rows):
    """The golden queue (world, A, batches × B, D) as ours (A, batches, world × B, D)."""
    world, assign = META[case]['world'], len(META[case]['crops_for_assign'])
    queue = GOLDEN[f'{case}/queue'].astype(np.float64)
    dim = queue.shape[-1]
    queue = queue.reshape(world, assign, -1, rows, dim).transpose(1, 2, 0, 3, 4)
    queue = queue.reshape(assign, -1, world * rows, dim)
    return swav.Queue(queue, np.ones(queue.shape[1:3], np.float32), np.int32(0))


def opened(queue):
    """The queue in use: VISSL's is full of random rows from the start, ours fills first."""
    return queue._replace(filled=jnp.int32(queue.weights.shape[0]))


def shown(queue, world):
    """Ours as the golden queue."""
    assign, batches, rows, dim = queue.embeddings.shape
    x = np.reshape(queue.embeddings, (assign, batches, world, rows // world, dim))
    return x.transpose(2, 0, 1, 3, 4).reshape(world, assign, -1, dim)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('case', LOSSES)
def test_loss_codes_gradients_and_queue_equal_vissls(case):
    meta = META[case]
    world, rows, count = meta['world'], meta['batch_per_replica'], len(meta['num_prototypes'])
    mesh = make_mesh({'enabled': True, 'group_size': 0}, jax.devices()[:world])
    method = methods.make(make_config(meta))
    queue = stored(case, rows) if meta['local_queue_length'] else None
    own = {'head': heads_of(case, 'momentum_prototypes')}
    specs = method.specs(MomentumState(own, {}, queue))

    def replica(embeddings, seen, params, state, number):
        embeddings, seen = embeddings[0], seen[0]
        network = Network(lambda *_: (Outputs(seen, score(own, seen)), {}), score)
        batch = Batch(number, lax.pcast(jnp.ones(rows, jnp.float32), AXES, to='varying'), None, {})

        def loss_of(embeddings, params):
            outputs = Outputs(embeddings, score(params, embeddings))
            learned = method.loss(network, params, outputs, batch, state)
            return learned.loss, learned

        params = lax.pcast(params, AXES, to='varying')
        grads, learned = jax.grad(loss_of, (0, 1), has_aux=True)(embeddings, params)
        of_params = lax.pmean(grads[1], AXES)
        codes = [c[None] for c in learned.codes]
        return learned.loss[None], codes, grads[0][None], of_params, learned.state

    split = P(AXES)
    run = jax.jit(
        jax.shard_map(
            replica,
            mesh=mesh,
            in_specs=(split, split, P(), specs, P()),
            out_specs=(split, split, split, P(), specs),
        )
    )
    state, params = MomentumState(own, {}, queue), {'head': heads_of(case, 'prototypes')}
    several = meta['steps'] > 1
    for t in range(meta['steps']):

        def given(name, t=t):
            found = GOLDEN[f'{case}/{name}']
            return found[t] if several else found

        if queue is not None and t == meta['start_iter']:
            state = state._replace(queue=opened(state.queue))
        inputs = (given(name).astype(np.float64) for name in ('embeddings', 'momentum_embeddings'))
        loss, codes, of_embeddings, of_params, state = run(*inputs, params, state, jnp.int32(t))
        assert_equal(loss, given('loss'))
        assert_equal(of_embeddings, given('grad_embeddings'))
        for h in range(count):
            assert_equal(codes[h], given(f'assignments{h}'))
            assert_equal(
                of_params['head'][f'prototypes{h}']['kernel'].T, given(f'grad_prototypes{h}')
            )
        if queue is not None:
            assert_equal(shown(state.queue, world), given('queue_after'))


class Layer(nn.Module):
    """The golden trunk: linear, BatchNorm, ReLU."""

    norm: Any

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16, dtype=jnp.float64, param_dtype=jnp.float64, name='linear')(x)
        return nn.relu(self.norm(name='bn')(x, train))


NAMES = {
    'trunk.0': ('trunk', 'linear'),
    'trunk.1': ('trunk', 'bn'),
    'projection_head.0': ('head', 'linear0'),
    'projection_head.1': ('head', 'bn0'),
    'projection_head.3': ('head', 'linear1'),
}
KINDS = {
    'weight': ('params', 'kernel'),
    'bias': ('params', 'bias'),
    'running_mean': ('batch_stats', 'mean'),
    'running_var': ('batch_stats', 'var'),
}


def ours(tensors):
    """Our variables from PyTorch's tensors by name."""
    found = {'params': {}, 'batch_stats': {}}
    for name, value in tensors.items():
        module, _, kind = name.rpartition('.')
        collection, leaf = KINDS[kind]
        if leaf == 'kernel' and value.ndim == 1:
            leaf = 'scale'
        part, layer = NAMES.get(module, ('head', module))
        where = found[collection].setdefault(part, {}).setdefault(layer, {})
        where[leaf] = value.T if value.ndim == 2 else value
    return found


def tensors(case, name, t=None):
    prefix = f'{case}/{name}/'
    found = {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN if key.startswith(prefix)}
    return {key: x if t is None else x[t] for key, x in found.items()}


def build(meta, **axes):
    norm = partial(BatchNorm, dtype=jnp.float64, **axes)
    head = SwAVHead(
        dims=(meta['widths'][-1], meta['embedding_dim']),
        num_clusters=tuple(meta['num_prototypes']),
        use_bn=True,
        use_bias=True,
        skip_last_bn=True,
        normalize_feats=True,
        activation_name='relu',
        weight_norm_prototypes=False,
        norm=norm,
        dtype=jnp.float64,
    )
    return SwAVNet(Layer(norm), head)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(
    ('devices', 'sharding'),
    [(1, 'replicated'), pytest.param(4, 'zero', marks=pytest.mark.slow)],
)
@pytest.mark.parametrize('case', TRAJECTORIES)
def test_training_equals_vissls(case, devices, sharding):
    meta = META[case]
    config = make_config(meta)
    mesh = make_mesh(config.model.sync_bn, jax.devices()[:devices])
    method, rows = methods.make(config), meta['batch_per_replica']
    variables = ours(tensors(case, 'params0'))
    sizes = SimpleNamespace(batch_size=rows)
    params, own = method.init(variables['params'], variables['batch_stats'], sizes)
    tx = optax.sgd(meta['lr'], meta['sgd_momentum'])
    state = first_state(tx, params, variables['batch_stats'], own)
    if own.queue is not None:
        state = state.replace(method=own._replace(queue=stored(case, rows)))
    net = build(meta, axis_names=('member',), mesh_axes=AXES)
    layout = Layout(mesh, state, sharding, method.specs(own))
    update = jax.jit(partial(step.update, net, tx, config, layout))
    state = layout.spread(put(mesh, jax.device_get(state)))

    for t in range(meta['steps']):
        if own.queue is not None and t == meta['start_iter']:
            state = state.replace(method=state.method._replace(queue=opened(state.method.queue)))
        inputs = [GOLDEN[f'{case}/inputs'][t].astype(np.float64)]
        state, metrics = update(state, inputs, np.ones(rows, np.float32))
        assert_equal(metrics['loss'], GOLDEN[f'{case}/losses'][t])
        whole = layout.gather(state)
        if t + 1 < meta['steps']:
            jax.tree.map(assert_equal, whole.params, ours(tensors(case, 'params', t + 1))['params'])
        if own.queue is not None:
            assert_equal(shown(whole.method.queue, 1)[0], GOLDEN[f'{case}/queue_after'][t])
    for encoder, name in (('network', 'params_end'), ('momentum', 'momentum_end')):
        jax.tree.map(assert_equal, whole.variables(encoder), ours(tensors(case, name)))


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """The folder of a run whose encoders differ in every number."""
    workdir = tmp_path_factory.mktemp('run')
    config = load_config(TINY)
    config.method = 'swav_momentum'
    net = models.build(config.model, channels=1)
    network = random_variables(net, 16, 1)
    encoder = jax.tree.map(lambda x: x + 1, network)
    state = network | {'method': encoder | {'queue': {'filled': np.int32(0)}}}
    with closing(Checkpoints(workdir / 'checkpoints')) as checkpoints:
        checkpoints.save(3, jax.device_put(state), {'config': settings.to_dict(config)})
    return workdir


@pytest.mark.parametrize(('encoder', 'more'), [('network', 0.0), ('momentum', 1.0)])
def test_either_encoder_is_evaluated_and_exported(workdir, tmp_path, encoder, more):
    network = load(workdir)
    model = load(workdir, changes=[('config.evaluate.encoder', encoder)])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b + more, rtol=1e-6),
        model.variables,
        network.variables,
    )
    argv = ['export', f'--workdir={workdir}', f'--out={tmp_path / "x.pth"}', '--layout=vissl']
    assert commands.main([*argv, f'--encoder={encoder}']) == 0
    written = load_weights(tmp_path / 'x.pth', model.config)
    jax.tree.map(np.testing.assert_array_equal, written.variables, model.variables)


def test_what_the_method_does_not_use_is_refused(workdir, tmp_path, capsys):
    for changes, message in (
        ({'loss.momentum': 0.9}, 'config.loss.momentum=0.9 is a setting of config.method=swav_mom'),
        ({'evaluate.encoder': 'momentum'}, 'config.evaluate.encoder=momentum is a setting of'),
    ):
        config = settings.default()
        config.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=message):
            settings.validate(config)
        config.method = 'swav_momentum'
        settings.validate(config)
    plain = tmp_path / 'plain'
    write_run(plain)
    argv = ['export', f'--workdir={plain}', f'--out={tmp_path / "x.pth"}', '--encoder=momentum']
    assert commands.main(argv) == 2
    assert 'this run has no momentum encoder' in capsys.readouterr().err
