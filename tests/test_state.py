"""Replicated and sliced states train alike; a slice is as small as it should be."""

import jax
import numpy as np
import pytest
from small_training import make_update, random_crops, small_config, start


def train(sharding, devices, steps=3, **changes):
    c = small_config(sharding=sharding, **{'optimizer.use_larc': True, **changes})
    dtype = np.dtype(c.precision)
    layout, net, tx, state = start(c, devices, queue_batches=1, dtype=dtype)
    update = make_update(c, layout, net, tx)
    losses = []
    for t in range(steps):
        state, metrics = update(state, random_crops(c, t, dtype=dtype), np.ones(16, np.float32))
        losses.append({name: float(x) for name, x in metrics.items()})
    return layout, state, losses


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_slices_train_like_the_whole(name):
    """In float64: LARC lifts the rounding of biases before BatchNorm, whose gradient is 0.

    So would Adam but for its eps; without biases there is no such parameter.
    """
    changes = {
        'precision': 'float64',
        'optimizer.name': name,
        'model.head.use_bias': name == 'sgd',
        'model.temp_frozen_params_iter_map': (('head/prototypes0', 1),),
    }
    with jax.enable_x64(True):
        _, whole, expected = train('replicated', 4, **changes)
        sliced, state, found = train('zero', 4, **changes)
        for a, b in zip(found, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-9)
        gathered = sliced.gather(state)
        assert jax.tree.structure(gathered) == jax.tree.structure(whole)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), gathered, whole
        )
        # There and back, over widths that the devices do not divide: nothing is lost or moved.
        again = sliced.gather(sliced.spread(gathered))
        jax.tree.map(np.testing.assert_array_equal, again, gathered)


def test_a_sliced_float16_run_skips_an_overflow_as_a_whole_one_does():
    for sharding in ('replicated', 'zero'):
        c = small_config(sharding=sharding, precision='float16')
        layout, net, tx, state = start(c, 4)
        crops = random_crops(c, 0)
        crops[0][0, 0] = np.inf  # one image, on the first device
        after, metrics = make_update(c, layout, net, tx)(state, crops, np.ones(16, np.float32))
        assert int(metrics['overflows']) == 1
        jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


@pytest.mark.slow
def test_memory_per_device_falls_as_the_mesh_grows():
    held = []
    for devices in (1, 2, 4, 8):
        c = small_config(sharding='zero', **{'model.trunk.width_multiplier': 0.125})
        _, _, _, state = start(c, devices)
        shards = [
            x.addressable_shards[0].data.nbytes
            for x in jax.tree.leaves((state.params, state.opt_state))
        ]
        held.append(sum(shards))
    np.testing.assert_allclose(np.array(held) / held[0], [1, 1 / 2, 1 / 4, 1 / 8], rtol=0.03)


def test_whole_says_how_a_gathered_state_lies():
    for sharding in ('replicated', 'zero'):
        layout, _, _, state = start(small_config(sharding=sharding), 4, queue_batches=1)
        gathered, said = layout.gather(state), layout.whole()
        jax.tree.map(
            lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)),
            gathered,
            said,
        )
        for a, b in zip(jax.tree.leaves(gathered), jax.tree.leaves(said), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
