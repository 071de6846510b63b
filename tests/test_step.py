"""The training step against a PyTorch run, on one device and on four, and its rules."""

import json
import zlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_weights import state_dict
from jax.sharding import PartitionSpec as P
from small_training import make_update, random_crops, small_config, start

from swav_jax import torch_weights
from swav_jax.methods import swav
from swav_jax.methods.health import health
from swav_jax.models.resnet import ResNet
from swav_jax.parallel.mesh import AXES, make_mesh, put
from swav_jax.precision import LossScale

FOLDER = Path(__file__).parent / 'golden'
TRAJECTORY = np.load(FOLDER / 'trajectory.npz')
META = json.loads(str(TRAJECTORY['meta']))


# Against PyTorch.


def trajectory_config(meta):
    c = small_config()
    groups = list(zip(*meta['crops'], strict=True))
    c.data.size_crops, c.data.num_crops = groups
    c.model.trunk.depth = int(meta['arch'].removeprefix('resnet'))
    c.model.trunk.width_multiplier, c.model.trunk.stem = 1.0, 'imagenet'
    c.model.head.dims, c.model.head.num_clusters = tuple(meta['dims']), tuple(meta['K'])
    c.model.head.use_bn = meta['use_bn']
    c.model.temp_frozen_params_iter_map = (('head/prototypes0', meta['freeze']),)
    c.loss.update(dict(epsilon=meta['eps'], temperature=meta['T'], num_iters=meta['it']))
    c.optimizer.update(dict(use_larc=True, weight_decay=meta['wd'], momentum=meta['mom']))
    c.optimizer.larc_config.trust_coefficient = meta['tc']
    return c


def variables_of(state):
    return jax.device_get({'params': state.params, 'batch_stats': state.batch_stats})


def golden_name(name):
    return name.removeprefix('module.').replace('prototypes.', 'prototypes0.')


def digests(state):
    """[sum, L2 norm, first, last] of every tensor in PyTorch's layout, by the golden names."""
    tensors = torch_weights.to_torch(variables_of(state), 'swav', ResNet)
    for name, value in tensors.items():
        name = golden_name(name)
        part = 'head' if name.startswith(('projection_head', 'prototypes')) else 'trunk'
        if not name.endswith('num_batches_tracked'):
            x = np.asarray(value, np.float64)
            yield f'{part}.{name}', np.array([x.sum(), np.linalg.norm(x), x.flat[0], x.flat[-1]])


def trajectory(name, devices, dtype, folder):
    """Losses of the golden run here, and the digests of its last state."""
    meta = META[name]
    c, rates = trajectory_config(meta), jnp.array(meta['lr'], dtype)
    layout, net, tx, state = start(c, devices, rate=lambda count: rates[count], dtype=dtype)
    variables = variables_of(state)
    names = torch_weights.to_torch(variables, 'swav', ResNet)
    golden = state_dict({golden_name(n): tensor.shape for n, tensor in names.items()})
    torch_weights.write(folder / 'golden.pth', golden)
    variables = torch_weights.load_into(variables, folder / 'golden.pth', ResNet)
    variables['params'] = swav.normalize_prototypes(variables['params'])
    state = state.replace(**put(layout.mesh, variables))
    update, losses = make_update(c, layout, net, tx), []
    for t in range(meta['steps']):
        rng = np.random.default_rng([0, zlib.crc32(meta['arch'].encode()), t])
        crops = [
            rng.standard_normal((n, meta['B'], s, s, 3)).astype(dtype) for s, n in meta['crops']
        ]
        state, metrics = update(state, crops, np.ones(meta['B'], np.float32))
        losses.append(float(metrics['loss']))
    return losses, dict(digests(state))


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 4])
@pytest.mark.parametrize('name', META)
def test_training_equals_pytorchs_to_rounding_in_float64(name, devices, tmp_path):
    with jax.enable_x64(True):
        losses, final = trajectory(name, devices, np.dtype('float64'), tmp_path)
    np.testing.assert_allclose(losses, TRAJECTORY[f'{name}/losses'], rtol=1e-9)
    for entry, found in final.items():
        expected = TRAJECTORY[f'{name}/final/{entry}']
        np.testing.assert_allclose(found, expected, atol=1e-8 * expected[1], err_msg=entry)


@pytest.mark.slow
def test_training_in_float32_departs_no_further_than_pytorchs_own(tmp_path):
    """Rounding grows tenfold a step here: PyTorch's float32 is off by the last two of these."""
    losses, _ = trajectory('resnet18', 1, np.dtype('float32'), tmp_path)
    off = np.abs(np.array(losses) / TRAJECTORY['resnet18/losses'] - 1)
    assert (off[:3] < 1e-4).all()
    pytorchs = np.array([1.5e-4, 5.1e-4])
    assert (off[3:] < 3 * pytorchs).all()


# Rules of the step.


@pytest.mark.parametrize('changes', [{}, {'loss.queue.queue_length': 32}])
def test_devices_share_one_training(changes):
    """A plain port of pmap doubles the gradient on two devices, and nothing else shows it.

    Images of weight 0 are spread unevenly, so a mean that each device takes of its own images
    differs, too.
    """
    c = small_config(**changes)
    weights = np.ones((4, 16), np.float32)
    weights[1, [0, 1, 2, 9]] = weights[2, 8:10] = weights[3, 15] = 0
    losses, norms = [], []
    for devices in (1, 2, 8):
        layout, net, tx, state = start(c, devices, queue_batches=2 if changes else 0)
        update = make_update(c, layout, net, tx)
        path = []
        for t in range(4):
            state, metrics = update(state, random_crops(c, t), weights[t])
            path.append(metrics['loss'])
        losses.append(path)
        norms.append(optax.tree.norm(state.params))
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-4)
    np.testing.assert_allclose(norms[1:], norms[0], rtol=1e-5)


