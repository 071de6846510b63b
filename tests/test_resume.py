"""A run that goes on: to the last bit, on other devices, and not with another config."""

import subprocess
import sys

import numpy as np
import pytest
from processes import ROOT, command, environment, rows

from swav_jax.config import default, to_dict
from swav_jax.errors import UserError
from swav_jax.resume import check_config


@pytest.mark.slow
def test_kills_lose_nothing():
    """Queue, float16 and its loss scale; killed while it starts, trains and writes."""
    done = subprocess.run(
        [sys.executable, 'scripts/chaos.py', '--kills', '3'],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '3 kills; 480 losses' in done.stdout


def on_devices(count, workdir, *flags):
    flags = (
        '--config.precision=float64',  # what is dealt out wrongly shows, and rounding does not
        '--config.loss.queue.queue_length=16',
        '--config.optimizer.num_epochs=3',
        *flags,
    )
    return subprocess.run(
        command(workdir, *flags, f'--config.data.batchsize_per_replica={8 // count}'),
        cwd=ROOT,
        env=environment(count, JAX_ENABLE_X64='True'),
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope='module')
def moved(tmp_path_factory):
    """A run of 6 steps on 4 devices; the queue has been full for 4 of them."""
    workdir = tmp_path_factory.mktemp('run') / 'moved'
    begun = on_devices(4, workdir, '--config.train.max_steps=6')
    assert begun.returncode == 0, begun.stderr
    return workdir


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_config(moved):
    changes = ('--config.seed=1', '--config.model.head.num_clusters=(6,)')
    other = on_devices(1, moved, *changes, '--config.loss.epsilon=0.04')
    assert other.returncode == 2 and other.stderr.count('\n') == 1
    assert 'config.model.head.num_clusters [5] → [6], config.seed 0 → 1)' in other.stderr
    assert '--force' in other.stderr


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(moved, tmp_path):
    """The queue is dealt out anew, and the batch and the order are the same."""
    for count, workdir in (1, tmp_path), (2, moved):
        done = on_devices(count, workdir)
        assert done.returncode == 0, done.stderr
    assert 'going on from step 6' in done.stdout
    whole, parts = rows(tmp_path), rows(moved)
    assert [row['step'] for row in parts] == [row['step'] for row in whole] == list(range(1, 13))
    losses = [[row['loss'] for row in part] for part in (whole, parts)]
    np.testing.assert_allclose(*losses, rtol=1e-9)


def saved(config, global_batch=64):
    return {'config': to_dict(config), 'global_batch': global_batch}


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('seed', 1),
        ('data.source', 'demo'),
        ('data.limit', 5),
        ('data.size_crops', (224, 64)),
        ('model.trunk.depth', 18),
        ('model.temp_frozen_params_iter_map', ()),
        ('optimizer.momentum', 0.8),
        ('optimizer.num_epochs', 800),
        ('optimizer.param_schedulers.lr.auto_lr_scaling.base_value', 0.2),
        ('loss.queue.queue_length', 3840),
        ('loss.crops_for_assign', (0,)),
    ],
)
def test_what_changes_the_meaning_of_a_state_or_the_order_is_refused(name, value):
    config = default()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=rf'config\.{name} .* → .*--force'):
        check_config(config, 64, saved(default()))
    check_config(config, 64, saved(config))


def test_the_rest_may_change():
    config = default()
    config.update_from_flattened_dict(
        {
            'loss.epsilon': 0.03,
            'train.max_steps': 5,
            'checkpoint.every_steps': 7,
            'evaluate.k': 3,
            'data.batchsize_per_replica': 32,
            'precision': 'bfloat16',
        }
    )
    check_config(config, 64, saved(default()))
    with pytest.raises(UserError, match='global_batch 64 → 128'):
        check_config(config, 128, saved(default()))
