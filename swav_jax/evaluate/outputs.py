"""Folders of results: a call replaces what an earlier one wrote, and touches nothing else.

The names of the files that a call wrote are recorded beside them, in KIND.json.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from swav_jax import files
from swav_jax.errors import UserError, os_error_line, printable

# Endings of names that are meant as files.
_FILES = (
    '.npy .npz .csv .tsv .json .jsonl .txt .html .png .pkl .pt .pth .safetensors .h5 .hdf5 .zip'
)


def folder(out: str | Path) -> Path:
    """The folder that --out names, created if it is missing.

    Raises:
      UserError: it is a file, has the name of one, is /, or cannot be written to.
    """
    with _refused(out):
        path = Path(out).expanduser().absolute()
        if path.suffix.lower() in _FILES.split() and not path.is_dir():
            raise UserError(
                f'--out={printable(out)} is named as a file ({path.suffix}), but becomes a folder: '
                'name one without such an ending'
            )
        if path == path.parent or (path.exists() and not path.is_dir()):
            raise UserError(f'--out={printable(out)} is not a folder for results: name another')
        _try_to_write(path)
    return path


def file(out: str | Path) -> Path:
    """The file that --out names, in a folder that is created if it is missing.

    Raises:
      UserError: it is a folder, or cannot be written.
    """
    with _refused(out):
        path = Path(out).expanduser().absolute()
        if path.is_dir() or str(out).endswith(os.sep):
            raise UserError(f'--out={printable(out)} is a folder: name a file')
        _try_to_write(path.parent)
    return path


@contextlib.contextmanager
def _refused(out: str | Path) -> Iterator[None]:
    """Report what the system refuses as a mistake in --out."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: no such home folder
        if isinstance(error, OSError):
            error.filename = error.filename2 = None
        reason = os_error_line(error) if isinstance(error, OSError) else 'no such home folder'
        raise UserError(f'--out={printable(out)}: {reason}') from error


def _try_to_write(folder: Path) -> None:
    """Create a folder, and fail now rather than when all is computed."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check(out: Path, kind: str, pattern: str, below: float = math.inf) -> set[str]:
    """Names of the files in `out` that earlier calls wrote; see `replacing` for the arguments.

    Raises:
      UserError: other files have names that a call may write.
    """
    record = out / f'{kind}.json'
    written = set()
    if record.exists():
        with contextlib.suppress(ValueError):
            found = json.loads(record.read_bytes())
            if isinstance(found, dict) and isinstance(found.get('files'), list):
                # An edited record must not lead out of the folder.
                written = {str(n) for n in found['files'] if re.fullmatch(pattern, str(n))}
                written.add(record.name)
    mine = re.compile(f'{pattern}|{re.escape(record.name)}')
    here = {path.name for path in out.iterdir()} if out.is_dir() else set()
    others = [name for name in here - written if mine.fullmatch(name)]
    others = [name for name in others if all(int(n) < below for n in re.findall(r'\d+', name))]
    if other := sorted(others):
        raise UserError(
            f'--out={printable(out)} holds {other[0]}, which no earlier call of this version '
            'wrote, and which would be replaced: name another folder, or move that file away'
        )
    return written - {record.name}


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock a folder against other calls.

    Raises:
      UserError: another call has locked it.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks
            handle = os.open(out, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f'--out={printable(out)} is being written by another call: wait for it, or '
                    'name another folder'
                ) from error
        yield


@contextlib.contextmanager
def replacing(out: Path, kind: str, pattern: str, below: float = math.inf) -> Iterator[Path]:
    """Yield an empty folder; its files then replace those that earlier calls wrote to `out`.

    The earlier files stay until the block ends without an error. If the process is killed while
    they are replaced, `out` holds a part of the new files, but never files of two calls.

    Args:
      out: the folder.
      kind: what the files are, for the name of the record.
      pattern: regular expression of all names that calls of this kind may write.
      below: bound on numbers in the names that this call may write.

    Raises:
      UserError: `out` holds a file with one of these names that no call wrote.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        old = check(out, kind, pattern, below)
        temporary = Path(tempfile.mkdtemp(prefix=f'.{kind}.', dir=out))
        try:
            yield temporary
            new = {path.name for path in temporary.iterdir()}
            _record(out, kind, old | new)  # in case this call is killed
            for name in old:
                (out / name).unlink(missing_ok=True)
            for name in new:
                (temporary / name).replace(out / name)
            _record(out, kind, new)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _record(out: Path, kind: str, names: set[str]) -> None:
    text = json.dumps({'files': sorted(names)}, indent=2) + '\n'
    with files.replacing(out / f'{kind}.json') as path:
        path.write_text(text, encoding='utf-8')
