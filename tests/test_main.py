"""The command line as a user meets it: real processes, real JPEGs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from processes import ROOT, rows, run

from swav_jax.main import main


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """An ImageFolder of JPEGs of several sizes, with noise at all scales like a photograph's."""
    root = tmp_path_factory.mktemp('photographs')
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = root / f'class{i % 3}'
        folder.mkdir(exist_ok=True)
        height, width = rng.integers(40, 90, 2)
        scales = [rng.uniform(0, 255, (s, s, 3)).astype(np.uint8) for s in (2, 5, 12)]
        layers = [np.asarray(Image.fromarray(x).resize((width, height)), float) for x in scales]
        Image.fromarray(np.mean(layers, 0).astype(np.uint8)).save(folder / f'{i}.JPEG')
    return root


@pytest.mark.slow
def test_the_imagenet_recipe_trains_on_a_folder_of_photographs(photographs, tmp_path):
    done = run(
        tmp_path,
        f'--config.data.source=folder:{photographs}',
        '--config.data.batchsize_per_replica=4',
        '--config.data.canvas_size=64',
        '--config.data.size_crops=(32,16)',
        '--config.model.trunk.depth=18',
        '--config.optimizer.num_epochs=100',
        '--config.train.max_steps=3',
        '--config.train.log_every_steps=1',
        config='configs/swav_r50.py',
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {
        'config.json', 'metrics.jsonl', 'summary.json', 'checkpoints', 'tensorboard', 'report.html',
        'loss.png', 'prototypes.png', 'map.png',
    }  # fmt: skip
    found = rows(tmp_path)
    assert [row['step'] for row in found] == [1, 2, 3]
    assert set(found[0]) >= {
        'step', 'epoch', 'loss', 'lr', 'images_per_second', 'data_wait', 'loss_over_ln_k',
        'active_prototypes', 'code_entropy', 'embedding_std',
    }  # fmt: skip
    # 0.3 per 256 images at the peak; the warm-up takes 15 of the 600 steps from a sixteenth of it.
    peak = 0.3 * 4 / 256
    np.testing.assert_allclose(
        [row['lr'] for row in found], np.array([1, 2, 3]) * peak / 16, rtol=1e-3
    )
    assert json.loads((tmp_path / 'config.json').read_text())['loss']['epsilon'] == 0.05


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('', '--config is missing'),
        ('--config=configs/none.py', 'configs/none.py: there is no such file'),
        ('--config=configs/swav_r50.py:7', "'7'"),
        ('--config=configs/demo.py', '--workdir is missing'),
        ('DEMO --wrokdir=x', 'wrokdir'),
        ('DEMO epsilon=3', "'epsilon=3' is not a flag"),
        ('DEMO --config.loss.temprature=0.2', 'the nearest one is --config.loss.temperature'),
        ('DEMO --config.loss.epsilon=small', '--config.loss.epsilon=small'),
        ('DEMO --config.loss.epsilon=0', 'config.loss.epsilon=0.0: must be a number above 0'),
        ('DEMO --config.loss.temperature=-1', 'config.loss.temperature=-1'),
        ('DEMO --config.loss.num_iters=0', 'config.loss.num_iters=0'),
        ('DEMO --config.loss.crops_for_assign=(0,6)', 'must be different indices of the 6 crops'),
        ('DEMO --config.loss.crops_for_assign=()', 'a tuple of 1 to 100'),
        ('DEMO --config.data.num_crops=(1,0)', 'config.data.num_crops'),
        ('DEMO --config.data.size_crops=(28,)', 'config.data.size_crops'),
        ('DEMO --config.data.crop_scales=((0.4,1.2),(0.2,0.4))', 'config.data.crop_scales'),
        ('DEMO --config.data.mean=(0.5,0.5,0.5)', 'config.data.mean'),
        ('DEMO --config.precision=float8', 'config.precision'),
        ('DEMO --config.optimizer.name=adagrad', 'one of sgd, lars, adam, adamw'),
        ('DEMO --config.optimizer.param_schedulers.lr.lengths=(0.1,0.8)', 'sum to 1, not to 0.9'),
        (
            'DEMO --config.data.batchsize_per_replica=20000',
            'config.data.batchsize_per_replica=20000',
        ),
        ('DEMO --config.loss.queue.queue_length=63', 'less than the global batch of 512'),
        ('DEMO --config.loss.use_double_precision=True', 'JAX_ENABLE_X64'),
        ('DEMO --config.precision=float64', 'JAX_ENABLE_X64'),
        ('DEMO --config.model.head.dims=(65,8)', '65'),
        ('DEMO --config.model.temp_frozen_params_iter_map=(("protos",5),)', "'protos' fits none"),
        ('DEMO --config.model.sync_bn.group_size=3', 'does not divide the 8 devices'),
        ('DEMO --config.evaluate.test_source=demo:tset', 'config.evaluate.test_source'),
        ('DEMO --forse', 'Did you mean: force'),
        ('DEMO --force=maybe', 'force'),
        ('DEMO --config.train.on_nan=ignore', 'one of stop, skip'),
        ('DEMO --config.train.on_collapse=die', 'one of warn, stop'),
        ('DEMO --config.train.max_nan_skips=-1', 'config.train.max_nan_skips=-1'),
        ('DEMO --config.train.collapse_patience=0', 'config.train.collapse_patience=0'),
        ('DEMO --config.train.max_steps=ten', '--config.train.max_steps=ten'),
        ('DEMO --config.checkpoint.every_minutes=-1', 'config.checkpoint.every_minutes=-1'),
        ('DEMO --config.checkpoint.every_steps=1.5', '--config.checkpoint.every_steps=1.5'),
        (
            'DEMO --config.checkpoint.keep=0',
            'config.checkpoint.keep=0: must be a whole number from 1 to',
        ),
        ('DEMO --config.seed=-1', 'config.seed=-1: must be a whole number from 0 to 4,294,967,295'),
        ('DEMO --config.loss.epsilon=nan', 'config.loss.epsilon=nan'),
        ('DEMO --config.loss.use_double_precision=perhaps', 'use_double_precision'),
        ('DEMO --config.optimizer.momentum=1', 'from 0 to below 1'),
        ('DEMO --config.optimizer.weight_decay=inf', 'config.optimizer.weight_decay=inf'),
        ('DEMO --config.augment.hue=0.7', 'from 0 to 0.5'),
        ('DEMO --config.data.max_bad_fraction=2', 'config.data.max_bad_fraction=2'),
        ('DEMO --config.init_from=/none.pth', '/none.pth'),
        ('R50 --config.data.source=webdataset:/none/{0..1}.tar', 'there is no shard /none/0.tar'),
        ('R50 --config.data.source=tfds', 'name the data after the colon'),
        ('R50', 'config.data.source'),
        ('R50 --config.data.source=folder:/none', '/none'),
        ('R50 --config.data.source=floder:/none', 'floder'),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(flags, message, tmp_path, capsys):
    for name in ('demo', 'swav_r50'):
        short = {'demo': 'DEMO', 'swav_r50': 'R50'}[name]
        flags = flags.replace(short, f'--config=configs/{name}.py --workdir={tmp_path}')
    assert main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    assert message in error


def test_a_workdir_that_cannot_be_written_is_said(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    assert main(['--config=configs/demo.py', f'--workdir={tmp_path}/file/run']) == 2
    assert 'cannot be written' in capsys.readouterr().err


def test_a_folder_without_images_is_said(tmp_path, capsys):
    flags = [f'--config.data.source=folder:{tmp_path}', f'--workdir={tmp_path}/run']
    assert main(['--config=configs/swav_r50.py', *flags]) == 2
    assert 'no images' in capsys.readouterr().err


def test_help_lists_the_settings():
    done = subprocess.run(
        [sys.executable, '-m', 'swav_jax.main', '--help', '--config=configs/demo.py'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert '--config.loss.epsilon=0.03' in done.stdout


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='no cores can be set apart')
@pytest.mark.parametrize('named', ['', '/named'])
def test_programs_compiled_for_other_cores_are_not_taken(named):
    """XLA divides work among the cores it compiled with, which JAX's key does not contain."""
    code = (
        'import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); '
        'import jax; from swav_jax import xla_flags; xla_flags.set_defaults(); '
        'print(jax.config.jax_compilation_cache_dir)'
    )
    env = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
    if named:
        env['JAX_COMPILATION_CACHE_DIR'] = named
    found = subprocess.run(
        [sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert found == named or found.endswith('swav_jax/xla/1_cores')


def test_a_step_on_the_cpu_is_made_when_it_is_called():
    """Queued, steps would each hold scratch: a ResNet-18's took 3.9 GB instead of 0.9."""
    code = (
        'from swav_jax import xla_flags; xla_flags.set_defaults()\n'
        'import jax, jax.numpy as jnp\n'
        'x = jnp.ones((1500, 1500))\n'
        'product = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda i, y: x @ y, x))\n'
        'product(x)\n'
        'print(product(x).is_ready())'
    )
    env = os.environ | {'CUDA_VISIBLE_DEVICES': '', 'JAX_COMPILATION_CACHE_DIR': ''}
    found = subprocess.run(
        [sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == 'True'
