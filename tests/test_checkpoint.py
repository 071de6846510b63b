"""Checkpoints come back bit for bit, on any devices, or are refused; nothing else may happen."""

import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from refusals import another_user

from swav_jax.errors import UserError
from swav_jax.parallel.mesh import AXES, put
from swav_jax.runs.checkpoint import Checkpoints
from swav_jax.runs.digest import digest, digests, of_numpy

METADATA = {'config': {'seed': 3, 'loss': {'epsilon': 0.05}, 'crops': [2, 6]}, 'version': '0.1.0'}


@flax.struct.dataclass
class State:
    """What a training state is made of: replicated and sharded arrays, scalars, empty parts."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    queue: jax.Array | None


def make_state(seed: int, *, devices: int = 8, members: int = 2, rows: int = 1024) -> State:
    """A state whose queue is sharded over `devices` and whose other arrays are on each of them."""
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(-1, min(members, devices)), AXES)
    rng = np.random.default_rng(seed)
    params = {
        'head': {'kernel': jnp.asarray(rng.standard_normal((40, 24)), jnp.float32)},
        'half': jnp.asarray(rng.standard_normal(7), jnp.bfloat16),
        'mask': jnp.asarray(rng.random(9) > 0.5),
    }
    optimizer = optax.chain(optax.trace(0.9), optax.scale(-1.0))
    state = State(
        step=jnp.int32(seed),
        params=params,
        opt_state=optimizer.init(params),
        queue=jnp.asarray(rng.standard_normal((2, rows, 16)), jnp.float32),
    )
    queue = put(mesh, state.queue, P(None, AXES))
    return put(mesh, state.replace(queue=None)).replace(queue=queue)


def abstract(state: State) -> State:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(actual: State, expected: State) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def data_file(checkpoint: Path) -> Path:
    """The file that holds the arrays: the largest."""
    return max((f for f in checkpoint.rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)


def damage(path: Path, how: str) -> None:
    """Flip one byte, flip some all over the file, or cut it in half.

    A single flip may hit a part that orbax no longer reads: it then has to be harmless.
    """
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    for place in {'flip': [middle], 'flips': range(0, len(content), 99), 'cut': []}[how]:
        content[place] ^= 0x10
    path.write_bytes(content[:middle] if how == 'cut' else content)


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> Path:
    """A folder with the checkpoints of steps 1 and 2. Tests that change it copy it first."""
    directory = tmp_path_factory.mktemp('saved')
    with closing(Checkpoints(directory, keep=3)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), METADATA | {'step': step})
    return directory


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    subprocess.run(['cp', '-r', str(saved), str(tmp_path / 'run')], check=True)
    return tmp_path / 'run'


@pytest.mark.parametrize(('devices', 'members'), [(8, 2), (1, 1), (4, 4)])
def test_restores_bit_for_bit_onto_other_devices(saved, devices, members):
    like = abstract(make_state(0, devices=devices, members=members))
    with closing(Checkpoints(saved)) as checkpoints:
        state, metadata = checkpoints.restore(like)
    assert_same(state, make_state(2))
    assert metadata == METADATA | {'step': 2}
    assert state.queue.sharding == like.queue.sharding
    assert state.step.sharding == like.step.sharding


def test_nothing_to_restore(tmp_path):
    with closing(Checkpoints(tmp_path / 'new')) as checkpoints:
        assert checkpoints.restore(make_state(0)) is None
        assert checkpoints.latest_step() is None
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'int32', 'uint8', 'bool'])
def test_a_digest_sees_every_changed_place(dtype):
    """Each single change, and two values that trade places; -0 is not 0."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 7)).astype(jnp.dtype(dtype))
    seen = [tuple(digest(jnp.asarray(x)))]
    for place in np.ndindex(x.shape):
        changed = x.copy()
        changed.view(np.uint8)[place[0], place[1] * x.itemsize] ^= 1
        seen.append(tuple(digest(jnp.asarray(changed))))
    if dtype == 'float32':
        seen.append(tuple(digest(jnp.asarray(x[::-1]))))
        seen += [tuple(digest(jnp.zeros((5, 7)))), tuple(digest(-jnp.zeros((5, 7))))]
    assert len({tuple(map(int, pair)) for pair in seen}) == len(seen)


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    """The writer runs in the background: it must not see what the next step makes of the arrays."""
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        state = make_state(5, rows=8192)
        checkpoints.save(5, state, {})
        jax.block_until_ready(advance(state))
        checkpoints.wait()
        restored, _ = checkpoints.restore(make_state(0, rows=8192))
    assert_same(restored, make_state(5, rows=8192))


