"""The records in a run's folder, as pages need them: finite numbers and flat settings."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from swav_jax.files import read_regular
from swav_jax.runs.rows import read_rows


def read(path: Path) -> dict[str, Any]:
    """Read a JSON object, such as config.json; empty if there is no such file.

    Raises:
      OSError: it cannot be read.
      ValueError, RecursionError: it is damaged.
    """
    found = json.loads(read_regular(path)) if path.exists() else {}
    if not isinstance(found, dict):
        raise ValueError('it is damaged')
    return found


def rows(path: Path) -> list[dict[str, float]]:
    """The finite numbers of each row of a .jsonl file; a damaged row has none."""
    return [numbers(row) for row in read_rows(path)]


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The values of a row that are numbers and small enough to be drawn."""
    return {
        name: value
        for name, value in row.items()
        if type(value) in (int, float) and abs(value) < 1e100  # false of NaN, too
    }


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """All settings of config.json as JSON, by the names that flags have: config.a.b[0].c."""
    return {name: json.dumps(value) for name, value in _flat('config', config)}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(f'{name}.{key}', part)
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        for index, part in enumerate(value):
            yield from _flat(f'{name}[{index}]', part)
    else:
        yield name, value
