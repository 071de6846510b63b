"""What is on disk after a run, and what a terminal shows meanwhile."""

import io
import json
import math
import struct
from pathlib import Path

import jax.numpy as jnp
import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from swav_jax.errors import UserError
from swav_jax.runs.monitor import Monitor
from swav_jax.runs.rows import read_rows

KEYS = ['step', 'epoch', 'loss', 'lr', 'images_per_second', 'data_wait', 'loss_over_ln_k']


def make(workdir, *, total_steps=25, first_step=0, terminal=False, **settings):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, legacy_windows=False)
    settings = dict(num_prototypes=30, log_every_steps=10) | settings
    monitor = Monitor(
        workdir,
        total_steps=total_steps,
        steps_per_epoch=10,
        batch_size=64,
        first_step=first_step,
        console=console,
        **settings,
    )
    return monitor, out


def metrics(step):
    return {
        'loss': jnp.float32(3 - step / 100),
        'lr': jnp.float32(0.1),
        'active_prototypes': jnp.int32(step),
    }


def run(monitor, first, last):
    return [monitor.record(step, metrics(step), 0.5) for step in range(first + 1, last + 1)]


def test_a_run_leaves_rows_events_and_a_summary(tmp_path):
    monitor, out = make(tmp_path)
    monitor.events({'knn_top1': 71.5}, step=0)
    rows = run(monitor, 0, 25)
    summary = monitor.finish({'knn_top1': 81.0})

    saved = read_rows(tmp_path / 'metrics.jsonl')
    assert [row['step'] for row in saved] == [1, 10, 20, 25]
    assert list(saved[1])[:7] == KEYS
    assert saved[1]['loss'] == float(jnp.float32(2.9)), 'the loss keeps all its digits'
    assert saved[1]['loss_over_ln_k'] == pytest.approx(2.9 / math.log(30))
    assert saved[1]['epoch'] == 1.0
    assert saved[1]['data_wait'] == 0.5
    assert saved[1]['active_prototypes'] == 10
    assert read_rows(tmp_path / 'events.jsonl') == [{'step': 0, 'epoch': 0.0, 'knn_top1': 71.5}]
    # Every row comes back one logged step late, when the devices are done with it.
    assert [row and row['step'] for row in rows if row] == [1, 10, 20]
    assert rows[9]['step'] == 1

    assert summary == json.loads((tmp_path / 'summary.json').read_text())
    assert summary['steps'] == 25
    assert summary['loss_first'] == saved[0]['loss']
    assert summary['loss_last'] == saved[-1]['loss']
    assert summary['knn_top1'] == 81.0
    assert summary['images_per_second'] > 0
    for text in ('knn_top1', '81', 'step 25/25', '0:00:00 left'):
        assert text in out.getvalue()
    assert '\r' not in out.getvalue()


@pytest.mark.parametrize(('seconds', 'warnings'), [(1e-9, 0), (100.0, 1)])
def test_devices_that_wait_for_data_are_said_once(tmp_path, seconds, warnings):
    monitor, out = make(tmp_path)
    for step in range(1, 26):
        monitor.record(step, metrics(step), seconds)
    monitor.finish({})
    assert out.getvalue().count('the devices wait for data') == warnings


def test_tensorboard_has_the_same_numbers(tmp_path):
    monitor, _ = make(tmp_path)
    monitor.events({'knn_top1': 71.5}, step=0)
    run(monitor, 0, 25)
    monitor.finish({})
    scalars = read_scalars(next((tmp_path / 'tensorboard').iterdir()))
    assert [step for step, _ in scalars['loss']] == [1, 10, 20, 25]
    assert scalars['loss'][1][1] == pytest.approx(2.9)
    assert scalars['knn_top1'] == [(0, 71.5)]