def test_keeps_the_newest_and_the_landmarks(tmp_path):
    state = make_state(1)
    with closing(Checkpoints(tmp_path, keep=2, keep_every_steps=4)) as checkpoints:
        for step in range(1, 12):
            checkpoints.save(step, state, {'step': step})
        checkpoints.save(11, state, {'step': 'saved twice'})
        checkpoints.wait()
        assert checkpoints.metadata(11) == {'step': 11}
        assert checkpoints.latest_step() == 11
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [4, 8, 10, 11]


@pytest.mark.parametrize('how', ['flips', 'cut'])
def test_a_damaged_checkpoint_is_named_and_skipped(copied, how, caplog):
    damage(data_file(copied / '2'), how)
    with closing(Checkpoints(copied)) as checkpoints, caplog.at_level(logging.WARNING):
        state, metadata = checkpoints.restore(make_state(0))
    assert_same(state, make_state(1))
    assert metadata['step'] == 1
    assert str(copied / '2') in caplog.text


def test_no_damage_to_any_file_goes_unseen(saved, tmp_path):
    """Whichever file is hit: the state is the one that was saved, or the older one is taken."""
    expected = {step: make_state(step) for step in (1, 2)}
    files = sorted(f.relative_to(saved) for f in (saved / '2').rglob('*') if f.is_file())
    skipped = 0
    for number, name in enumerate(files):
        for how in ('flip', 'cut'):
            directory = tmp_path / f'{number}{how}'
            subprocess.run(['cp', '-r', str(saved), str(directory)], check=True)
            damage(directory / name, how)
            with closing(Checkpoints(directory)) as checkpoints:
                state, metadata = checkpoints.restore(expected[1])
            assert_same(state, expected[metadata['step']])
            assert metadata == METADATA | {'step': metadata['step']}
            skipped += metadata['step'] == 1
    assert skipped >= 4


def test_a_run_goes_on_after_a_damaged_checkpoint(copied):
    damage(data_file(copied / '2'), 'flips')
    with closing(Checkpoints(copied)) as checkpoints:
        assert checkpoints.restore(make_state(0))[1]['step'] == 1
        assert (copied / '2').exists(), 'reading must not move anything'
        checkpoints.save(2, make_state(7), {'step': 'again'})
        checkpoints.wait()
        assert_same(checkpoints.restore(make_state(0))[0], make_state(7))
    assert {path.name for path in copied.iterdir()} == {'1', '2', 'damaged-2'}


def test_refuses_when_none_loads(copied):
    for step in '12':
        damage(data_file(copied / step), 'cut')
    with (
        closing(Checkpoints(copied)) as checkpoints,
        pytest.raises(UserError, match=r'no checkpoint of step 2, 1 in .* loads'),
    ):
        checkpoints.restore(make_state(0))


@pytest.mark.parametrize('mode', [0o000, 0o444, 0o111])
def test_a_checkpoint_of_another_user_is_not_damaged(copied, mode):
    """A run that took it for damaged would go on from the older one, and set it aside."""
    step = copied / '2'
    paths = [step, *step.rglob('*')]
    kept_away = [p for p in paths if mode != 0o111 or not p.is_dir() or any(p.iterdir())]
    for path in kept_away:
        if mode == 0o444 and path.is_file():
            continue
        usual = path.stat().st_mode
        path.chmod(mode)
        with (
            another_user(copied),
            closing(Checkpoints(copied)) as checkpoints,
            pytest.raises(UserError, match=r'2 cannot be read \(.*: Permission denied\): give its'),
        ):
            checkpoints.restore(make_state(0))
        path.chmod(usual)
    assert {path.name for path in copied.iterdir()} == {'1', '2'}


def test_a_pipe_in_a_checkpoint_is_damage_that_nothing_waits_for(copied):
    path = next(path for path in (copied / '2').rglob('*') if path.is_file())
    path.unlink()
    os.mkfifo(path)
    with closing(Checkpoints(copied)) as checkpoints:
        assert checkpoints.restore(make_state(0))[1]['step'] == 1