@pytest.mark.parametrize('copies', [np.arange(8, 16), np.arange(0, 16, 2)], ids=['last', 'mixed'])
def test_images_of_weight_0_count_for_nothing(copies):
    """A step of eight images and their copies, of weight 0, is the step of the eight images.

    Copies leave BatchNorm's mean and variance as they are.
    """
    c = small_config()
    images = random_crops(c, 0, batch=8)
    layout, net, tx, state = start(c, 1)
    expected, metrics = make_update(c, layout, net, tx)(state, images, np.ones(8, np.float32))
    losses = [metrics['loss']]
    weights = np.ones(16, np.float32)
    weights[copies] = 0
    place = np.empty(16, int)
    place[weights > 0] = place[copies] = np.arange(8)
    for devices in (1, 4):
        layout, net, tx, state = start(c, devices)
        found, metrics = make_update(c, layout, net, tx)(
            state, [x[:, place] for x in images], weights
        )
        losses.append(metrics['loss'])
        assert metrics['bad_images'] == 8
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
            jax.device_get(found.params),
            jax.device_get(expected.params),
        )
    np.testing.assert_allclose(losses[1:], losses[0], rtol=1e-5)


def test_queue_fills_from_start_iter_and_keeps_embeddings():
    c = small_config(**{'loss.queue.start_iter': 1})
    layout, net, tx, state = start(c, 2, queue_batches=2)
    update = make_update(c, layout, net, tx)
    filled = []
    for t in range(4):
        state, _ = update(state, random_crops(c, t), np.ones(16, np.float32))
        filled.append(int(state.method.queue.filled))
    assert filled == [0, 1, 2, 2]
    np.testing.assert_allclose(np.linalg.norm(state.method.queue.embeddings, axis=-1), 1, rtol=1e-5)


def test_neighbouring_groups_of_equal_size_are_one_trunk_pass():
    """BatchNorm's running statistics move once per resolution, as in VISSL."""
    apart = small_config(**{'data.num_crops': (1, 1), 'data.size_crops': (16, 16)})
    together = small_config(**{'data.num_crops': (2,), 'data.size_crops': (16,)})
    crops = random_crops(together, 0)
    results = []
    for c, groups in ((apart, [crops[0][:1], crops[0][1:]]), (together, crops)):
        layout, net, tx, state = start(c, 1)
        state, metrics = make_update(c, layout, net, tx)(state, groups, np.ones(16, np.float32))
        results.append((metrics['loss'], state.batch_stats['trunk']['bn1']['mean']))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), *results)


def test_an_overflow_skips_the_update_on_all_devices():
    c = small_config(precision='float16')
    layout, net, tx, state = start(c, 2, queue_batches=1)
    update = make_update(c, layout, net, tx)
    crops = random_crops(c, 0)
    crops[0][0, 0] = np.inf  # one image, on the first device
    after, metrics = update(state, crops, np.ones(16, np.float32))
    assert int(metrics['overflows']) == 1
    assert float(after.loss_scale.scale) == 2.0**15
    assert int(after.step) == 1
    for part in ('params', 'batch_stats', 'opt_state', 'method'):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(state, part))


def test_loss_scale_doubles_after_2000_good_steps_and_stays_in_bounds():
    scale = LossScale.initial('float16')
    for _ in range(1999):
        scale = scale._replace(good_steps=scale.good_steps + 1)
    assert float(scale.adjust(jnp.array(True)).scale) == 2.0**17
    low = scale._replace(scale=jnp.float32(1.0)).adjust(jnp.array(False))
    assert float(low.scale) == 1.0 and int(low.good_steps) == 0


def test_metrics_of_a_collapse():
    """Equal embeddings, all nearest to one prototype: what the health metrics are there to show."""
    mesh = make_mesh({'enabled': True, 'group_size': 0}, jax.devices()[:2])
    embeddings = jnp.ones((2, 8, 4)) / 2
    scores = jnp.tile(jnp.array([0.1, 0.9, 0.2]), (2, 8, 1))
    codes = jnp.full((2, 8, 3), 1 / 3)

    def replica(embeddings, scores, codes):
        loss = jax.lax.pcast(jnp.float32(2.0), AXES, to='varying')
        weights = jax.lax.pcast(jnp.ones(4), AXES, to='varying')
        return health(loss, embeddings, scores, codes, weights)

    of_all = jax.shard_map(replica, mesh=mesh, in_specs=P(None, AXES), out_specs=P())
    found = jax.jit(of_all)(embeddings, scores, codes)
    expected = dict(
        loss=2.0,
        code_entropy=np.log(3),
        active_prototypes=1,
        largest_prototype_share=1.0,
        embedding_std=0.0,
        bad_images=0,
    )
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('precision', ['float32', 'float16'])
def test_a_step_that_is_not_finite_changes_nothing_from_then_on(precision):
    c = small_config(**{'model.trunk.width_multiplier': 0.0625, 'precision': precision})
    layout, net, tx, state = start(c, 4, queue_batches=1)
    update = make_update(c, layout, net, tx)
    ones = np.ones(16, np.float32)
    state, metrics = update(state, random_crops(c, 0), ones)
    assert metrics['finite'] and int(state.step) == 1
    before = jax.device_get(state)
    crops = random_crops(c, 1)
    crops[0][0, 3] = np.nan
    state, metrics = update(state, crops, ones)
    assert not metrics['finite'] and state.failed
    state, metrics = update(state, random_crops(c, 2), ones)
    assert not metrics['finite'], 'also where the next one would be sound'
    expected, found = before.replace(failed=np.array(True)), jax.device_get(state)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(x, y)
