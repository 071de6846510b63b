"""DeepCluster-v2 against VISSL's and the official one, over whole trainings; its memory bank."""

import contextlib
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from processes import TINY
from small_training import first_state, make_update, random_crops, small_config, start

from swav_jax import config as settings
from swav_jax import methods, step, training
from swav_jax.config.file import load_config
from swav_jax.errors import StoppedError, UserError
from swav_jax.methods import deepcluster_v2
from swav_jax.methods.deepcluster_v2 import IGNORED, NOWHERE, DeepClusterState
from swav_jax.methods.method import Batch, Network, Outputs
from swav_jax.models import SwAVNet
from swav_jax.models.head import SwAVHead, normalize
from swav_jax.models.norm import BatchNorm
from swav_jax.parallel.layout import Layout
from swav_jax.parallel.mesh import AXES, make_mesh, put
from swav_jax.parallel.replicas import device_rows
from swav_jax.runs.checkpoint import Checkpoints
from swav_jax.runs.signals import STOP, Signals
from swav_jax.training import fill

GOLDEN = np.load(Path(__file__).parent / 'golden' / 'deepcluster_v2.npz')
META = json.loads(str(GOLDEN['meta']))

assert_equal = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


def cases(kind):
    return [name for name, meta in META.items() if meta['kind'] == kind]


TOLERANCES = {'float64': 1e-9, 'float32': 1e-5}


@pytest.fixture
def computing():
    """Compute in a precision from now on; returns the comparison for it."""
    with contextlib.ExitStack() as stack:

        def begin(precision):
            stack.enter_context(jax.enable_x64(precision == 'float64'))
            bound = TOLERANCES[precision]
            return partial(np.testing.assert_allclose, rtol=bound, atol=bound)

        yield begin


@pytest.fixture
def float64(computing):
    computing('float64')


def make_config(**changes):
    c = settings.default()
    c.method, c.precision = 'deepcluster_v2', 'float64'
    c.data.num_crops, c.data.size_crops, c.data.crop_scales = (2,), (8,), ((0.2, 1.0),)
    c.update_from_flattened_dict(changes)
    return c


def from_meta(meta, **changes):
    names = {'num_clusters': 'model.head.num_clusters', 'crops_for_mb': 'loss.crops_for_mb'}
    names |= {'kmeans_iters': 'loss.kmeans_iters', 'temperature': 'loss.temperature'}
    given = {ours: meta[name] for name, ours in names.items() if name in meta}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return make_config(**given, **{'data.num_crops': (meta.get('num_crops', 2),)}, **changes)


def mesh_of(devices):
    return make_mesh({'enabled': True, 'group_size': 0}, jax.devices()[:devices])