def test_parts_are_read_without_the_rest(copied):
    with closing(Checkpoints(copied)) as checkpoints:
        step, parts, metadata = checkpoints.read(('params', 'batch_stats'))
        assert (step, metadata['step']) == (2, 2)
        assert_same(parts, {'params': make_state(2).params})
        assert checkpoints.read(('params',), step=1)[0] == 1
        with pytest.raises(UserError, match='not hold a checkpoint of step 7, only of 1, 2'):
            checkpoints.read(('params',), step=7)
        damage(data_file(copied / '2'), 'flips')
        step, parts, _ = checkpoints.read(('params', 'queue'))
        assert step == 1
        np.testing.assert_array_equal(parts['queue'], make_state(1).queue)
    with (
        closing(Checkpoints(copied / 'none')) as checkpoints,
        pytest.raises(UserError, match='it is empty'),
    ):
        checkpoints.read(('params',))


def test_another_model_is_the_users_mistake_and_not_damage(saved):
    like = make_state(0)
    wider = like.replace(params=like.params | {'head': {'kernel': jnp.zeros((40, 25))}})
    with closing(Checkpoints(saved)) as checkpoints:
        with pytest.raises(
            UserError, match=r'float32\[40, 24\] as params/head/kernel .* float32\[40, 25\]'
        ):
            checkpoints.restore(wider)
        with pytest.raises(UserError, match=r'holds float32.* as queue .* needs nothing'):
            checkpoints.restore(like.replace(queue=None))


def test_a_reader_leaves_a_save_in_progress_alone(copied):
    """A second program may look at the newest checkpoint while the run writes the next."""
    unfinished = copied / '3.orbax-checkpoint-tmp'
    unfinished.mkdir()
    with closing(Checkpoints(copied)) as checkpoints:
        checkpoints.restore(make_state(0))
        assert checkpoints.latest_step() == 2
        assert unfinished.exists()
        checkpoints.save(4, make_state(4), {})
    assert not unfinished.exists(), 'what an interrupted save left behind is removed'


def run_child(directory: Path, body: str) -> subprocess.CompletedProcess:
    """Run `body` in a child with `checkpoints` open on `directory` and `state(seed, rows)`."""
    prelude = textwrap.dedent("""
        import os, resource, signal, sys
        from pathlib import Path
        import jax
        sys.path[:0] = sys.argv[2:]
        from test_checkpoint import make_state
        from swav_jax import cli
        from swav_jax.runs.checkpoint import Checkpoints
        from swav_jax.errors import UserError
        cli.quiet_libraries()
        checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
    """)
    here = Path(__file__).parent
    return subprocess.run(
        [sys.executable, '-c', prelude + textwrap.dedent(body), directory, here, here.parent],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'},
    )


