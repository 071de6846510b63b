"""The settings of a run: their defaults, the checks on them, and the numbers that follow from them.

A config file calls `default()`, changes what its recipe changes, and returns it.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from swav_jax.config import trunks
from swav_jax.config.schedules import warmup_cosine
from swav_jax.config.settings import MOST_PROTOTYPES_PER_IMAGE, MOST_STEPS, SETTINGS
from swav_jax.config.validation import validate
from swav_jax.errors import UserError

__all__ = ['Sizes', 'about', 'default', 'flatten', 'sizes', 'to_dict', 'validate', 'warmup_cosine']


def default() -> ConfigDict:
    """VISSL's SwAV recipe for ResNet-50 at 400 epochs; every config starts from it."""
    config = ConfigDict()
    for path, setting in SETTINGS.items():
        *above, name = path.split('.')
        section = config
        for part in above:
            if part not in section:
                section[part] = ConfigDict()
            section = section[part]
        section[name] = copy.deepcopy(setting.default)
    return config.lock()  # so that a misspelt name is an error and not a new setting


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The numbers of a run that follow from its settings, its devices and its data."""

    num_images: int
    batch_size: int  # of all replicas together
    steps_per_epoch: int  # whole batches only
    total_steps: int  # of the schedule: all epochs
    last_step: int  # where the run ends: total_steps, or max_steps if that is less

    def most_prototypes(self, queued: int) -> int:
        """How many prototypes the batch and `queued` images can fill."""
        return MOST_PROTOTYPES_PER_IMAGE * (self.batch_size + queued)


def sizes(config: ConfigDict, *, num_images: int, num_devices: int) -> Sizes:
    """The numbers of a run.

    Raises:
      UserError: the data does not fill a batch, or there are more steps than can be counted.
    """
    per_replica, turns = config.data.batchsize_per_replica, config.train.micro_batches
    num_replicas = num_devices * turns
    batch_size = per_replica * num_replicas
    if num_images < batch_size:
        replicas = f'{num_devices} device{"s" * (num_devices > 1)}'
        if turns > 1:
            replicas += f' with config.train.micro_batches={turns}'
        fewer = ', or fewer micro-batches' if turns > 1 else ''
        raise UserError(
            f'config.data.batchsize_per_replica={per_replica} on {replicas} makes a '
            f'batch of {batch_size} images, but {config.data.source!r} has only {num_images}'
            f'{_limit_note(config)}: use at most {max(num_images // num_replicas, 1)}{fewer}'
        )
    steps_per_epoch = num_images // batch_size
    epochs = config.optimizer.num_epochs
    total_steps = steps_per_epoch * epochs
    if total_steps > MOST_STEPS:
        raise UserError(
            f'config.optimizer.num_epochs={epochs} of {steps_per_epoch:,} steps are '
            f'{total_steps:,} steps: use at most {MOST_STEPS // steps_per_epoch:,}, '
            'since steps are counted in int32'
        )
    return Sizes(
        num_images=num_images,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        last_step=min(config.train.max_steps or total_steps, total_steps),
    )


def _limit_note(config: ConfigDict) -> str:
    return f' (config.data.limit={config.data.limit})' if config.data.limit else ''


def to_dict(config: ConfigDict | Sequence | Any) -> Any:
    """The settings as plain dicts, lists and scalars, for JSON."""
    if isinstance(config, ConfigDict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    return config


def flatten(config: ConfigDict, prefix: str = 'config') -> Iterator[tuple[str, object]]:
    """Every setting of a config with its full name, as ('config.loss.epsilon', 0.05)."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f'{prefix}.{key}')
        else:
            yield f'{prefix}.{key}', value


def about(name: str, config: ConfigDict) -> str:
    """What a setting means, by its full name; '' for a part of a schedule."""
    path = name.removeprefix('config.')
    if path in SETTINGS:
        return SETTINGS[path].about
    fields = trunks.fields(config.model.trunk.name) if path.startswith('model.trunk.') else {}
    key = path.rpartition('.')[2]
    return fields[key].metadata['about'] if key in fields else ''