def bank(x, steps):
    """Golden banks (W, M, T·B, D) as ours, (M, T, W·B, D)."""
    world, banks, rows, dim = x.shape
    x = x.reshape(world, banks, steps, rows // steps, dim).transpose(1, 2, 0, 3, 4)
    return x.reshape(banks, steps, -1, dim)


def bank_index(x, steps):
    """Golden numbers (W, T·B) as ours, (T, W·B)."""
    return x.reshape(len(x), steps, -1).transpose(1, 0, 2).reshape(steps, -1)


def begin_with(monkeypatch, starts):
    """Let the clusterings that are traced next begin with these centroids, head after head."""
    starts = iter([jnp.asarray(x) for x in starts])
    monkeypatch.setattr(deepcluster_v2, 'first_centroids', lambda *_: next(starts))


@pytest.mark.parametrize('precision', TOLERANCES)
@pytest.mark.parametrize('case', cases('cluster'))
def test_clusters_equal_vissls(case, precision, computing, monkeypatch):
    meta, steps, assert_equal = META[case], 4, computing(precision)
    method, mesh = methods.make(from_meta(meta)), mesh_of(meta['world'])
    heads = range(len(meta['num_clusters']))
    given = GOLDEN[f'{case}/bank'].astype(precision)
    of_first = [given[0, h % given.shape[1]] for h in heads]
    starts = [of_first[h][GOLDEN[f'{case}/random_idx{h}']] for h in heads]
    begin_with(monkeypatch, starts)
    state = DeepClusterState(
        bank(given, steps),
        bank_index(GOLDEN[f'{case}/index'], steps).astype(np.int32),
        np.full((len(heads), meta['size_dataset']), 7, np.int32),
        tuple(np.zeros_like(x) for x in starts),
    )
    before = jax.jit(lambda number, state: method.before_step(number, {}, state, mesh))
    found = before(jnp.int32(2 * steps), state)
    for h in heads:
        assert_equal(found.centroids[h], GOLDEN[f'{case}/centroids{h}'])
    np.testing.assert_array_equal(found.assignments, GOLDEN[f'{case}/assignments'])
    within = before(jnp.int32(2 * steps + 1), state)
    jax.tree.map(np.testing.assert_array_equal, within, state)


@pytest.mark.parametrize('precision', TOLERANCES)
@pytest.mark.parametrize('case', cases('loss'))
def test_loss_and_gradients_equal_vissls(case, precision, computing):
    meta, assert_equal = META[case], computing(precision)
    method, world, rows = methods.make(from_meta(meta)), meta['world'], meta['batch']
    centroids = [
        GOLDEN[f'{case}/prototypes{h}'].astype(precision) for h in range(len(meta['num_clusters']))
    ]
    state = DeepClusterState(
        jnp.zeros((2, 1, world * rows, meta['dim'])),
        jnp.full((1, world * rows), NOWHERE, jnp.int32),
        jnp.asarray(GOLDEN[f'{case}/assignments'], jnp.int32),
        tuple(map(jnp.asarray, centroids)),
    )

    def replica(given, index, state):
        batch = Batch(jnp.int32(0), jnp.ones(rows), index[0], {})

        def loss_of(embeddings):
            return method.loss(None, {}, Outputs(embeddings, ()), batch, state).loss

        embeddings = normalize(given[0])
        of_projections = jax.grad(lambda x: loss_of(normalize(x)))(given[0])
        loss, of_embeddings = jax.value_and_grad(loss_of)(embeddings)
        return tuple(x[None] for x in (loss, embeddings, of_embeddings, of_projections))

    found = jax.jit(
        jax.shard_map(
            replica,
            mesh=mesh_of(world),
            in_specs=(P(AXES), P(AXES), method.specs(state)),
            out_specs=P(AXES),
        )
    )(
        GOLDEN[f'{case}/projections'].astype(precision),
        GOLDEN[f'{case}/index'].astype(np.int32),
        state,
    )
    names = ('loss', 'embeddings', 'grad_embeddings', 'grad_projections')
    for name, value in zip(names, found, strict=True):
        assert_equal(value, GOLDEN[f'{case}/{name}'], err_msg=name)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('case', cases('memory'))
def test_the_bank_is_filled_and_renewed_like_vissls(case):
    meta = META[case]
    world, rows, steps = meta['world'], meta['batch'], meta['steps']
    method = methods.make(from_meta(meta, **{'model.head.num_clusters': (2,)}))
    params = {'head': {'prototypes0': {'kernel': jnp.zeros((meta['dim'], 2))}}}
    sizes = SimpleNamespace(batch_size=world * rows, steps_per_epoch=steps, num_images=100)
    state = method.init(params, {}, sizes)[1]

    def replica(fills, number, given, index, state):
        embeddings = normalize(given[0])

        def forward(params, batch_stats, crops):
            return Outputs(embeddings[jnp.asarray(crops)], ()), batch_stats

        batch = Batch(number, jnp.ones(rows), index[0], {})
        if fills:
            return method.fill(Network(forward, None), {}, batch, state)[1]
        return method.loss(None, {}, Outputs(embeddings, ()), batch, state).state

    specs = method.specs(state)

    def run(kind, number, t=None):
        given, index = GOLDEN[f'{case}/{kind}_projections'], GOLDEN[f'{case}/{kind}_index']
        given, index = (x if t is None else x[t] for x in (given, index))
        mapped = jax.shard_map(
            partial(replica, kind == 'fill'),
            mesh=mesh_of(world),
            in_specs=(P(), P(AXES), P(AXES), specs),
            out_specs=specs,
        )
        return jax.jit(mapped)(
            jnp.int32(number), given.astype(np.float64), index.astype(np.int32), state
        )

    def compare(kind, t=None):
        for name, ours, shown in (
            ('bank', state.embeddings, bank),
            ('bank_index', state.index, bank_index),
        ):
            expected = GOLDEN[f'{case}/{name}_{kind}']
            assert_equal(ours, shown(expected if t is None else expected[t], steps))

    for t in range(steps):
        state = run('fill', t, t)
    compare('filled')
    for t in range(steps):
        state = run('epoch', steps + t, t)
        compare('after', t)
    state = run('next', 2 * steps)
    compare('next')


class Layers(nn.Module):
    """The golden trunk: linear, ReLU, linear, ReLU."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x, train):
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, dtype=jnp.float64, param_dtype=jnp.float64, name=f'linear{i}')(x)
            x = nn.relu(x)
        return x


NAMES = {
    'trunk.0': ('trunk', 'linear0'),
    'trunk.2': ('trunk', 'linear1'),
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


def ours(case, name):
    """Our variables from PyTorch's tensors by name."""
    found, prefix = {'params': {}, 'batch_stats': {}}, f'{case}/{name}/'
    for key in GOLDEN:
        if key.startswith(prefix):
            module, _, kind = key.removeprefix(prefix).rpartition('.')
            collection, leaf = KINDS[kind]
            value = GOLDEN[key]
            if leaf == 'kernel' and value.ndim == 1:
                leaf = 'scale'
            part, layer = NAMES[module]
            where = found[collection].setdefault(part, {}).setdefault(layer, {})
            where[leaf] = value.T if value.ndim == 2 else value
    return found


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(
    ('case', 'devices', 'micro_batches', 'sharding'),
    [
        pytest.param('trajectory', 1, 1, 'replicated', marks=pytest.mark.slow),
        ('trajectory_bn', 1, 1, 'replicated'),
        pytest.param('trajectory_world2', 2, 1, 'zero', marks=pytest.mark.slow),
        ('trajectory_world2', 1, 2, 'replicated'),
    ],
)
def test_training_equals_vissls(case, devices, micro_batches, sharding, monkeypatch):
    meta = META[case]
    rows, world, steps = meta['batch'], meta['world'], meta['steps']
    config = from_meta(
        meta, **{'train.micro_batches': micro_batches, 'data.batchsize_per_replica': rows}
    )
    norm = partial(BatchNorm, dtype=jnp.float64, axis_names=('member',), mesh_axes=AXES)
    head = SwAVHead(
        dims=(meta['bn'], meta['dim']) if meta['bn'] else (meta['dim'],),
        num_clusters=tuple(meta['num_clusters']),
        use_bn=True,
        use_bias=True,
        skip_last_bn=True,
        normalize_feats=True,
        activation_name='relu',
        weight_norm_prototypes=False,
        norm=norm,
        dtype=jnp.float64,
    )
    net = SwAVNet(Layers(tuple(meta['widths'][1:])), head)
    heads = range(len(meta['num_clusters']))
    variables = ours(case, 'params0')
    for h in heads:
        shape = (meta['dim'], meta['num_clusters'][h])
        variables['params']['head'][f'prototypes{h}'] = {'kernel': jnp.zeros(shape)}
    method, mesh = methods.make(config), mesh_of(devices)
    sizes = SimpleNamespace(
        batch_size=world * rows, steps_per_epoch=steps, num_images=meta['size_dataset']
    )
    params, own = method.init(variables['params'], variables['batch_stats'], sizes)
    tx = optax.sgd(meta['lr'], meta['momentum'])
    state = first_state(tx, params, variables['batch_stats'], own)
    layout = Layout(mesh, state, sharding, method.specs(own), micro_batches)
    state = layout.spread(put(mesh, jax.device_get(state)))
    order = device_rows(world * rows, devices, micro_batches)

    def batch_of(inputs, index):
        """Golden (W, V, B, width) and (W, B) as crops and numbers in the devices' order."""
        crops = np.moveaxis(inputs, 0, 1).reshape(inputs.shape[1], -1, inputs.shape[-1])
        weights = np.ones(world * rows, np.float32)
        numbers = index.reshape(-1).astype(np.int32)
        return [crops[:, order].astype(np.float64)], weights, numbers[order]

    see = step.make_fill(net, config, layout)
    for t in range(steps):
        given = (GOLDEN[f'{case}/{name}'][t] for name in ('fill_inputs', 'fill_index'))
        state = see(state, np.int32(t), *batch_of(*given))
    whole = layout.gather(state)
    assert_equal(whole.method.embeddings, bank(GOLDEN[f'{case}/bank_filled'], steps))
    jax.tree.map(assert_equal, dict(whole.batch_stats), ours(case, 'params_filled')['batch_stats'])
    for epoch in range(meta['epochs']):
        banks = whole.method.embeddings.reshape(
            len(config.loss.crops_for_mb), steps, world, rows, -1
        )
        of_first = banks[:, :, 0].reshape(len(banks), steps * rows, -1)
        begin_with(
            monkeypatch,
            [of_first[h % len(banks)][GOLDEN[f'{case}/random_idx{h}'][epoch]] for h in heads],
        )
        update = jax.jit(partial(step.update, net, tx, config, layout))
        for t in range(steps):
            given = (GOLDEN[f'{case}/{name}'][epoch, t] for name in ('inputs', 'index'))
            state, metrics = update(state, *batch_of(*given))
            assert_equal(metrics['loss'], GOLDEN[f'{case}/losses'][epoch, t].mean())
        whole = layout.gather(state)
        np.testing.assert_array_equal(
            whole.method.assignments, GOLDEN[f'{case}/assignments'][epoch]
        )
        for h in heads:
            centroids = GOLDEN[f'{case}/centroids{h}'][epoch]
            assert_equal(whole.method.centroids[h], centroids)
            assert_equal(whole.params['head'][f'prototypes{h}']['kernel'], centroids.T)
    assert_equal(whole.method.embeddings, bank(GOLDEN[f'{case}/bank_end'], steps))
    assert_equal(whole.method.index, bank_index(GOLDEN[f'{case}/bank_index_end'], steps))
    expected = ours(case, 'params_end')
    learned = {name: dict(part) for name, part in whole.params.items()}
    for h in heads:
        del learned['head'][f'prototypes{h}']
    jax.tree.map(assert_equal, learned, expected['params'])
    jax.tree.map(assert_equal, dict(whole.batch_stats), expected['batch_stats'])


def test_what_cannot_be_read_is_neither_kept_nor_predicted():
    c = make_config(**{'model.head.num_clusters': (3,), 'loss.crops_for_mb': (0,)})
    method = methods.make(c)
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((2, 4, 5)).astype(np.float32)
    state = DeepClusterState(
        jnp.ones((1, 2, 4, 5)),
        jnp.arange(8, dtype=jnp.int32).reshape(2, 4),
        jnp.zeros((1, 8), jnp.int32),
        (jnp.eye(3, 5),),
    )

    def loss(weights, embeddings):
        batch = Batch(jnp.int32(3), jnp.asarray(weights), jnp.arange(4, dtype=jnp.int32), {})
        return method.loss(None, {}, Outputs(jnp.asarray(embeddings), ()), batch, state)

    learned = loss([1.0, 1, 0, 1], embeddings)
    np.testing.assert_array_equal(learned.state.index[1], [0, 1, NOWHERE, 3])
    np.testing.assert_array_equal(learned.state.embeddings[0, 1, 2], 0)
    other = embeddings.copy()
    other[:, 2] = 9
    assert learned.loss == loss([1.0, 1, 0, 1], other).loss
    assert loss([0.0, 0, 0, 0], embeddings).loss == 0  # and not 0/0


def test_clustering_begins_with_different_images_of_the_bank():
    """The same on any number of devices, and never with a place that is empty."""
    rng = np.random.default_rng(0)
    index = rng.permutation(40)[:24].reshape(3, 8).astype(np.int32)
    index[:, 5] = NOWHERE
    rows = np.eye(40, dtype=np.float32)[index]  # so that a row tells which image it is

    def draw(seed, devices):
        found = jax.shard_map(
            partial(deepcluster_v2.first_centroids, num_images=40, num_clusters=20),
            mesh=mesh_of(devices),
            in_specs=(P(), P(None, AXES), P(None, AXES)),
            out_specs=P(),
        )
        return np.argmax(jax.jit(found)(jax.random.key(seed), rows, index), 1).tolist()

    drawn = draw(0, 1)
    assert len(set(drawn)) == 20
    assert set(drawn) <= set(index[index != NOWHERE].tolist())
    assert draw(0, 4) == drawn != draw(1, 1)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'loss.crops_for_mb': (0, 2)}, r'config.loss.crops_for_mb=\(0, 2\)'),
        ({'loss.crops_for_mb': (1, 1)}, r'config.loss.crops_for_mb=\(1, 1\)'),
        ({'model.head.num_clusters': (65,)}, 'at most the 64 of an epoch'),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    method = methods.make(make_config(**changes))
    with pytest.raises(UserError, match=message):
        method.check()
        method.check_run(SimpleNamespace(steps_per_epoch=4, batch_size=16))