def test_killed_while_writing(tmp_path):
    child = run_child(
        tmp_path,
        """
        checkpoints.save(1, make_state(1, rows=65536), {'step': 1})
        checkpoints.wait()
        checkpoints.save(2, make_state(2, rows=65536), {'step': 2})
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    with closing(Checkpoints(tmp_path)) as checkpoints:
        state, metadata = checkpoints.restore(make_state(0, rows=65536))
        assert_same(state, make_state(metadata['step'], rows=65536))


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    child = run_child(
        tmp_path,
        """
        checkpoints.save(1, make_state(1), {'step': 1})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            checkpoints.save(2, make_state(2, rows=65536), {'step': 2})
            checkpoints.wait()
        except UserError as error:
            print(error)
        """,
    )
    assert 'it needs up to 8.4 MB' in child.stdout, child.stdout + child.stderr
    assert 'checkpoints on disk: [1], intact' in child.stdout
    assert 'Traceback' not in child.stderr
    with closing(Checkpoints(tmp_path)) as checkpoints:
        assert_same(checkpoints.restore(make_state(0))[0], make_state(1))
    assert {path.name for path in tmp_path.iterdir()} == {'1'}


PATHS = (
    'exp[1]', 'lr*', 'q?', '**', 'back\\slash', 'a\\nb', 'gs:/b', 'file:', 'a|zip:b', 'p%20c#x',
    'new\nline \x1b[31m', 'é中\u202e', os.fsdecode(b'\xff\xfe'), 'x.orbax-checkpoint-tmp-12',
    'up/../x', '/'.join(['w' * 200] * 6),
)  # fmt: skip


@pytest.mark.parametrize('name', PATHS)
def test_any_path_holds_checkpoints(tmp_path, name):
    """Beside folders that a pattern would find: of them nothing may be read."""
    for other in ('exp1', 'lr2', 'qq', 'back', 'a'):
        (tmp_path / other / 'checkpoints' / '1').mkdir(parents=True)
    (tmp_path / 'up').mkdir()
    (tmp_path / name).mkdir(parents=True, exist_ok=True)
    before = set(tmp_path.rglob('*'))
    folder = tmp_path / name / 'checkpoints'
    state = {'w': jnp.arange(5.0)}
    with closing(Checkpoints(folder, keep=1)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {'step': step})
    with closing(Checkpoints(folder)) as checkpoints:
        restored, metadata = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
        step, read, _ = checkpoints.read(('w',))
    np.testing.assert_array_equal(restored['w'], state['w'])
    np.testing.assert_array_equal(read['w'], state['w'])
    assert metadata == {'step': 2} and step == 2
    shutil.rmtree(folder)
    assert set(tmp_path.rglob('*')) <= before, 'nothing was written beside it'


def rewrite(checkpoint: Path, change, *, sealed: bool = True) -> None:
    """Change a checkpoint's description, with the digest that belongs to it if `sealed`."""
    file = checkpoint / 'metadata' / 'metadata'
    content = json.loads(file.read_text())
    content = change(content) or content
    if sealed and isinstance(content, dict):
        content.pop('sha256', None)
        text = json.dumps(content, sort_keys=True)
        content['sha256'] = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps(content))


def set_array(key, value):
    def change(content):
        content['arrays']['params/head/kernel'][key] = value

    return change


