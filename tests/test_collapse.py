"""Which rows look collapsed, and for how long."""

import pytest

from swav_jax.config import default
from swav_jax.errors import RunFailedError
from swav_jax.runs.collapse import Collapse


def look_at(rows, **changes):
    """Warnings by step; each row is (step, loss / ln K, standard deviation)."""
    config = default()
    config.model.temp_frozen_params_iter_map = (('head/prototypes0', 10),)
    config.train.collapse_patience = 20
    config.train.update(changes)
    collapse = Collapse(config)
    found = {}
    for step, loss, std in rows:
        row = {'step': step, 'loss_over_ln_k': loss, 'embedding_std': std}
        if warning := collapse.look(row):
            found[step] = warning
    return found


def test_a_collapse_is_said_once_it_has_lasted():
    stuck = [(step, 0.995, 0.08) for step in range(0, 100, 5)]
    found = look_at(stuck)
    assert list(found) == [35], 'frozen until 10, patience 20 from the row of 15, and once'
    assert 'from step 15 to 35' in found[35] and 'config.loss.epsilon=0.05' in found[35]
    assert found[35].endswith('; see "Stuck at ln K" in docs/learning.md')
    with pytest.raises(RunFailedError, match='within 1% of ln K'):
        look_at(stuck, on_collapse='stop')


def test_constant_embeddings_are_a_collapse_whatever_the_loss():
    found = look_at([(step, 0.5, 1e-5) for step in range(0, 100, 5)])
    assert 'all embeddings stayed the same' in found[35]
    assert found[35].endswith('; see "Equal embeddings" in docs/learning.md')


def test_a_run_that_learns_is_left_alone():
    assert not look_at([(step, 0.98, 0.08) for step in range(0, 100, 5)])
    one_good_row = [(step, 0.9 if step == 30 else 1.0, 0.08) for step in range(0, 51, 5)]
    assert not look_at(one_good_row), 'it begins to count anew'
