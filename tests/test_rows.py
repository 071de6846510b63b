"""Records of a run that were damaged, or cannot be written."""

import errno
import json
import os
import resource
import signal

import pytest

from swav_jax import files
from swav_jax.runs.rows import Rows, put_aside_if_no_json, read_rows
from swav_jax.runs.workdir import _OWN

SOUND = b'{"step": 1, "loss": 2.0}\n{"step": 5, "loss": null}\n'
DAMAGE = {
    'a list': (b'[1]\n', 1),
    'no step': (b'{"loss": 1.0}\n', 1),
    'a step that is a string': (b'{"step": "2", "loss": 1.0}\n', 1),
    'a step that is NaN': (b'{"step": NaN, "loss": 1.0}\n', 1),
    'a step that is null': (b'{"step": null, "loss": 1.0}\n', 1),
    'a step that is negative': (b'{"step": -1, "loss": 1.0}\n', 1),
    'a step that is true': (b'{"step": true, "loss": 1.0}\n', 1),
    'a value that is a string': (b'{"step": 2, "loss": "1"}\n', 1),
    'a value that is nested': (b'{"step": 2, "loss": {"a": 1}}\n', 1),
    'an infinite value': (b'{"step": 2, "loss": 1e999}\n', 1),
    'no loss': (b'{"step": 2}\n', 1),
    'no UTF-8': (b'{"step": 2, "l\xff": 1.0}\n', 1),
    'UTF-16': ('{"step": 2, "loss": 1.0}\n'.encode('utf-16'), 1),
    'zeros': (b'\0' * 5000 + b'\n', 1),
    'a huge number': (b'{"step": 2, "loss": ' + b'9' * 5000 + b'}\n', 1),
    'a deep nest': (b'[' * 100_000 + b'\n', 1),
    'a huge line': (b'{"step": 2, "x": "' + b'y' * 3_000_000 + b'"}\n', 1),
    'garbage without an end': (b'\x93NUMPY', 1),
    'a number without an end': (b'7', 1),
    'an empty line': (b'\n', 1),
    'an unfinished row': (b'{"step": 9, "lo', 0),
    'the least of one': (b'{"s', 0),
    'a row without an end': (b'{"step": 9, "loss": 1.0}', 0),
}


@pytest.mark.parametrize('how', DAMAGE)
def test_sound_rows_are_kept_and_the_rest_is_put_aside(tmp_path, how):
    damage, aside = DAMAGE[how]
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(SOUND + damage)
    rows = Rows(path)
    said = rows.keep(5, ('loss',))
    assert bool(said) == bool(aside)
    assert (tmp_path / 'metrics.jsonl.damaged').exists() == bool(aside)
    if said:
        assert '\n' not in said and '2 of its rows are kept' in said
        assert (tmp_path / 'metrics.jsonl.damaged').read_bytes() == SOUND + damage
    rows.append({'step': 6, 'loss': 1.0})
    assert [row['step'] for row in read_rows(path)] == [1, 5, 6]


def test_a_row_after_an_unfinished_one_begins_a_line(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(SOUND + b'{"step": 9, "lo')
    Rows(path).append({'step': 6, 'loss': float('inf')})
    assert read_rows(path)[2:] == [{'step': 6, 'loss': None}]


@pytest.mark.parametrize('kind', ['folder', 'pipe', 'dangling link', 'loop', 'device'])
def test_what_is_no_file_is_put_aside(tmp_path, kind):
    for name in ('metrics.jsonl', 'summary.json'):
        path = tmp_path / name
        make = {
            'folder': path.mkdir,
            'pipe': lambda path=path: os.mkfifo(path),
            'dangling link': lambda path=path: path.symlink_to('nowhere'),
            'loop': lambda path=path: path.symlink_to(path),
            'device': lambda path=path: path.symlink_to('/dev/zero'),
        }
        make[kind]()
    assert 'is damaged: it is now summary.json.damaged' in put_aside_if_no_json(path)
    rows = Rows(tmp_path / 'metrics.jsonl')
    assert '0 of its rows' in rows.keep(3)
    rows.append({'step': 4})
    assert read_rows(rows.path) == [{'step': 4}]
    (tmp_path / 'summary.json').mkdir()
    assert 'summary.json.damaged-2' in put_aside_if_no_json(tmp_path / 'summary.json')


@pytest.mark.parametrize(
    ('content', 'sound'),
    [(b'{}', True), (b'', False), (b'[1]', False), (b'\xff', False), (b'[' * 99_999, False)],
)
def test_a_file_that_holds_no_object_is_put_aside(tmp_path, content, sound):
    path = tmp_path / 'config.json'
    path.write_bytes(content)
    assert (put_aside_if_no_json(path) is None) == sound
    assert path.exists() == sound


def test_a_row_that_does_not_fit_leaves_the_rows_before_it(tmp_path):
    """The file may grow to 90 bytes, as on a full disk; with room the same row is written."""
    rows = Rows(tmp_path / 'metrics.jsonl')
    rows.keep(0)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    row = {'step': 1, 'loss': 0.123456789}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (90, limits[1]))
        with pytest.raises(OSError, match='metrics') as caught:
            for _ in range(9):
                rows.append(row)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert read_rows(rows.path) == [row] * 2
    assert rows.path.read_bytes().endswith(b'}\n')
    rows.append(row)
    assert read_rows(rows.path) == [row] * 3


def test_a_file_that_is_gone_is_not_made_anew(tmp_path):
    rows = Rows(tmp_path / 'metrics.jsonl')
    rows.keep(0)
    rows.path.unlink()
    with pytest.raises(FileNotFoundError):
        rows.append({'step': 1})
    assert not rows.path.exists()


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    left = [
        '.metrics.jsonl.0a1b2c3d',
        '.listing-0123456789abcdef.json.00000000',
        '.map.png.12345678',
    ]
    others = ['.notes.txt.0a1b2c3d', 'metrics.jsonl', '.metrics.jsonl.swp', '.hidden']
    for name in (*left, *others):
        (tmp_path / name).write_text('x')
    files.remove_leftovers(tmp_path, _OWN)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_an_error_names_the_file_that_was_to_be_written(tmp_path):
    for path in (tmp_path / 'none' / 'x.json', tmp_path / 'folder'):
        (tmp_path / 'folder').mkdir(exist_ok=True)
        with pytest.raises(OSError) as caught, files.replacing(path) as temporary:
            temporary.write_text('x')
        assert caught.value.filename == str(path) and caught.value.filename2 is None
    long = tmp_path / ('é' * 127)
    with files.replacing(long) as temporary:
        temporary.write_text(json.dumps([]))
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / 'folder', long])