def drop(*keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


TAMPERED = {
    'unsealed': drop('sha256'),
    'a list': lambda content: [content],
    'a number': lambda content: 3,
    'null': lambda content: None,
    'no arrays': drop('arrays'),
    'no metadata': drop('metadata'),
    'metadata are a list': lambda content: content | {'metadata': [1]},
    'arrays are a list': lambda content: content | {'arrays': []},
    'no config': drop('metadata', 'config'),
    'config is a string': lambda content: content['metadata'].update(config='x'),
    'an array is missing': drop('arrays', 'params/head/kernel'),
    'an array has no digest': drop('arrays', 'params/head/kernel', 'digest'),
    'an array is a string': lambda content: content['arrays'].update({'params/half': 'x'}),
    'a digest of something else': set_array('digest', '0' * 16),
    'an unknown dtype': set_array('dtype', 'float31'),
    'another dtype': set_array('dtype', 'bfloat16'),
    'no shape': set_array('shape', None),
    'a negative length': set_array('shape', [-40, 24]),
    'a huge length': set_array('shape', [10**9, 10**9]),
    'another shape': set_array('shape', [24, 40]),
    'lengths are strings': set_array('shape', ['40', '24']),
    'another step': lambda content: content | {'step': 7},
}


@pytest.mark.parametrize('how', TAMPERED)
def test_tampered_metadata_are_damage(copied, how):
    """The next older checkpoint is used, by a run as by a reader; nothing else is raised."""

    def accept(metadata):
        assert metadata['config']['seed'] == 3

    if how in ('a list', 'a number', 'null'):
        (copied / '2' / 'metadata' / 'metadata').write_text(json.dumps(TAMPERED[how]([1])))
    else:
        rewrite(copied / '2', TAMPERED[how], sealed=how != 'unsealed')
    with closing(Checkpoints(copied)) as checkpoints:
        state, metadata = checkpoints.restore(make_state(0), accept)
        assert metadata['step'] == 1
        assert_same(state, make_state(1))
        step, parts, _ = checkpoints.read(('params',), accept=accept)
        assert step == 1
        assert_same(parts, {'params': make_state(1).params})


def test_what_is_no_checkpoint_is_passed_over(copied):
    """Empty, renamed and foreign folders; the newest sound one is used."""
    for name in ('12', '013', '-4', '1_000', '²', '٣', 'old', '9.orbax-checkpoint-tmp', '3.5'):
        (copied / name).mkdir()
    (copied / '99').write_text('a file')
    (copied / '14').symlink_to('nowhere')
    (copied / '2').rename(copied / '20')
    with closing(Checkpoints(copied)) as checkpoints:
        assert checkpoints.latest_step() == 20
        for step in (12, 20):
            with pytest.raises(UserError, match='cannot be read') as caught:
                checkpoints.metadata(step)
            assert '\n' not in str(caught.value)
            with pytest.raises(UserError, match='loads'):
                checkpoints.read(('params',), step=step)
        assert checkpoints.restore(make_state(0))[1]['step'] == 1
        checkpoints.save(3, make_state(3), {'step': 3})
        checkpoints.wait()
        assert checkpoints.restore(make_state(0))[1]['step'] == 3


def test_the_first_save_is_read_back(tmp_path, monkeypatch):
    """A file system that returns other bytes than it was given, from the first save on."""
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        finish = checkpoints._manager.wait_until_finished

        def and_damage():
            finish()
            damage(data_file(tmp_path / '1'), 'flips')

        monkeypatch.setattr(checkpoints._manager, 'wait_until_finished', and_damage)
        with pytest.raises(UserError, match='was saved and cannot be read back') as caught:
            checkpoints.save(2, make_state(2), {})
        assert '\n' not in str(caught.value)
        monkeypatch.undo()


@pytest.mark.parametrize('dtype', ['float64', 'float32', 'bfloat16', 'int32', 'uint8', 'bool'])
def test_the_host_digests_as_the_devices_do(dtype):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for shape in ((), (0, 3), (5, 7), (2, 3, 4)):
            x = jnp.asarray(rng.standard_normal(shape).astype(jnp.dtype(dtype)))
            assert digests({'x': x}) == {'x': of_numpy(np.asarray(x))}


@pytest.mark.parametrize('how', ['moved', 'deleted', 'replaced'])
def test_a_folder_that_goes_away_ends_the_saving(tmp_path, how):
    """In one line, and nothing is made anew in its place."""
    folder = tmp_path / 'run' / 'checkpoints'
    folder.parent.mkdir()
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
        if how == 'moved':
            folder.parent.rename(tmp_path / 'elsewhere')
        else:
            shutil.rmtree(folder.parent)
        if how == 'replaced':
            folder.mkdir(parents=True)
        with pytest.raises(UserError, match='is gone: it was moved or deleted') as caught:
            checkpoints.save(2, make_state(2), {})
        assert '\n' not in str(caught.value)
    assert not (tmp_path / 'run').exists()


PROCESS = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[4:]
import jax
rank = int(sys.argv[1])
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(f'localhost:{sys.argv[2]}', 2, rank)
from jax.experimental import multihost_utils
from test_checkpoint import assert_mine, damage, data_file, make_state
from swav_jax.runs.checkpoint import Checkpoints

directory = Path(sys.argv[3])
checkpoints = Checkpoints(directory, keep=2)
for step in (1, 2):
    checkpoints.save(step, make_state(step), {'step': step})
checkpoints.wait()
state, metadata = checkpoints.restore(make_state(0))
assert_mine(state, make_state(2))
if rank == 0:
    damage(data_file(directory / '2' / 'state' / 'ocdbt.process_1'), 'cut')
multihost_utils.sync_global_devices('damaged')
state, metadata = checkpoints.restore(make_state(0))
assert metadata == {'step': 1}
assert_mine(state, make_state(1))
checkpoints.save(2, make_state(5), {'step': 'again'})
checkpoints.wait()
assert_mine(checkpoints.restore(make_state(0))[0], make_state(5))
checkpoints.close()
print('done')
"""


def assert_mine(actual: State, expected: State) -> None:
    """This process's parts are the same."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        for mine, theirs in zip(a.addressable_shards, b.addressable_shards, strict=True):
            np.testing.assert_array_equal(np.asarray(mine.data), np.asarray(theirs.data))


@pytest.mark.slow
def test_two_processes_agree_on_what_is_damaged(tmp_path):
    """The damage is in a file that only one of them reads; neither may wait for the other."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', PROCESS, str(rank), str(port), tmp_path, here, here.parent],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'},
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            out, error = process.communicate(timeout=120)
            assert out.strip().endswith('done'), error
    finally:
        for process in processes:
            process.kill()
