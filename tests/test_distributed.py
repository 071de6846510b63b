"""Real processes over gloo: the same training as one process, and the same end."""

import importlib.util
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from processes import ROOT, command, environment, free_port, one_of_two, rows, run

from swav_jax.errors import UserError
from swav_jax.parallel import distributed
from swav_jax.runs.checkpoint import Checkpoints

FLAGS = (
    '--config.data.limit=128',
    '--config.data.batchsize_per_replica=8',
    '--config.loss.queue.queue_length=64',
    '--config.evaluate.train_source=demo:test',
    '--config.evaluate.test_source=demo:test',
    '--config.train.max_steps=10',
    '--config.precision=float64',
    '--config.optimizer.param_schedulers.lr.auto_lr_scaling.base_value=0.1',
)


ENDLESS = ('--config.train.max_steps=0', '--config.optimizer.num_epochs=99999')


@pytest.fixture
def start():
    """Starts a Python process with its output piped; ends what a failed test leaves behind."""
    processes = []

    def start(command):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        env = environment(JAX_ENABLE_X64='True')
        process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()  # a SIGTERM would be answered with a checkpoint
        process.communicate()


@pytest.fixture(scope='module')
def single(tmp_path_factory):
    """Metrics of a single process with 4 devices, and its kNN accuracy."""
    workdir = tmp_path_factory.mktemp('single')
    subprocess.run(
        command(workdir, *FLAGS, '--config.data.batchsize_per_replica=4'),
        cwd=ROOT,
        env=environment(4, JAX_ENABLE_X64='True'),
        check=True,
        capture_output=True,
    )
    return rows(workdir), json.loads((workdir / 'summary.json').read_text())


@pytest.mark.slow
@pytest.mark.parametrize(('processes', 'devices'), [(2, 4), (4, 1)])
def test_processes_train_like_a_single_one(processes, devices, single, start, tmp_path):
    batch = f'--config.data.batchsize_per_replica={16 // (processes * devices)}'
    launcher = ('scripts/launch_local.py', str(processes), f'--cpu_devices={devices}')
    flags = command(tmp_path, *FLAGS, batch, '--config.evaluate.report=True')[3:]
    launched = start([sys.executable, *launcher, *flags])
    out, err = launched.communicate(timeout=500)
    assert launched.returncode == 0, err
    assert out.count('step 10/10') == 2  # the kNN's line and the loss's, of process 0 alone
    expected, summary = single
    found = rows(tmp_path)
    for name in ('step', 'epoch', 'loss', 'lr', 'grad_norm', 'active_prototypes'):
        np.testing.assert_allclose(
            [row[name] for row in found], [row[name] for row in expected], rtol=1e-9, err_msg=name
        )
    found = json.loads((tmp_path / 'summary.json').read_text())
    for name in ('knn_top1', 'nmi', 'knn_top1_untrained'):
        assert found[name] == pytest.approx(summary[name], abs=1e-6)
    written = list((tmp_path / 'tensorboard').glob('events*'))
    assert len(written) == 2, "process 0's numbers and its report's pictures"
    assert (tmp_path / 'report.html').exists()


@pytest.mark.slow
def test_micro_batches_of_processes_go_on_with_a_run_of_others(start, tmp_path):
    """2 devices × 4 micro-batches, then 2 processes × 2 × 2: what 8 devices compute."""
    flags = (*FLAGS, '--config.data.batchsize_per_replica=2', '--config.model.sync_bn.group_size=2')
    flags += ('--config.evaluate.train_source=', '--config.evaluate.test_source=')
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    turns, half = '--config.train.micro_batches', '--config.train.max_steps=5'
    for devices, argv in (
        (8, command(whole, *flags)),
        (2, command(parts, *flags, f'{turns}=4', half)),
    ):
        env = environment(devices, JAX_ENABLE_X64='True')
        subprocess.run(argv, cwd=ROOT, env=env, check=True, capture_output=True)
    launcher = ('scripts/launch_local.py', '2', '--cpu_devices=2')
    launched = start([sys.executable, *launcher, *command(parts, *flags, f'{turns}=2')[3:]])
    out, err = launched.communicate(timeout=500)
    assert launched.returncode == 0, err
    assert 'resuming from step 5' in out and 'BatchNorm group' not in out
    found, expected = rows(parts), rows(whole)
    assert [row['step'] for row in found] == list(range(1, 11))
    for name in ('loss', 'lr', 'grad_norm', 'active_prototypes'):
        np.testing.assert_allclose(
            [row[name] for row in found], [row[name] for row in expected], rtol=1e-9, err_msg=name
        )


@pytest.mark.slow
def test_the_others_end_when_one_is_killed(start, tmp_path):
    port = free_port()
    processes = [start(command(tmp_path, *FLAGS, *ENDLESS, *one_of_two(i, port))) for i in range(2)]
    deadline = time.monotonic() + 300
    while not (tmp_path / 'metrics.jsonl').exists() or len(rows(tmp_path)) < 3:
        assert time.monotonic() < deadline and not any(p.poll() for p in processes)
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    _, err = processes[0].communicate(timeout=120)
    assert time.monotonic() - killed_at < 120
    assert processes[0].returncode not in (0, 2)
    assert 'another process has ended' in err