def test_an_overflow_does_not_undo_the_clusters_of_an_epoch():
    """The first step of an epoch has found them; half precision often overflows just there."""
    c = small_config(precision='float16', **{'method': 'deepcluster_v2'})
    layout, net, tx, state = start(c, 1, dtype=jnp.float16)
    update, index = make_update(c, layout, net, tx), np.arange(16, dtype=np.int32)
    filled = state.method._replace(
        embeddings=jax.random.normal(jax.random.key(0), state.method.embeddings.shape),
        index=index[None],
    )
    huge = state.loss_scale._replace(scale=jnp.float32(2.0**100))
    state = state.replace(method=filled, loss_scale=huge)
    after, metrics = update(state, random_crops(c, 0), np.ones(16, np.float32), index)
    assert int(metrics['overflows']) == 1 and metrics['finite']
    np.testing.assert_array_equal(
        after.params['trunk']['conv1']['kernel'], state.params['trunk']['conv1']['kernel']
    )
    assert np.all(after.method.assignments >= 0)


@pytest.mark.slow
def test_a_stop_while_the_bank_fills_saves_the_beginning(tmp_path, monkeypatch):
    """A bank that is half full would be filled again on statistics that have moved."""
    config, signals = load_config(f'{TINY}:deepcluster_v2'), Signals()
    config.data.batchsize_per_replica = 1

    def stopping(*args):
        see, seen = step.make_fill(*args), []

        def see_some(*batch):
            seen.append(see(*batch))
            if len(seen) == 2:
                signals.request = STOP
            return seen[-1]

        return see_some

    monkeypatch.setattr(fill, 'make_fill', stopping)
    with pytest.raises(StoppedError):
        training.run(config, tmp_path, signals=signals)
    with contextlib.closing(Checkpoints(tmp_path / 'checkpoints')) as checkpoints:
        saved_at, state, _ = checkpoints.read(('method/index', 'batch_stats'))
    assert saved_at == 0
    assert np.all(state['method']['index'] == NOWHERE)
    assert all(
        np.all(x == x.flat[0]) for x in map(np.asarray, jax.tree.leaves(state['batch_stats']))
    )


@pytest.mark.parametrize('name', ['loss.epsilon', 'loss.queue.queue_length', 'loss.momentum'])
def test_settings_of_other_methods_are_refused(name):
    with pytest.raises(UserError, match=f'config.{name}=.* is a setting of config.method=swav'):
        settings.validate(make_config(**{name: 1 if 'queue' in name else 0.5}))


def test_images_without_a_cluster_count_for_nothing():
    """IGNORED is no index from the end: the last prototype gets nothing from it."""
    scores = jnp.array([[[0.0, 5.0], [0.0, 0.0]]])
    loss = deepcluster_v2.cross_entropy(scores, jnp.array([1, IGNORED]), 1)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-5.0)), rtol=1e-5)
