"""A folder of results holds one call's files, and the user's own, whatever happens."""

import contextlib
import json

import pytest
from refusals import another_user

from swav_jax.errors import UserError
from swav_jax.evaluate import outputs

PATTERN = r'part_\d+\.txt|all\.csv'


def write(out, **files):
    with outputs.replacing(out, 'kind', PATTERN) as folder:
        for name, text in files.items():
            (folder / name.replace('__', '.')).write_text(text)


def files(out):
    return {path.name: path.read_text() for path in out.iterdir() if path.name != 'kind.json'}


def test_a_call_replaces_what_an_earlier_one_wrote_and_nothing_else(tmp_path):
    own = {'part_notes.txt': 'mine', 'part_1.txt.bak': 'mine', '.hidden': 'mine'}
    for name, text in own.items():
        (tmp_path / name).write_text(text)
    write(tmp_path, part_1__txt='1', part_2__txt='1', all__csv='1')
    write(tmp_path, part_2__txt='2', part_3__txt='2')
    assert files(tmp_path) == own | {'part_2.txt': '2', 'part_3.txt': '2'}
    with pytest.raises(ZeroDivisionError), outputs.replacing(tmp_path, 'kind', PATTERN) as folder:
        (folder / 'part_9.txt').write_text('3')
        raise ZeroDivisionError
    assert files(tmp_path) == own | {'part_2.txt': '2', 'part_3.txt': '2'}, 'a failed call'


def test_a_call_that_is_killed_while_it_replaces_leaves_no_mix(tmp_path, monkeypatch):
    write(tmp_path, part_1__txt='1', part_2__txt='1')
    path = type(tmp_path)
    replace, moved = path.replace, []

    def replace_one(self, target):
        if self.name.startswith('part_') and moved:
            raise KeyboardInterrupt
        moved.append(self.name) if self.name.startswith('part_') else None
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(path, 'replace', replace_one)
        write(tmp_path, part_2__txt='2', part_3__txt='2', part_4__txt='2')
    assert set(files(tmp_path).values()) == {'2'}
    write(tmp_path, all__csv='3')
    assert files(tmp_path) == {'all.csv': '3'}


@pytest.mark.parametrize('name', ['part_7.txt', 'all.csv', 'kind.json'])
@pytest.mark.parametrize('text', ['mine', '{"files": 5}', '{"files": ["../part_7.txt", "x"]}'])
def test_files_that_no_call_wrote_are_not_replaced(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    if name == 'kind.json' and text.startswith('{"files": ['):
        (tmp_path.parent / 'part_7.txt').write_text('outside')
        write(tmp_path, part_1__txt='1')  # a record that was tampered with leads nowhere
        assert (tmp_path.parent / 'part_7.txt').read_text() == 'outside'
        assert json.loads((tmp_path / 'kind.json').read_text()) == {'files': ['part_1.txt']}
        return
    with pytest.raises(UserError, match=f'holds {name}, which no earlier call'):
        write(tmp_path, part_1__txt='1')
    assert (tmp_path / name).read_text() == text


def test_only_names_that_this_call_may_write_are_refused(tmp_path):
    (tmp_path / 'part_9.txt').write_text('mine')
    for below in (9, 10):
        with pytest.raises(UserError) if below > 9 else contextlib.nullcontext():
            outputs.check(tmp_path, 'kind', PATTERN, below=below)
    with outputs.replacing(tmp_path, 'kind', PATTERN, below=9) as folder:
        (folder / 'part_8.txt').write_text('ours')
    assert files(tmp_path) == {'part_9.txt': 'mine', 'part_8.txt': 'ours'}


def test_two_calls_do_not_write_to_one_folder(tmp_path):
    with (
        outputs.replacing(tmp_path, 'kind', PATTERN),
        pytest.raises(UserError, match='is being written by another call'),
    ):
        write(tmp_path, part_1__txt='1')
    write(tmp_path, part_1__txt='1')


def test_what_out_may_name(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'folder.npy').mkdir()
    for name in ('feat.npy', 'result.JSON', 'x.csv', 'file', '/'):
        with pytest.raises(UserError, match='--out=') as caught:
            outputs.folder(name if name == '/' else tmp_path / name)
        assert '\n' not in str(caught.value)
    for name in ('folder.npy', 'new.npz/'):
        with pytest.raises(UserError, match=f'--out=.*{name} is a folder: name a file'):
            outputs.file(f'{tmp_path}/{name}')
    assert outputs.folder('~/exp.1/[a]$_é') == tmp_path / 'exp.1' / '[a]$_é'
    assert outputs.folder(tmp_path / 'folder.npy') == tmp_path / 'folder.npy'
    assert outputs.file('~/new/x.npz') == tmp_path / 'new' / 'x.npz'
    assert (tmp_path / 'new').is_dir()


@pytest.mark.parametrize(
    ('out', 'reason'),
    [
        ('{here}/file/below', 'Not a directory'),
        ('{here}/closed', 'Permission denied: allow it, or name another place'),
        ('{here}/closed/new', 'Permission denied: allow it, or name another place'),
        ('/proc/x', ''),
        ('~nosuchuser/x', 'no such home folder'),
        ('a' * 300, 'File name too long'),
    ],
)
def test_what_the_system_refuses_names_the_flag(tmp_path, out, reason):
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'closed').mkdir(mode=0o500)
    out = out.format(here=tmp_path)
    with another_user(tmp_path):
        for name, function in ((out, outputs.folder), (f'{out}/x.npz', outputs.file)):
            with pytest.raises(UserError) as refused:
                function(name)
            line = str(refused.value)
            assert line.startswith(f'--out={name}: ') and reason in line
