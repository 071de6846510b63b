"""Micro-batches train like as many devices, and keep what one of them keeps."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from small_training import make_update, random_crops, small_config, start
from test_collectives import collectives

from swav_jax.parallel.replicas import device_rows

BATCH, STEPS = 16, 4
HEADS = {'model.head.num_clusters': (6, 5)}


def train(devices, micro_batches, group_size, **changes):
    """Losses of a few steps, and the last state, as it is saved."""
    c = small_config(**changes)
    c.train.micro_batches, c.model.sync_bn.group_size = micro_batches, group_size
    dtype = np.dtype(jnp.promote_types(c.precision, 'float32'))
    layout, net, tx, state = start(c, devices, dtype=jnp.dtype(c.precision), queue_batches=2)
    update, rows = make_update(c, layout, net, tx), device_rows(BATCH, devices, micro_batches)
    losses = []
    for t in range(STEPS):
        weights = np.ones(BATCH, np.float32)
        weights[: 3 * (t % 2)] = 0  # a whole replica of 8 that cannot be read
        crops = [x[:, rows] for x in random_crops(c, t, BATCH, dtype)]
        state, metrics = update(state, crops, weights[rows])
        losses.append(float(metrics['loss']))
    return losses, jax.device_get(layout.gather(state))


@pytest.mark.parametrize(
    ('ours', 'theirs', 'changes'),
    [
        pytest.param((1, 4), (4, 1), {}, marks=pytest.mark.slow),
        ((2, 4), (8, 1), {'model.sync_bn.group_size': 2, **HEADS}),
        pytest.param((2, 2), (4, 1), {'sharding': 'zero', **HEADS}, marks=pytest.mark.slow),
        pytest.param((2, 2), (4, 1), {'train.per_crop_pass': True}, marks=pytest.mark.slow),
        pytest.param(
            (1, 4),
            (4, 1),
            {'method': 'swav_momentum', 'loss.momentum_eval_mode_iter_start': 2, **HEADS},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (1, 4),
            (4, 1),
            {
                'model.remat': 'block',
                'model.trunk.depth': 10,
                'model.trunk.width_multiplier': 0.125,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_micro_batches_train_like_devices(ours, theirs, changes):
    """In float64: sums of weights, statistics or gradients over other replicas would show."""
    changes = {'precision': 'float64', 'optimizer.use_larc': True, **changes}
    group_size = changes.pop('model.sync_bn.group_size', 1)
    with jax.enable_x64(True):
        losses, state = train(*ours, group_size, **changes)
        expected, their_state = train(*theirs, group_size, **changes)
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), state, their_state
    )


@pytest.mark.slow
def test_half_precision_departs_by_rounding_alone():
    exact, _ = train(4, 1, 1)
    off = {
        turns: np.abs(np.array(train(4 // turns, turns, 1, precision='bfloat16')[0]) - exact).max()
        for turns in (1, 4)
    }
    assert off[4] < 3 * off[1] < 0.5


def test_an_overflow_in_one_micro_batch_skips_the_step():
    c = small_config(precision='float16', **{'train.micro_batches': 4})
    layout, net, tx, state = start(c, 1)
    update, crops = make_update(c, layout, net, tx), random_crops(c, 0)
    moved, metrics = update(state, crops, np.ones(16, np.float32))
    assert int(metrics['overflows']) == 0
    assert any(np.any(a != b) for a, b in both(moved.params, state.params))
    crops[0][0, 5] = np.inf  # of the second of four
    after, metrics = update(state, crops, np.ones(16, np.float32))
    assert int(metrics['overflows']) == 1
    assert all(np.all(a == b) for a, b in both(after.params, state.params))
    assert all(np.all(a == b) for a, b in both(after.batch_stats, state.batch_stats))


def both(one, other):
    """The arrays of two trees of the same form in pairs."""
    return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)


def loops(jaxpr):
    """Every scan in a program, those inside of others too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'scan':
            yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(part, ClosedJaxpr):
                    yield from loops(part.jaxpr)
                elif isinstance(part, Jaxpr):
                    yield from loops(part)


def test_only_outputs_of_the_whole_batch_are_kept():
    """What the loops over micro-batches read and write for each: images, outputs, statistics.

    Without recomputation the first would write every activation, for the second to read.
    """
    c = small_config(**{'train.micro_batches': 4})
    layout, net, tx, state = start(c, 1)
    crops, weights = random_crops(c, 0), np.ones(BATCH, np.float32)
    traced = jax.make_jaxpr(make_update(c, layout, net, tx))(state, crops, weights)
    over = [e for e in loops(traced.jaxpr) if e.params['length'] == 4]
    assert len(over) == 2, 'forward, and backward'
    images = sum(x.nbytes for x in crops)
    outputs = 4 * BATCH * sum(c.data.num_crops) * (c.model.head.dims[-1] + 6)
    statistics = 4 * 4 * sum(x.size for x in jax.tree.leaves(state.batch_stats))
    for loop, allowed in zip(over, (outputs + statistics, 0), strict=True):
        written = loop.outvars[loop.params['num_carry'] :]
        assert sum(x.aval.size * x.aval.dtype.itemsize for x in written) <= allowed
        read = loop.invars[loop.params['num_consts'] + loop.params['num_carry'] :]
        size = sum(x.aval.size * x.aval.dtype.itemsize for x in read)
        assert images <= size <= images + outputs + statistics


@pytest.mark.slow
def test_gradients_and_codes_are_sent_once_a_step():
    """Whatever the number of micro-batches; only BatchNorm's sums are sent for each."""
    found = {}
    for turns in (1, 2):
        c = small_config(**{'train.micro_batches': turns, 'optimizer.use_larc': True, **HEADS})
        layout, net, tx, state = start(c, 8, queue_batches=1)
        args = state, random_crops(c, 0), np.ones(BATCH, np.float32)
        program = make_update(c, layout, net, tx).lower(*args).compile().as_text()
        sent = Counter()
        for _, what, _, size in collectives(program):
            sent[what, 'count'] += 1
            sent[what, 'bytes'] += size
        found[turns] = sent
    for what in ('average_gradients', 'sinkhorn_codes', 'health'):
        # XLA may join the mean weight to another sum.
        assert found[2][what, 'bytes'] == pytest.approx(found[1][what, 'bytes'], abs=8), what
    assert found[2]['sinkhorn_codes', 'count'] <= c.loss.num_iters + 1
