"""One seed is one training, whatever computes it: images, crops and losses.

Replicas are devices, or the micro-batches of fewer devices.
"""

import itertools

import jax
import numpy as np
import pytest

from swav_jax import config as settings
from swav_jax.config import trunks
from swav_jax.data import pipeline, sources
from swav_jax.parallel.mesh import make_mesh, put_batch
from swav_jax.parallel.replicas import device_rows
from swav_jax.state import make_schedule, make_state
from swav_jax.step import crops_of, make_train_step

STEPS = 10
BATCH = 16


def small_run(precision):
    """A small ResNet on the embedded images, with a queue that is used from step 4 on."""
    c = settings.default()
    c.precision = precision
    c.data.source, c.data.channels, c.data.canvas_size = 'demo', 1, 28
    c.data.mean, c.data.std = (0.286,), (0.353,)
    c.data.num_crops, c.data.size_crops = (2, 1), (16, 8)
    c.model.trunk.depth, c.model.trunk.width_multiplier, c.model.trunk.stem = 18, 0.0625, 'small'
    c.model.head.dims, c.model.head.num_clusters = (0, 16, 8), (12,)
    c.model.temp_frozen_params_iter_map = (('head/prototypes0', 2),)
    c.loss.queue.queue_length = 2 * BATCH
    c.loss.queue.start_iter = 2
    return c


def train(precision, devices, micro_batches=1, group_size=0):
    """Indices and crops of the first batch, the losses, and the last state, as it is saved."""
    c = small_run(precision)
    c.data.batchsize_per_replica = BATCH // devices // micro_batches
    c.train.micro_batches, c.model.sync_bn.group_size = micro_batches, group_size
    mesh = make_mesh(c.model.sync_bn, jax.devices()[:devices])
    source = sources.open_source(c.data.source, channels=1)
    sizes = settings.sizes(c, num_images=len(source), num_devices=devices)
    net, tx, layout, state = make_state(c, sizes, make_schedule(c, sizes), mesh)
    step = make_train_step(net, tx, c, layout)
    rows = device_rows(BATCH, devices, micro_batches)
    batches = pipeline.train_batches(
        source, c.data, seed=c.seed, global_batch=BATCH, first_step=0, rows=rows
    )
    losses, seen, crops = [], [], None
    for batch in itertools.islice(batches, STEPS):
        seen.append(batch['index'])
        placed = put_batch(mesh, batch)
        if crops is None:
            crops = jax.device_get(jax.jit(lambda b: crops_of(c, b))(placed))
        state, metrics, _ = step(state, placed)
        losses.append(float(metrics['loss']))
    assert int(state.method.queue.filled) == 2
    return np.array(seen), crops, losses, jax.device_get(layout.gather(state))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('precision', 'bound', 'counts'), [('float32', 1e-4, (8,)), ('float64', 1e-9, (2, 4, 8))]
)
def test_devices_share_images_crops_and_losses(precision, bound, counts, monkeypatch):
    monkeypatch.setitem(trunks.BLOCKS, 18, (1, 1, 1, 1))  # it compiles in half the time
    with jax.enable_x64(precision == 'float64'):
        seen, crops, losses, _ = train(precision, 1)
        for devices in counts:
            their_seen, their_crops, their_losses, _ = train(precision, devices)
            np.testing.assert_array_equal(their_seen, seen)
            for a, b in zip(their_crops, crops, strict=True):  # a gray level is 0.01
                np.testing.assert_allclose(a, b, rtol=0, atol=bound / 10)
            np.testing.assert_allclose(their_losses, losses, rtol=bound)


@pytest.mark.slow
def test_micro_batches_are_replicas(monkeypatch):
    """Ten steps with a queue: rows, losses, and all that a checkpoint holds."""
    monkeypatch.setitem(trunks.BLOCKS, 18, (1, 1, 1, 1))
    with jax.enable_x64(True):
        seen, _, losses, state = train('float64', 4, 1, group_size=1)
        their_seen, _, their_losses, their_state = train('float64', 1, 4, group_size=1)
    rows = device_rows(BATCH, 1, 4)
    np.testing.assert_array_equal(their_seen, seen[:, rows])
    np.testing.assert_allclose(their_losses, losses, rtol=1e-9)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), their_state, state
    )
