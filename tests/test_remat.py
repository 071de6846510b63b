"""Computing again what the backward pass needs: the same training from less memory."""

import jax
import numpy as np
import pytest
from small_training import make_update, random_crops, small_config, start

from swav_jax import config as settings
from swav_jax.commands import traced
from swav_jax.config import trunks

RESNET = dict(name='resnet', depth=18, width_multiplier=0.125, stem='small')
ONE_LAYER = {'model.trunk.width_multiplier': 0.0625}  # see small_training.build
REGNET = dict(name='regnet', depth=3, w_0=8, w_a=8.0, w_m=2.0, group_width=4, stem='small')


def after_a_step(trunk=RESNET, **changes):
    """Loss and state after a step in float64, in which only the sequence of sums differs."""
    c = small_config(precision='float64')
    with c.unlocked():
        c.model.trunk = trunks.section(**trunk)
        c.update_from_flattened_dict(changes)
    with jax.enable_x64(True):
        dtype = np.dtype('float64')
        layout, net, tx, state = start(c, 2, dtype=dtype)
        crops = random_crops(c, 0, dtype=dtype)
        state, metrics = make_update(c, layout, net, tx)(state, crops, np.ones(16, np.float32))
        return jax.device_get((metrics['loss'], state.params, state.batch_stats))


@pytest.mark.slow
@pytest.mark.parametrize('trunk', [RESNET, REGNET], ids=['resnet', 'regnet'])
def test_the_training_is_the_same(trunk):
    expected = after_a_step(trunk)
    for remat in ('block', 'stage'):
        found = after_a_step(trunk, **{'model.remat': remat})
        assert jax.tree.structure(found) == jax.tree.structure(expected)  # weights go on to fit
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected
        )


@pytest.mark.slow
def test_each_crop_has_statistics_of_its_own_in_a_pass_per_crop():
    """One crop a group makes passes of one crop either way, and then nothing may differ."""
    groups = {'data.num_crops': (1, 1, 1), 'data.size_crops': (16, 8, 16)}
    apart = after_a_step(**groups, **ONE_LAYER)
    single = after_a_step(**groups, **ONE_LAYER, **{'train.per_crop_pass': True})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), apart, single)
    together = after_a_step(**ONE_LAYER)
    alone = after_a_step(**ONE_LAYER, **{'train.per_crop_pass': True})
    moved = [stats['trunk']['bn1']['mean'] for _, _, stats in (together, alone)]
    assert not np.allclose(*moved, rtol=1e-3)


def kept(**changes):
    """MB of a ResNet-50 at 2×224 + 6×96 that one device's backward pass keeps."""
    c = settings.default()
    c.data.batchsize_per_replica = 2
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return traced.kept_bytes(c) / 1e6


@pytest.mark.slow
def test_remat_keeps_less():
    none, block, stage = (kept(**{'model.remat': name}) for name in ('none', 'block', 'stage'))
    assert block < none / 2
    assert stage < block
    assert kept(**{'train.per_crop_pass': True}) < block
    assert kept(precision='bfloat16') < 0.8 * none
