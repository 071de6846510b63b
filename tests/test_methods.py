"""What the interface promises to methods that are still to come: a teacher with its own state."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_training import make_update, random_crops, small_config, start

from swav_jax import methods
from swav_jax.config import settings
from swav_jax.methods.method import Learned
from swav_jax.methods.sinkhorn import sinkhorn_codes
from swav_jax.methods.swav import SwAV, normalize_prototypes, swapped_prediction
from swav_jax.parallel.mesh import AXES, REPLICATED


class Teacher(NamedTuple):
    params: Any
    batch_stats: Any


class WithTeacher(SwAV):
    """Codes by a network that follows with a half of each update, and sees all crops itself."""

    def init(self, params, batch_stats, sizes):
        return params, Teacher(params, batch_stats)

    def specs(self, state):
        return jax.tree.map(lambda _: REPLICATED, state)

    def loss(self, network, params, outputs, batch, state):
        seen, batch_stats = network.forward(state.params, state.batch_stats)
        codes = sinkhorn_codes(
            [s[:2] for s in seen.scores], epsilon=0.05, num_iters=3, axis_names=AXES
        )
        losses = swapped_prediction(
            outputs.scores[0], codes[0], crops_for_assign=(0, 1), temperature=0.1
        )
        return Learned(jnp.mean(losses), codes, state._replace(batch_stats=batch_stats))

    def after_update(self, params, state):
        params = normalize_prototypes(params)
        moved = jax.tree.map(lambda old, new: (old + new) / 2, state.params, params)
        return params, state._replace(params=moved)


def test_names_of_settings_are_those_of_the_methods():
    """The table of settings cannot import them."""
    assert set(settings.METHODS) == set(methods.METHODS)


@pytest.mark.parametrize('sharding', ['replicated', 'zero'])
def test_a_teacher_is_a_file_and_a_line(monkeypatch, sharding):
    """Four devices do not divide all widths: slices have zeros behind them, a teacher has not."""
    monkeypatch.setitem(methods.METHODS, 'swav', WithTeacher)
    odd = {'model.head.dims': (0, 18, 9), 'model.head.num_clusters': (7,)}
    c = small_config(sharding=sharding, **odd)
    layout, net, tx, state = start(c, 4)
    before = jax.device_get(layout.gather(state))
    state, metrics = make_update(c, layout, net, tx)(state, random_crops(c, 0), np.ones(16))
    after = jax.device_get(layout.gather(state))
    assert metrics['finite']
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    halves = jax.tree.map(lambda old, new: (old + new) / 2, before.params, after.params)
    jax.tree.map(close, after.method.params, halves)
    # Both have seen the same crops with the same parameters.
    jax.tree.map(close, after.method.batch_stats, after.batch_stats)
