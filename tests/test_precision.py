"""Half precision trains as float32 does, on the demo's data."""

import itertools
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from swav_jax import config as settings
from swav_jax.data import pipeline, sources
from swav_jax.initial_state import make_schedule, make_state
from swav_jax.mesh import make_mesh, put_batch
from swav_jax.models import resnet
from swav_jax.step import make_train_step

DEMO = Path(__file__).parent.parent / 'configs' / 'demo.py'
LAST = 100  # steps over which the last loss is averaged


def last_loss(precision):
    """Loss at the end of 640 steps on the demo's images, with a small ResNet and small crops."""
    c = runpy.run_path(str(DEMO))['get_config']()
    c.precision = precision
    c.data.limit, c.optimizer.num_epochs = 2048, 20
    c.data.num_crops, c.data.size_crops = (2, 2), (16, 12)
    c.model.trunk.width_multiplier = 0.0625
    # Half the demo's rate: there, where a run ends differs by 2% with its rounding alone.
    c.optimizer.param_schedulers.lr.auto_lr_scaling.base_value = 0.8
    mesh = make_mesh(c.model.sync_bn, jax.devices()[:1])
    source = sources.open_source('demo', limit=c.data.limit, channels=1)
    sizes = settings.sizes(c, num_images=len(source), num_replicas=1)
    net, tx, layout, state = make_state(c, sizes, make_schedule(c, sizes), mesh)
    step = make_train_step(net, tx, c, layout)
    batches = pipeline.train_batches(
        source, c.data, seed=c.seed, global_batch=sizes.batch_size, first_step=0
    )
    losses = []
    for batch in itertools.islice(batches, sizes.total_steps):
        state, metrics = step(state, put_batch(mesh, batch))
        losses.append(float(metrics['loss']))
    if state.loss_scale is not None:
        assert int(state.loss_scale.overflows) < 5
    for part in (state.params, state.batch_stats, state.opt_state):
        assert {x.dtype.name for x in jax.tree.leaves(part)} <= {'float32', 'int32'}
    assert losses[0] > 1.2 * np.mean(losses[-LAST:])  # it has learned something
    return np.mean(losses[-LAST:])


@pytest.fixture(scope='module')
def short_trunk():
    """One block a stage: it compiles in half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.BLOCKS, 18, (1, 1, 1, 1))
        yield


@pytest.fixture(scope='module')
def in_float32(short_trunk):
    return last_loss('float32')


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['bfloat16', 'float16'])
def test_half_precision_ends_within_2_percent(precision, in_float32, short_trunk):
    assert last_loss(precision) == pytest.approx(in_float32, rel=0.02)
