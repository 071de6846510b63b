"""Steps that are not finite: found, dumped, made again, passed over."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import ROOT, environment, rows, run

from swav_jax import commands
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
@pytest.mark.parametrize(('method', 'turns'), [('swav', 1), ('swav_momentum', 2)])
def test_a_step_that_is_not_finite_is_dumped_and_replayed(flags, method, turns, tmp_path):
    halves = (
        f'--config.method={method}',
        f'--config.train.micro_batches={turns}',
        f'--config.data.batchsize_per_replica={BATCH // turns}',
    )
    done = run(tmp_path, *flags, *halves, '--config.train.log_every_steps=5')
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
        [sys.executable, '-m', 'swav_jax.commands.replay', str(dump)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert again.returncode == 3, again.stderr
    assert 'loss nan' in again.stdout and 'the step is not finite, as in the run' in again.stdout
    assert 'numbers of scores0 were not finite' in again.stdout
    assert 'before the step' not in again.stdout


def edited(change):
    """Change what about.json says."""

    def damage(dump):
        about = json.loads((dump / 'about.json').read_text())
        change(about)
        (dump / 'about.json').write_text(json.dumps(about))

    return damage


def written(name, content):
    return lambda dump: (dump / name).write_bytes(content)


def another_arrays(**arrays):
    return lambda dump: np.savez(dump / 'arrays.npz', **arrays)


def cut(name):
    def damage(dump):
        content = (dump / name).read_bytes()
        (dump / name).write_bytes(content[: len(content) // 2])

    return damage


def piped(name):
    """Put a named pipe into its place, through which nothing comes."""

    def damage(dump):
        (dump / name).unlink()
        os.mkfifo(dump / name)

    return damage


def images(change):
    """Change the images that the run was trained on."""

    def damage(dump):
        about = json.loads((dump / 'about.json').read_text())
        change(sorted(Path(about['config']['data']['source'].partition(':')[2]).glob('*.png')))

    return damage


DUMPS = {
    'no about.json': lambda dump: (dump / 'about.json').unlink(),
    'about.json is a pipe': piped('about.json'),
    'an empty about.json': written('about.json', b''),
    'about.json is a list': written('about.json', b'[]'),
    'about.json is not a text': written('about.json', b'\xff\x00'),
    'about.json lacks its batch': edited(lambda about: about.pop('batch')),
    'another batch': edited(lambda about: about.update(batch=0)),
    'a huge batch': edited(lambda about: about.update(batch=10**30)),
    'a negative batch': edited(lambda about: about.update(batch=-1)),
    'a batch that is a string': edited(lambda about: about.update(batch='2')),
    'an edited config': edited(lambda about: about['config']['model']['head'].update(dims=[0, 9])),
    'a config of another kind': edited(lambda about: about.update(config=[])),
    'no arrays.npz': lambda dump: (dump / 'arrays.npz').unlink(),
    'arrays.npz is a pipe': piped('arrays.npz'),
    'arrays.npz is cut': cut('arrays.npz'),
    'arrays.npz is something else': written('arrays.npz', b'PK'),
    'arrays.npz holds objects': another_arrays(index=np.array([{}], object)),
    'arrays.npz holds text': another_arrays(index=np.array(['x']), weight=np.array(['x'])),
    'arrays.npz lacks the index': another_arrays(weight=np.ones(4)),
    'arrays.npz of another batch': another_arrays(index=np.arange(4), weight=np.ones(4)),
    'arrays.npz of a smaller batch': another_arrays(index=np.arange(2), weight=np.ones(2)),
    'no state': lambda dump: shutil.rmtree(dump / 'state'),
    'an empty state': lambda dump: [shutil.rmtree(path) for path in (dump / 'state').iterdir()],
    'a damaged state': lambda dump: [
        path.write_bytes(b'x') for path in (dump / 'state').rglob('*') if path.is_file()
    ],
    'images are gone': images(lambda paths: [path.unlink() for path in paths]),
    'no image can be read': images(lambda paths: [path.write_bytes(b'x') for path in paths]),
}


def replay_each(folder, copied, source):
    """Replay the dump as it is and with each damage; prints exit codes and what was said."""
    said = {}
    for name, damage in {'sound': lambda dump: None, **DUMPS}.items():
        dump = folder / 'dump'
        shutil.copytree(folder / 'run' / 'nan_dump', dump)
        damage(dump)
        error = io.StringIO()
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            code = commands.main(['replay', str(dump)])
        said[name] = code, error.getvalue()
        shutil.rmtree(dump)
        shutil.copytree(source, copied, dirs_exist_ok=True)
    print(json.dumps(said))


@pytest.mark.slow
def test_a_damaged_or_edited_dump_is_refused_in_one_line(flags, tmp_path):
    """In one process: most are refused before anything is compiled."""
    source = next(flag for flag in flags if 'data.source' in flag).partition('folder:')[2]
    copied = tmp_path / 'images'
    shutil.copytree(source, copied)
    others = [flag for flag in flags if 'data.source' not in flag]
    done = run(tmp_path / 'run', f'--config.data.source=folder:{copied}', *others)
    assert done.returncode == 3, done.stderr
    code = (
        'import sys, pathlib, test_not_a_number;'
        'test_not_a_number.replay_each(*map(pathlib.Path, sys.argv[1:]))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, tmp_path, copied, source],
        cwd=Path(__file__).parent,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said.pop('sound')[0] == 3
    for name, (code, error) in said.items():
        assert code == 2, (name, error)
        assert error.startswith('error: ') and error.count('\n') == 1, (name, error)


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
