"""Steps that are not finite: found, dumped, made again, passed over."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from processes import ROOT, environment, rows, run

from swav_jax.data import pipeline

COUNT, BAD, BATCH = 32, 13, 4


@pytest.fixture(scope='module')
def flags(tmp_path_factory):
    """Dark noise and a white image: divided by 1e-20 only the white one's squares overflow."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        pixels = rng.integers(0, 2, (28, 28)).astype(np.uint8)
        Image.fromarray(pixels if i != BAD else pixels + np.uint8(254)).save(folder / f'{i:02}.png')
    return (
        f'--config.data.source=folder:{folder}',
        '--config.data.mean=(0.0,)',
        '--config.data.std=(1e-20,)',
        '--config.checkpoint.every_steps=1',
        '--config.optimizer.num_epochs=2',
    )


def bad_batches(epochs):
    """Numbers of the batches that hold the white image."""
    orders = [pipeline.permutation(COUNT, 0, epoch) for epoch in range(epochs)]
    return [int(list(order).index(BAD) + COUNT * e) // BATCH for e, order in enumerate(orders)]


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_dumped_and_replayed(flags, tmp_path):
    done = run(tmp_path, *flags, '--config.train.log_every_steps=5')
    bad = bad_batches(1)[0]
    assert done.returncode == 3, done.stderr
    assert done.stderr.count('\n') == 1 and f'step {bad + 1} is not finite' in done.stderr
    dump = tmp_path / 'nan_dump'
    about = json.loads((dump / 'about.json').read_text())
    assert (about['step'], about['batch']) == (bad + 1, bad)
    arrays = np.load(dump / 'arrays.npz')
    assert BAD in arrays['index'] and arrays['index'].shape == (BATCH,)
    assert arrays['crops0'].shape == (2, BATCH, 16, 16, 1)
    assert np.abs(arrays['crops0']).max() > 1e18
    assert not np.isfinite(arrays['scores0']).all() and not np.isfinite(arrays['codes0']).all()
    assert max(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) == bad, 'the last sound'

    again = subprocess.run(
        [sys.executable, '-m', 'swav_jax.replay', str(dump)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert again.returncode == 3, again.stderr
    assert 'loss nan' in again.stdout and 'the step is not finite, as in the run' in again.stdout
    assert 'numbers of scores0 were not finite' in again.stdout
    assert 'before the step' not in again.stdout


@pytest.mark.slow
def test_bad_batches_are_left_out_also_after_a_resume(flags, tmp_path):
    bad = bad_batches(2)
    flags = (*flags, '--config.train.on_nan=skip')
    whole = run(tmp_path / 'whole', *flags, f'--config.train.max_steps={bad[0] + 2}')
    assert whole.returncode == 0, whole.stderr
    whole = run(tmp_path / 'whole', *flags)  # goes on, and knows what was left out
    assert whole.returncode == 0, whole.stderr
    assert f'without batches {bad[0]} to {bad[0]}, which led' in whole.stdout
    found = rows(tmp_path / 'whole')
    assert [row['step'] for row in found] == list(range(1, 2 * COUNT // BATCH + 1))
    assert all(row['loss'] is not None for row in found)

    few = run(tmp_path / 'few', *flags, '--config.train.max_nan_skips=0')
    assert few.returncode == 3
    assert 'config.train.max_nan_skips=0' in few.stderr


@pytest.mark.slow
def test_skips_without_a_checkpoint_in_between_count_too(tmp_path):
    """A learning rate that ruins every step: the run once began again for ever."""
    done = run(
        tmp_path,
        '--config.optimizer.param_schedulers.lr.auto_lr_scaling.base_value=1e30',
        '--config.optimizer.use_larc=False',
        '--config.train.on_nan=skip',
        '--config.train.max_nan_skips=2',
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.count('Leaving out the batches') == 2
    assert 'left out config.train.max_nan_skips=2 times already' in done.stderr


@pytest.mark.slow
def test_a_collapse_is_said_or_ends_the_run(tmp_path):
    """A temperature of 100 makes all scores alike: the loss is ln K."""
    flags = (
        '--config.loss.temperature=100.0',
        '--config.train.max_steps=9',
        '--config.train.collapse_patience=3',
        '--config.model.temp_frozen_params_iter_map=(("head/prototypes0",2),)',
    )
    done = run(tmp_path / 'stop', *flags, '--config.train.on_collapse=stop')
    assert done.returncode == 3, done.stderr
    assert done.stderr.count('\n') == 1
    assert 'within 1% of ln K from step 3 to 6' in done.stderr
    for remedy in ('Lower config.loss.epsilon', 'freeze the prototypes', 'lower the learning rate'):
        assert remedy in done.stderr
