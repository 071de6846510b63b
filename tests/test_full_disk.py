"""Runs on disks that fill, and in folders that go away: one line, an end, and the run can go on."""

import shutil
import subprocess
import time

import pytest
from processes import ROOT, command, environment, rows, run

FLAGS = (
    '--config.optimizer.num_epochs=2',
    '--config.checkpoint.every_epochs=0',
    '--config.checkpoint.every_steps=2',
)


@pytest.fixture
def disk(tmp_path):
    """`disk(kilobytes)` is a folder on a disk of that size, or gives it another one."""
    folder = tmp_path / 'disk'

    def sized(kilobytes):
        how = 'remount,' if folder.exists() else ''
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', f'{how}size={kilobytes}k', 'tmpfs', folder],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            pytest.skip('needs the right to mount a small disk')
        return folder

    yield sized
    subprocess.run(['umount', folder], check=False)


@pytest.mark.slow
@pytest.mark.parametrize('kilobytes', [4, 8, 28, 200])
def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on_with_room(disk, kilobytes):
    """It fills with config.json, TensorBoard's events, the first and a later checkpoint."""
    workdir = disk(kilobytes) / 'run'
    begun = run(workdir, *FLAGS)
    assert begun.returncode == 2, begun.stderr
    assert begun.stderr.count('\n') == 1 and 'no space for' in begun.stderr, begun.stderr
    disk(50_000)
    done = run(workdir, *FLAGS)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert [row['step'] for row in rows(workdir)] == list(range(1, 17))
    left = {path.name for path in workdir.iterdir()}
    assert not [name for name in left if name.startswith('.') or 'damaged' in name]


@pytest.mark.slow
def test_a_run_whose_folder_is_moved_ends_in_one_line(tmp_path):
    workdir, elsewhere = tmp_path / 'run', tmp_path / 'elsewhere'
    flags = ('--config.optimizer.num_epochs=9999', *FLAGS[1:])
    child = subprocess.Popen(
        command(workdir, *flags),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not (workdir / 'checkpoints' / '10').exists():
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        workdir.rename(elsewhere)
        error = child.communicate(timeout=60)[1]
    finally:
        child.kill()
    assert child.returncode == 2
    assert error.count('\n') == 1 and 'is gone: it was moved or deleted' in error, error
    assert not workdir.exists()
    shutil.move(elsewhere, workdir)
    again = run(workdir, *flags, '--config.train.max_steps=500')
    assert again.returncode == 0, again.stderr
    assert 'resuming from step' in again.stdout
    assert [row['step'] for row in rows(workdir)] == list(range(1, 501))
