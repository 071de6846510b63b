"""Signals, locks and clocks, in real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import ROOT, command, environment, free_port, one_of_two, rows, run

from swav_jax.main import main

FLAGS = ('--config.optimizer.num_epochs=9999', '--config.checkpoint.every_epochs=0')


class Run:
    """A run that goes on for long, in a process of its own."""

    def __init__(self, workdir, *flags):
        self.workdir = workdir
        self.log = workdir.with_suffix('.log')
        with self.log.open('w') as log:
            self.process = subprocess.Popen(
                command(workdir, *FLAGS, *flags),
                cwd=ROOT,
                env=environment(),
                stdout=log,
                stderr=log,
            )

    def wait_for(self, condition):
        deadline = time.monotonic() + 300
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def has_steps(self, count):
        path = self.workdir / 'metrics.jsonl'
        return path.exists() and path.read_text().count('\n') >= count

    def stop(self, number):
        """Send a signal; returns the exit code and the seconds until the end."""
        start = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(timeout=300), time.monotonic() - start

    def saved(self):
        """Steps of the checkpoints."""
        folder = self.workdir / 'checkpoints'
        return sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit())


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    """One run, stopped by each signal and started again each time."""
    workdir = tmp_path_factory.mktemp('stopped') / 'run'
    found = {}
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        before = max(found.values(), key=lambda f: f['step'])['step'] if found else 0
        child = Run(workdir)
        try:
            child.wait_for(lambda child=child, before=before: child.has_steps(before + 5))
            code, seconds = child.stop(number)
        finally:
            child.process.kill()
        found[number] = {
            'code': code, 'seconds': seconds, 'step': child.saved()[-1], 'first': before,
            'log': child.log.read_text(), 'rows': rows(workdir),
        }  # fmt: skip
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ('number', 'code'), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 4)]
)
def test_a_signal_saves_and_ends_the_run(stopped, number, code):
    found = stopped[number]
    assert found['code'] == code, found['log']
    assert found['seconds'] < 30
    assert found['step'] >= found['first'] + 5
    assert f'stopped after step {found["step"]:,}' in found['log']
    assert found['rows'][-1]['step'] == found['step'], 'no step is made that is not saved'
    assert 'Traceback' not in found['log']
    if found['first']:
        assert f'resuming from step {found["first"]:,}' in found['log']


@pytest.mark.slow
def test_a_signal_before_the_first_step_is_not_lost(tmp_path):
    """It comes while the libraries load or the step compiles."""
    child = Run(tmp_path / 'early')
    try:
        child.wait_for(lambda: (tmp_path / 'early' / 'lock').exists())
        code, _ = child.stop(signal.SIGTERM)
        assert code == 0, child.log.read_text()
        assert child.saved(), child.log.read_text()
    finally:
        child.process.kill()


@pytest.mark.slow
def test_a_signal_ends_an_evaluation_which_the_next_start_makes_up_for(tmp_path):
    source = '--config.evaluate.{}_source=demo'.format
    flags = (source('train'), source('test'), '--config.evaluate.batch_size=16')
    child = Run(tmp_path / 'run', *flags)
    try:
        child.wait_for(lambda: 'an epoch' in child.log.read_text())
        time.sleep(2)
        code, seconds = child.stop(signal.SIGTERM)
        assert code == 0 and seconds < 30 and child.saved() == [0], child.log.read_text()
    finally:
        child.process.kill()
    again = run(tmp_path / 'run', *FLAGS, *(f.replace('=demo', '=demo:test') for f in flags),
                '--config.train.max_steps=1')  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert 'knn_top1_untrained' in again.stdout


@pytest.mark.slow
def test_a_workdir_in_use_is_refused_and_checkpoints_follow_the_clock(tmp_path, capsys):
    child = Run(tmp_path / 'run', '--config.checkpoint.every_minutes=0.01')
    try:
        child.wait_for(lambda: child.has_steps(1))
        arguments = [*command(tmp_path / 'run', *FLAGS)[3:]]
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert f'is in use by process {child.process.pid} on {os.uname().nodename}' in message
        assert message.count('\n') == 1
        child.wait_for(lambda: len(child.saved()) == 2)  # of which only the newest two are kept
        child.process.kill()
        child.process.wait()
    finally:
        child.process.kill()
    # What a dead process left behind locks nothing, whoever has its number now.
    (tmp_path / 'run' / 'lock').write_text(f'process {os.getpid()} on {os.uname().nodename}')
    again = run(tmp_path / 'run', *FLAGS, '--config.train.max_steps=1')
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    port = free_port()
    both = [
        subprocess.Popen(
            command(tmp_path, *FLAGS, *one_of_two(i, port)),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / 'metrics.jsonl').exists() or len(rows(tmp_path)) < 5:
            assert time.monotonic() < deadline and not any(p.poll() for p in both)
            time.sleep(0.1)
        both[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=120)[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
    finally:
        for process in both:
            process.kill()
    (saved,) = (int(path.name) for path in (tmp_path / 'checkpoints').iterdir())
    assert all(f'stopped after step {saved};' in text for text in said), said
    assert rows(tmp_path)[-1]['step'] == saved


SECOND = """
import os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
from swav_jax.runs.signals import Signals
with Signals() as signals:
    print('ready', flush=True)
    x = 3
    while True:  # never looks at the signals, as a hanging compilation
        x = x * x % 7919
"""


def test_a_second_ctrl_c_ends_the_process_at_once():
    child = subprocess.Popen(
        [sys.executable, '-c', SECOND, str(ROOT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == 'ready\n'
        for _ in range(3):  # a scheduler may repeat itself
            child.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=5) == 130
        assert 'SIGTERM: saving after this step' in child.stderr.read()
    finally:
        child.kill()
        child.stdout.close()
        child.stderr.close()
