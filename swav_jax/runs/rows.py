"""Files of JSON objects, one per line, that grow during a run: metrics.jsonl, events.jsonl."""

import contextlib
import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from swav_jax import files

_BEGINNING = b'{"step": '
_LONGEST_LINE = 2**20  # bytes; the rows have some hundred


class Rows:
    """A file of rows.

    It is opened by its name for every row, so that a run notices when its folder was moved or
    deleted, instead of writing where nobody reads.

    Args:
      path: the file; `keep` makes it.
    """

    def __init__(self, path: Path):
        self.path = path

    def keep(self, last: int, columns: Collection[str] = ()) -> str | None:
        """Keep the sound rows of steps up to `last`, no row if it is 0; make the file if needed.

        A file with anything else than rows is renamed before.

        Args:
          last: the last step to keep.
          columns: what each row must have.

        Returns:
          A line about the damaged file, or None.

        Raises:
          OSError: the file cannot be read or written.
        """
        rows, sound = [], not os.path.lexists(self.path)
        if self.path.is_file():
            rows, sound = _read(self.path, frozenset(columns))
        kept = [row for row in rows if last and row['step'] <= last]
        aside = None
        with files.replacing(self.path) as temporary:
            temporary.write_text(''.join(json.dumps(row) + '\n' for row in kept))
            if not sound:
                aside = _put_aside(self.path)
        return aside and (
            f'{self.path.name} is damaged: it is now {aside.name}; {len(kept)} of its rows are kept'
        )

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row as one line; numbers that are not finite become null, since JSON has no NaN.

        Raises:
          OSError: it cannot be written; the file then ends with the row before.
        """
        finite = {key: x if math.isfinite(x) else None for key, x in row.items()}
        line = json.dumps(finite).encode() + b'\n'
        # Without O_CREAT: a file that was moved or deleted is not made again.
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK)
        try:
            before = os.fstat(file).st_size
            if before and os.pread(file, 1, before - 1) != b'\n':
                line = b'\n' + line
            try:
                while line:
                    line = line[os.write(file, line) :]
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(file, before)
                error.filename = str(self.path)
                raise
        finally:
            os.close(file)


def read_rows(path: Path, columns: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return the rows of a file: objects of numbers with a whole `step`, and with `columns`.

    Other lines are skipped: those that a killed process left unfinished, or that are damaged.
    """
    return _read(path, frozenset(columns))[0] if path.is_file() else []


def put_aside_if_no_json(path: Path) -> str | None:
    """Rename a file that should hold a JSON object and does not.

    Returns:
      A line that says so, or None.
    """
    if not os.path.lexists(path):
        return None
    with contextlib.suppress(ValueError, RecursionError):
        if path.is_file() and isinstance(json.loads(path.read_bytes()), dict):
            return None
    return f'{path.name} is damaged: it is now {_put_aside(path).name}'


def _put_aside(path: Path) -> Path:
    number = 1
    while True:
        aside = path.with_name(f'{path.name}.damaged' + (f'-{number}' if number > 1 else ''))
        if not os.path.lexists(aside):
            return path.rename(aside)
        number += 1


def _read(path: Path, columns: frozenset[str]) -> tuple[list[dict[str, Any]], bool]:
    """Return the sound rows, and whether all lines except an unfinished last one are sound."""
    rows, sound = [], True
    with path.open('rb') as file:
        while line := file.readline(_LONGEST_LINE):
            row = _parse(line)
            if row is not None and columns <= row.keys():
                rows.append(row)
            elif not _is_unfinished(line):
                sound = False
    return rows, sound


def _is_unfinished(line: bytes) -> bool:
    """Whether a line is the beginning of a row, left by a killed process."""
    begins = line[: len(_BEGINNING)] == _BEGINNING[: len(line)]
    return begins and len(line) < _LONGEST_LINE and not line.endswith(b'\n')


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(x is None or _is_number(x) for x in row.values()):
        return None
    step = row.get('step')
    return row if type(step) is int and step >= 0 else None


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and abs(x) < 1e300
