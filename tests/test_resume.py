"""A run that goes on: to the last bit, on other devices, and not with another config."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from processes import ROOT, TINY, command, environment, rows, run

from swav_jax.config import default, to_dict
from swav_jax.errors import UserError
from swav_jax.runs.resume import check_config, read_notes


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
        command(workdir, f'--config.data.batchsize_per_replica={8 // count}', *flags),
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
def test_a_smaller_batchnorm_group_is_said(moved, tmp_path):
    workdir = shutil.copytree(moved, tmp_path / 'run')
    flags = ('--config.train.micro_batches=2', '--config.data.batchsize_per_replica=4')
    done = on_devices(1, workdir, '--config.train.max_steps=7', *flags)
    assert done.returncode == 0, done.stderr
    assert 'a BatchNorm group has 4 images, 8 before' in done.stdout


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(moved, tmp_path):
    """The queue is dealt out anew, and the batch and the order are the same."""
    for count, workdir in (1, tmp_path), (2, moved):
        done = on_devices(count, workdir)
        assert done.returncode == 0, done.stderr
    assert 'resuming from step 6' in done.stdout
    whole, parts = rows(tmp_path), rows(moved)
    assert [row['step'] for row in parts] == [row['step'] for row in whole] == list(range(1, 13))
    losses = [[row['loss'] for row in part] for part in (whole, parts)]
    np.testing.assert_allclose(*losses, rtol=1e-9)


@pytest.mark.slow
def test_a_memory_bank_goes_on_within_an_epoch(tmp_path):
    """DeepCluster-v2 after 6 steps of epochs of 4, on 4 devices and then on 2."""
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    for devices, workdir, last in (1, whole, 12), (4, parts, 6), (2, parts, 12):
        flags = (
            '--config.precision=float64',
            '--config.optimizer.num_epochs=3',
            f'--config.data.batchsize_per_replica={8 // devices}',
            f'--config.train.max_steps={last}',
        )
        done = subprocess.run(
            command(workdir, *flags, config=f'{TINY}:deepcluster_v2'),
            cwd=ROOT,
            env=environment(devices, JAX_ENABLE_X64='True'),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert ('filling the memory bank' in done.stdout) == (workdir is whole or devices == 4)
    assert 'resuming from step 6' in done.stdout
    losses = [[row['loss'] for row in rows(workdir)] for workdir in (whole, parts)]
    assert len(losses[0]) == 12
    np.testing.assert_allclose(*losses, rtol=1e-9)


IMAGES = {'count': 24, 'digest': '0123456789abcdef'}


def about(config, global_batch=64, **changes):
    """What a checkpoint says of a run."""
    return {'config': to_dict(config), 'global_batch': global_batch, 'images': IMAGES} | changes


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('seed', 1),
        ('init_from', 'r50.pth'),
        ('init_allow_partial', True),
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
        ('loss.temp_hard_assignment_iters', 9),
    ],
)
def test_what_changes_the_meaning_of_a_state_or_the_order_is_refused(name, value):
    config = default()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=rf'config\.{name} .* → .*--force'):
        check_config(about(config), about(default()))
    check_config(about(config), about(config))


def test_the_rest_may_change():
    config = default()
    config.update_from_flattened_dict(
        {
            'loss.epsilon': 0.03,
            'train.max_steps': 5,
            'checkpoint.every_steps': 7,
            'evaluate.k': 3,
            'evaluate.train_source': 'demo',
            'data.batchsize_per_replica': 32,
            'precision': 'bfloat16',
            'train.micro_batches': 4,
            'model.sync_bn.group_size': 8,
        }
    )
    check_config(about(config), about(default()))
    with pytest.raises(UserError, match='global_batch 64 → 128'):
        check_config(about(config, 128), about(default()))


def test_other_images_are_refused_and_old_checkpoints_know_none():
    config = default()
    config.data.source = 'folder:x'
    for images, message in (
        (IMAGES | {'count': 48}, 'images of config.data.source=folder:x 24 → 48'),
        (IMAGES | {'count': 8}, 'images of config.data.source=folder:x 24 → 8'),
        (IMAGES | {'digest': 'f' * 16}, 'folder:x are 24 others, or in another order'),
    ):
        with pytest.raises(UserError, match=rf'{message}.*--force') as caught:
            check_config(about(config, images=images), about(config))
        assert '\n' not in str(caught.value)
    old = about(config)
    del old['images']
    check_config(about(config, images=IMAGES | {'count': 48}), old)
    with pytest.raises(UserError) as caught:  # which other images follow from
        check_config(about(config, images=IMAGES | {'count': 48}), about(default()))
    assert '24 → 48' not in str(caught.value)


def test_notes_keep_figures_only_beside_those_that_are_measured_alike():
    notes = {'results': {'knn_top1': 50.0}, 'evaluated': True, 'left_out': [[3, 4]]}
    saved, config = about(default()) | notes, default()
    assert read_notes(about(config), saved) == notes
    assert read_notes(about(config) | {'images': {}}, saved) == notes
    changes = {'test_source': 'demo', 'train_source': 'demo', 'k': 3, 'size': 96, 'feature_grid': 3}
    for name, value in changes.items():
        config = default()
        config.evaluate[name] = value
        found = read_notes(about(config), saved)
        assert found == {'results': {}, 'evaluated': False, 'left_out': [[3, 4]]}, name
    for damage in (
        {'results': []},
        {'results': {'a': None}},
        {'left_out': [[1]]},
        {'left_out': 3},
        {'config': 7},
    ):
        with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
            read_notes(about(default()), saved | damage)


def flags_of(folder, *more):
    return (
        f'--config.data.source=folder:{folder}',
        '--config.data.channels=3',
        '--config.data.mean=(0.5,0.5,0.5)',
        '--config.data.std=(0.2,0.2,0.2)',
        *more,
    )


def pictures(folder, numbers):
    folder.mkdir(exist_ok=True)
    for i in numbers:
        pixels = np.random.default_rng(i).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f'{i:02}.png')


@pytest.mark.slow
def test_a_run_keeps_its_images_and_its_beginning(tmp_path):
    """Started again with more images, other first weights, an earlier end, and when it is done."""
    folder, workdir = tmp_path / 'images', tmp_path / 'run'
    pictures(folder, range(24))
    flags = flags_of(folder, '--config.optimizer.num_epochs=2', '--config.data.limit=0')
    begun = run(workdir, *flags, '--config.train.max_steps=9')
    assert begun.returncode == 0, begun.stderr
    pictures(folder, range(24, 48))
    init = '--config.init_from=none.pth'
    refused = run(workdir, *flags, init)
    assert refused.returncode == 2 and refused.stderr.count('\n') == 1, refused.stderr
    message = (
        f"config.init_from '' → 'none.pth', images of config.data.source=folder:{folder} 24 → 48"
    )
    assert message in refused.stderr and '--force' in refused.stderr
    for path in sorted(folder.iterdir())[24:]:
        path.unlink()
    ended = run(workdir, *flags, '--config.train.max_steps=5')
    assert ended.returncode == 0, ended.stderr
    assert 'nothing is left to train: the run has made 9 steps of 5' in ended.stdout
    forced = run(workdir, *flags, '--force', init, '--config.loss.epsilon=0.04')
    assert forced.returncode == 0, forced.stderr
    assert "config.init_from='none.pth' is not used" in forced.stdout
    written = json.loads((workdir / 'config.json').read_text())
    assert written['init_from'] == '' and written['loss']['epsilon'] == 0.04
    again = run(workdir, *flags)
    assert again.returncode == 0, again.stderr
    assert 'nothing is left to train: the run has made 12 steps of 12' in again.stdout
    assert json.loads((workdir / 'config.json').read_text()) == written, 'no step used epsilon=0.03'