@pytest.mark.slow
def test_processes_that_disagree_or_fail_say_so_once_and_all_end(start, tmp_path):
    """By different settings, then by data that only one of them has."""
    for own, message in (
        (('--config.loss.epsilon=0.05',), 'config.loss.epsilon is 0.03 in process 0 and 0.05 in 1'),
        (('--workdir=/proc/none',), 'process 1: --workdir=/proc/none cannot be written'),
    ):
        port = free_port()
        commands = [command(tmp_path, *FLAGS, *one_of_two(i, port)) for i in range(2)]
        processes = [start(commands[0]), start([*commands[1], *own])]
        ended = [(*p.communicate(timeout=200), p.returncode) for p in processes]
        assert [code for *_, code in ended] == [2, 2]
        lines = [line for _, err, _ in ended for line in err.splitlines() if 'error' in line]
        assert len(lines) == 1 and lines[0].startswith('error: ') and message in lines[0]
        assert lines[0] in ended[0][1]


@pytest.mark.slow
def test_a_process_that_cannot_write_its_part_of_a_checkpoint_ends_all(start, tmp_path):
    """Orbax's own barriers would keep both for 20 minutes: they stand at different ones."""
    port = free_port()
    flags = (*FLAGS, '--config.sharding=zero', '--config.train.max_steps=2')
    commands = [command(tmp_path, *flags, *one_of_two(i, port)) for i in range(2)]
    limited = ['bash', '-c', 'ulimit -f 1; exec "$@"', 'bash', *commands[1]]
    processes = [start(commands[0]), start(limited)]
    ended = [(*p.communicate(timeout=400), p.returncode) for p in processes]
    assert [code for *_, code in ended] == [2, 2], ended
    assert 'error: another process could not write its part of a checkpoint' in ended[0][1]
    assert 'error: no space for a checkpoint' in ended[1][1]


@pytest.mark.slow
def test_bad_images_of_all_processes_are_in_one_list_and_stop_all(start, tmp_path):
    """12 of 32 images are bad; each process meets only some, and not more than is allowed."""
    folder, workdir, port = tmp_path / 'images', tmp_path / 'run', free_port()
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(32):
        path = folder / f'{i:02}.png'
        Image.fromarray(rng.integers(0, 256, (24, 24), np.uint8)).save(path)
        if i < 12:
            path.write_bytes(path.read_bytes()[:100])
    flags = (f'--config.data.source=folder:{folder}', '--config.data.max_bad_fraction=0.3')
    flags += ('--config.train.max_steps=2', '--config.evaluate.train_source=')
    processes = [start(command(workdir, *FLAGS, *flags, *one_of_two(i, port))) for i in range(2)]
    ended = [(*p.communicate(timeout=500), p.returncode) for p in processes]
    assert [code for *_, code in ended] == [2, 2], ended
    assert '12 of 32 images cannot be read' in ended[0][1]
    assert 'cannot be read' not in ''.join(ended[1][:2])
    listed = (workdir / 'bad_images.txt').read_text().splitlines()
    assert sorted(listed) == [str(folder / f'{i:02}.png') for i in range(12)]


ALONE = """
import sys, time
from swav_jax.parallel import distributed, ending
coordinator, number = sys.argv[1], int(sys.argv[2])
distributed.join(coordinator, 3, number)
if number == 1:
    ending.leave(2, 'disk.1: No space left on device')
time.sleep(600)  # as in a collective operation
"""


@pytest.mark.slow
def test_one_that_fails_alone_tells_the_others_why(start):
    where, began = f'localhost:{free_port()}', time.monotonic()
    processes = [start([sys.executable, '-c', ALONE, where, str(i)]) for i in range(3)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2, 2], said
    assert time.monotonic() - began < 100 and not said[1]
    for text in said[0], said[2]:
        assert text.count('\n') == 1
        assert 'error: process 1 has ended (disk.1: No space left on device): start all' in text


def test_an_abort_while_a_process_leaves_keeps_its_exit_code():
    """Process 0 may exit before the answer of the last barrier has reached the others."""
    leave = """
import os
from swav_jax.parallel import ending
class Client:
    key_value_set = lambda *_: None
    wait_at_barrier = lambda *_: os.abort()
ending.jax_distributed.global_state.client = Client()
ending.catch_aborts()
ending.leave(2, 'disk full')
"""
    done = subprocess.run([sys.executable, '-c', leave], env=environment(), capture_output=True)
    assert (done.returncode, done.stderr) == (2, b'')


