"""The folder of a run."""

import json
import tempfile
from pathlib import Path

import jax
from ml_collections import ConfigDict

from swav_jax import atomic
from swav_jax import config as settings
from swav_jax.errors import UserError


def open_workdir(workdir: str | Path) -> Path:
    """The folder of the run, made if it is missing.

    Raises:
      UserError: it cannot be written.
    """
    path = Path(workdir).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f'--workdir={workdir} cannot be written ({error.strerror}): name another folder'
        ) from error
    return path


def write_config(config: ConfigDict, workdir: Path) -> None:
    """Put the settings into config.json, once whole."""
    if jax.process_index() == 0:
        with atomic.replacing(workdir / 'config.json') as path:
            path.write_text(json.dumps(settings.to_dict(config), indent=2) + '\n')