def read_scalars(path):
    """Scalars of an event file, which holds (length, checksum, message, checksum) after another."""
    content, found = path.read_bytes(), {}
    while content:
        (length,) = struct.unpack('<Q', content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
        content = content[16 + length :]
    return found


def test_a_resumed_run_has_every_step_once(tmp_path):
    """Killed at step 23 after a checkpoint at 15, while it wrote a line."""
    monitor, _ = make(tmp_path, total_steps=40, log_every_steps=5)
    run(monitor, 0, 15)
    monitor.flush()
    run(monitor, 15, 23)
    monitor.events({'knn_top1': 1.0}, step=20)
    monitor.close()
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 25, "lo')

    monitor, _ = make(tmp_path, total_steps=40, first_step=15, log_every_steps=5)
    assert [row['step'] for row in read_rows(tmp_path / 'metrics.jsonl')] == [1, 5, 10, 15]
    assert read_rows(tmp_path / 'events.jsonl') == []
    run(monitor, 15, 40)
    summary = monitor.finish({})
    steps = [row['step'] for row in read_rows(tmp_path / 'metrics.jsonl')]
    assert steps == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    assert summary['loss_first'] == float(jnp.float32(2.99)), 'of the run, not of this process'


def test_a_new_run_in_an_old_folder_keeps_nothing_of_it(tmp_path):
    monitor, _ = make(tmp_path)
    run(monitor, 0, 25)
    monitor.events({'knn_top1': 71.5}, step=0)
    monitor.close()
    make(tmp_path)[0].close()
    assert read_rows(tmp_path / 'metrics.jsonl') == []
    assert read_rows(tmp_path / 'events.jsonl') == []


def test_what_is_pending_is_written_before_a_checkpoint(tmp_path):
    monitor, _ = make(tmp_path)
    run(monitor, 0, 10)
    assert [row['step'] for row in read_rows(tmp_path / 'metrics.jsonl')] == [1]
    assert monitor.flush()['step'] == 10
    assert monitor.flush() is None
    assert [row['step'] for row in read_rows(tmp_path / 'metrics.jsonl')] == [1, 10]
    monitor.close()


def test_not_a_number_is_null_in_json(tmp_path):
    monitor, _ = make(tmp_path)
    monitor.record(1, metrics(1) | {'loss': jnp.float32(jnp.nan)})
    assert math.isnan(monitor.flush()['loss'])
    monitor.close()
    line = (tmp_path / 'metrics.jsonl').read_text()
    assert json.loads(line, parse_constant=pytest.fail)['loss'] is None


def test_on_a_terminal_one_line_moves(tmp_path):
    with make(tmp_path, terminal=True)[0] as monitor:
        out = monitor._line._console.file
        run(monitor, 0, 25)
        monitor.flush()
        monitor.say('a line that stays')
    shown = out.getvalue()
    assert '\r' in shown
    assert 'a line that stays\n' in shown
    final = shown.rsplit('\r', 1)[-1]
    for text in ('step 25/25', 'epoch 2.50', 'loss 2.7500', 'lr 0.1', 'images/s', 'left'):
        assert text in final
    assert shown.rstrip().endswith('\x1b[?25h'), 'the cursor is shown again'


def test_a_record_that_cannot_be_written_is_kept_in_mind(tmp_path):
    """The run may save first; rows are then missing, and the end says so in one line."""
    (tmp_path / 'lock').touch()
    monitor, _ = make(tmp_path)
    run(monitor, 0, 10)
    assert monitor.failure is None
    (tmp_path / 'metrics.jsonl').unlink()
    (tmp_path / 'metrics.jsonl').mkdir()
    run(monitor, 10, 25)
    assert isinstance(monitor.failure, IsADirectoryError)
    with pytest.raises(UserError, match='Is a directory'):
        monitor.finish({})
    monitor.close()
    assert not (tmp_path / 'summary.json').exists()


def test_a_folder_that_is_gone_is_said(tmp_path):
    (tmp_path / 'run').mkdir()
    monitor, _ = make(tmp_path / 'run')
    (tmp_path / 'run').rename(tmp_path / 'elsewhere')
    monitor.events({'knn_top1': 1.0}, step=0)
    with pytest.raises(UserError, match='is gone: it was moved or deleted'):
        monitor.check()
    monitor.close()
    assert not (tmp_path / 'run').exists()


def test_tensorboard_may_fail_alone(tmp_path):
    monitor, out = make(tmp_path)
    full = Path('/dev/full').open('wb', buffering=0)  # noqa: SIM115 (closed by the monitor)
    monitor._tensorboard._file._writer.close()
    monitor._tensorboard._file._writer = full
    run(monitor, 0, 25)
    summary = monitor.finish({})
    assert summary['steps'] == 25
    assert out.getvalue().count('TensorBoard gets no more events: No space left on device') == 1
    assert full.closed


def test_damaged_records_are_said_and_put_aside(tmp_path):
    monitor, _ = make(tmp_path)
    run(monitor, 0, 25)
    monitor.finish({})
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    (tmp_path / 'metrics.jsonl').write_text(
        '\n'.join([*lines[:2], '{"step": 12}', lines[2]]) + '\n'
    )
    (tmp_path / 'summary.json').write_text('{')
    monitor, out = make(tmp_path, first_step=20, total_steps=30)
    for name in ('metrics.jsonl', 'summary.json'):
        assert f'{name} is damaged: it is now {name}.damaged' in out.getvalue()
    run(monitor, 20, 30)
    assert monitor.finish({})['steps'] == 30
    steps = [row['step'] for row in read_rows(tmp_path / 'metrics.jsonl')]
    assert steps == [1, 10, 20, 30]