@pytest.mark.slow
def test_a_collapse_of_all_leaves_the_save_in_flight_whole(start, tmp_path):
    """The step before the one that ends the run is being saved."""
    flags = (
        '--config.loss.temperature=100.0',
        '--config.train.on_collapse=stop',
        '--config.train.collapse_patience=3',
        '--config.checkpoint.every_steps=1',
        '--config.model.temp_frozen_params_iter_map=(("head/prototypes0",2),)',
    )
    port = free_port()
    processes = [start(command(tmp_path, *flags, *one_of_two(i, port))) for i in range(2)]
    ended = [(*p.communicate(timeout=500), p.returncode) for p in processes]
    assert [code for *_, code in ended] == [3, 3], ended
    assert all('error: collapsed: ' in err for _, err, _ in ended)
    folder = tmp_path / 'checkpoints'
    assert not [path.name for path in folder.iterdir() if not path.name.isdigit()]
    newest = max(int(path.name) for path in folder.iterdir())
    assert newest == rows(tmp_path)[-1]['step'], 'no step is lost'
    step, _, metadata = Checkpoints(folder).read(('params',))
    assert step == newest and metadata['images']['count'] == 32


IMPATIENT = """
import sys
from swav_jax.parallel import distributed, ending
{change}
from swav_jax.main import main
sys.exit(main(sys.argv[1:]))
"""


def impatient(change, workdir, *flags):
    """The command of a process that waits less long for the others."""
    return [sys.executable, '-c', IMPATIENT.format(change=change), *command(workdir, *flags)[3:]]


@pytest.mark.slow
def test_one_that_does_not_come_is_not_waited_for(start, tmp_path):
    """One of two mistypes a flag; the first of another two is not started at all."""
    change = 'distributed.JOIN_TIMEOUT = 10'
    port, others = free_port(), free_port()
    mistyped = [start(impatient(change, tmp_path, *one_of_two(i, port), *own)) for i, own in
                enumerate(((), ('--nonsense=1',)))]  # fmt: skip
    alone = [start(impatient(change, tmp_path, *one_of_two(1, others)))]
    ended = [(p.communicate(timeout=120)[1], p.returncode) for p in mistyped + alone]
    assert [code for _, code in ended] == [2, 2, 2], ended
    assert 'nonsense' in ended[1][0]
    for said, _ in ended[0], ended[2]:
        assert said.count('\n') == 1 and 'error: not all processes came to --coordinator' in said
        assert 'within 10 seconds' in said


@pytest.mark.slow
def test_one_that_stood_still_says_so_as_do_the_others(start, tmp_path):
    change, port = 'ending.HEARTBEAT_TIMEOUT = 15', free_port()
    commands = [impatient(change, tmp_path, *ENDLESS, *one_of_two(i, port)) for i in range(2)]
    processes = [start(command) for command in commands]
    deadline = time.monotonic() + 300
    while not (tmp_path / 'metrics.jsonl').exists() or len(rows(tmp_path)) < 3:
        assert time.monotonic() < deadline and not any(p.poll() for p in processes)
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGSTOP)
    said = processes[0].communicate(timeout=100)[1]
    assert processes[0].returncode == 1 and 'Traceback' not in said
    assert 'error: another process has ended' in said
    processes[1].send_signal(signal.SIGCONT)
    said = processes[1].communicate(timeout=100)[1]
    assert processes[1].returncode == 1 and 'Traceback' not in said
    assert 'error: this process stood still for' in said or 'another process has ended' in said


def test_the_launcher_ends_those_that_wait_for_one_that_failed(capfd, monkeypatch):
    spec = importlib.util.spec_from_file_location('launcher', ROOT / 'scripts' / 'launch_local.py')
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    monkeypatch.setattr(launcher, 'GRACE', 0.3)
    for second, code, words in (
        ('exit 0', 0, ''),
        ('exit 3', 3, 'error: process 1 has ended with code 3: ending process 0, 2, which'),
        ('kill -KILL $$', 137, 'error: process 1 was ended by SIGKILL: ending process 0, 2, which'),
    ):
        wait = 'sleep 60' if code else 'exit 0'
        shells = [subprocess.Popen(['sh', '-c', script]) for script in (wait, second, wait)]
        assert launcher.wait(shells) == code
        assert capfd.readouterr().err.startswith(words)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--coordinator=localhost:1'], '--num_processes and --process_id missing'),
        (['--coordinator=a:1', '--num_processes=2', '--process_id=2'], 'must be from 0 to 1'),
        (['--coordinator=a', '--num_processes=2', '--process_id=0'], 'must be HOST:PORT'),
        (['--distributed'], 'finds no other processes'),
    ],
)
def test_flags_that_join_nothing_are_explained(flags, message, tmp_path):
    ended = run(tmp_path, *flags)
    assert ended.returncode == 2
    assert ended.stderr.startswith('error: ') and ended.stderr.count('\n') == 1
    assert message in ended.stderr


@pytest.mark.parametrize('coordinator', ['', 'a', ':1', 'a:', 'a:0', 'a:70000', 'a:-1', 'a:1 '])
def test_a_coordinator_is_a_host_and_a_port(coordinator):
    with pytest.raises(UserError, match='must be HOST:PORT'):
        distributed.join(coordinator, 2, 0)
