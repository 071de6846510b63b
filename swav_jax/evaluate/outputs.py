"""Folders of results: a call replaces what an earlier one wrote, and touches nothing else.

What a call wrote is recorded beside it, in KIND.json.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from swav_jax import atomic
from swav_jax.errors import UserError
from swav_jax.terminal import printable

# Endings of names that are meant as files.
_FILES = (
    '.npy .npz .csv .tsv .json .jsonl .txt .html .png .pkl .pt .pth .safetensors .h5 .hdf5 .zip'
)


def folder(out: str | Path) -> Path:
    """The folder that --out names, made if it is missing.

    Raises:
      UserError: it is a file, or named like one, or the root of the file system.
    """
    path = Path(out).expanduser().absolute()
    if path.suffix.lower() in _FILES.split() and not path.is_dir():
        raise UserError(
            f'--out={printable(out)} is named as a file ({path.suffix}), but becomes a folder: '
            'name one without such an ending'
        )
    if path == path.parent or (path.exists() and not path.is_dir()):
        raise UserError(f'--out={printable(out)} is no folder for results: name another')
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):  # fails now and not when all is computed
        pass
    return path


def file(out: str | Path) -> Path:
    """The file that --out names, in a folder that is made if it is missing.

    Raises:
      UserError: it is a folder.
    """
    path = Path(out).expanduser().absolute()
    if path.is_dir():
        raise UserError(f'--out={printable(out)} is a folder: name a file')
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):  # fails now and not when all is computed
        pass
    return path


def check(out: Path, kind: str, pattern: str) -> set[str]:
    """Names of the files in `out` that earlier calls wrote.

    Raises:
      UserError: others have names of such files.
    """
    record = out / f'{kind}.json'
    written = set()
    if record.exists():
        with contextlib.suppress(ValueError):
            found = json.loads(record.read_bytes())
            if isinstance(found, dict) and isinstance(found.get('files'), list):
                # A name in a record that was tampered with must not lead out of the folder.
                written = {str(n) for n in found['files'] if re.fullmatch(pattern, str(n))}
                written.add(record.name)
    mine = re.compile(f'{pattern}|{re.escape(record.name)}')
    here = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if other := sorted(name for name in here - written if mine.fullmatch(name)):
        raise UserError(
            f'{printable(out)} holds {other[0]}, which no earlier call of this version wrote, and '
            'which would be replaced: name another folder, or move that file away'
        )
    return written - {record.name}


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other calls from writing to a folder, as long as this one lives.

    Raises:
      UserError: another one does.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks
            handle = os.open(out, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f'{printable(out)} is being written by another call: wait for it, or name '
                    'another folder'
                ) from error
        yield


@contextlib.contextmanager
def replacing(out: Path, kind: str, pattern: str) -> Iterator[Path]:
    """An empty folder; the files written there replace those that earlier calls wrote to `out`.

    Until the block ends well the earlier files stay. Stopped in the middle of replacing them, `out`
    holds a part of the new files, but never files of two calls.

    Args:
      out: the folder.
      kind: what the files are, for the name of the record.
      pattern: regular expression of all names that such a call may write.

    Raises:
      UserError: `out` holds files of such names that no call wrote.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        old = check(out, kind, pattern)
        temporary = Path(tempfile.mkdtemp(prefix=f'.{kind}.', dir=out))
        try:
            yield temporary
            new = {path.name for path in temporary.iterdir()}
            _record(out, kind, old | new)  # so that what a killed call leaves is known, too
            for name in old:
                (out / name).unlink(missing_ok=True)
            for name in new:
                (temporary / name).replace(out / name)
            _record(out, kind, new)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _record(out: Path, kind: str, names: set[str]) -> None:
    text = json.dumps({'files': sorted(names)}, indent=2) + '\n'
    with atomic.replacing(out / f'{kind}.json') as path:
        path.write_text(text, encoding='utf-8')
