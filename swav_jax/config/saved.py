"""The settings that a run has saved in its folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax.config import trunks
from swav_jax.config.file import tuples
from swav_jax.errors import UserError, printable


def check_folder(workdir: Path) -> None:
    """Refuse a folder that is not that of a run.

    Raises:
      UserError: it holds no checkpoints.
    """
    if not (workdir / 'checkpoints').is_dir():
        raise UserError(
            f'--workdir={printable(workdir)} holds no checkpoints: name the folder of a run'
        )


def read(workdir: Path) -> ConfigDict | None:
    """The settings in a run's config.json, or None if they cannot be read.

    They serve to find mistakes early. The settings that belong to weights are in the checkpoint.
    """
    path = workdir / 'config.json'
    try:
        return restore(json.loads(path.read_bytes())) if path.is_file() else None
    except (OSError, ValueError, RecursionError, UserError):
        return None


def restore(saved: Mapping[str, Any]) -> ConfigDict:
    """Undo `config.to_dict`; settings that are not in `saved` get their defaults.

    Raises:
      UserError: they are those of another version.
    """
    config = settings.default()
    try:
        with config.unlocked():
            if 'trunk' in saved.get('model', {}):
                config.model.trunk = trunks.adopt(saved['model']['trunk'])
                saved = saved | {'model': saved['model'] | {'trunk': config.model.trunk}}
            known = {name for name, _ in settings.flatten(config)}
            schedulers = saved.get('optimizer', {}).get('param_schedulers', {})
            for name, schedule in config.optimizer.param_schedulers.items():
                if schedulers.get(name, schedule)['name'] != schedule.name:
                    del config.optimizer.param_schedulers[name]  # another kind has other parts
            config.update(tuples(saved))
        for name, _ in settings.flatten(config):
            if name not in known and not name.startswith('config.optimizer.param_schedulers.'):
                raise ValueError(f'{name} is not known')
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = printable(str(error).partition('\n')[0])
        raise UserError(
            f'the settings are not those of this version of swav_jax ({reason}): use the version '
            'that made them'
        ) from error
    return config
