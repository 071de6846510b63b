"""Standard output that is closed, full, or takes ASCII alone."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, command, environment, rows

from swav_jax import commands
from swav_jax.commands import preview

FULL = Path('/dev/full')
needs_full = pytest.mark.skipif(not FULL.exists(), reason='no full device here')


def help_of_main(**options):
    words = [sys.executable, '-m', 'swav_jax.main', '--help', '--config=configs/demo.py']
    return subprocess.Popen(
        words, cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)}, text=True, **options
    )


def test_a_closed_pipe_ends_a_command_without_a_word():
    read, write = os.pipe()
    os.close(read)
    process = help_of_main(stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (process.communicate()[1], process.returncode) == ('', 141)


@needs_full
def test_a_full_device_is_said():
    with FULL.open('w') as full:
        process = help_of_main(stdout=full, stderr=subprocess.PIPE)
        error = process.communicate()[1]
    assert process.returncode == 2
    assert error.startswith('error: standard output: No space left') and error.count('\n') == 1


@pytest.mark.slow
@needs_full
def test_a_picture_on_a_full_disk_is_refused(tmp_path, capsys, monkeypatch):
    argv = [f'--config={ROOT}/configs/demo.py', '--images=1']
    assert commands.main(['preview', *argv, f'--output={FULL}']) == 2
    assert f'--output={FULL}' in capsys.readouterr().err
    (tmp_path / 'sheet.png').write_text('before')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    sheet = preview.contact_sheet

    def sheet_and_limit(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return sheet(*arguments)

    monkeypatch.setattr(preview, 'contact_sheet', sheet_and_limit)
    try:
        code = commands.main(['preview', *argv, f'--output={tmp_path}/sheet.png'])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert (code, error.count('\n')) == (2, 1)
    assert 'sheet.png cannot be written (File too large)' in error
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('sheet.png', 'before')]


@pytest.mark.slow
def test_a_run_goes_on_without_its_output(tmp_path):
    """A pipe whose reader is gone after a line, a full device, and neither: the same losses."""
    flags = ('--config.optimizer.num_epochs=2',)
    losses = {}
    for name in ('whole', 'closed', 'full'):
        if name == 'full' and not FULL.exists():
            continue
        with (tmp_path / f'{name}.err').open('w') as err, FULL.open('w') as full:
            out = full if name == 'full' else subprocess.PIPE
            process = subprocess.Popen(
                command(tmp_path / name, *flags),
                cwd=ROOT,
                env=environment(),
                stdout=out,
                stderr=err,
            )
            if name == 'closed':
                process.stdout.readline()
                process.stdout.close()
            elif name == 'whole':
                process.communicate()
            assert process.wait() == 0
        said = (tmp_path / f'{name}.err').read_text()
        assert ('the run continues without printing' in said) == (name != 'whole')
        assert said.count('\n') == (name != 'whole'), said
        assert (tmp_path / name / 'summary.json').is_file()
        losses[name] = [(row['step'], row['loss']) for row in rows(tmp_path / name)]
    assert losses['whole'] and all(found == losses['whole'] for found in losses.values())


@pytest.mark.slow
def test_ascii_and_the_c_locale_suffice(tmp_path):
    ascii_only = environment(LC_ALL='C', PYTHONUTF8='0', PYTHONIOENCODING='ascii')
    for flags in (['--plan'], []):
        done = subprocess.run(
            command(tmp_path / 'run', '--config.optimizer.num_epochs=1', *flags),
            cwd=ROOT,
            env=ascii_only,
            capture_output=True,
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert done.stdout.isascii() and len(done.stdout) > 100
