"""What must stay the same when a run goes on."""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax.errors import UserError

# A change here gives the arrays of a state another meaning (model, optimizer and its schedule, what
# lies in the queue), or makes step n read other images (order, crops). Free are how the loss is
# computed, distortions, precision, length, logging, checkpoints and evaluation. The batch of a
# device is free as long as that of all devices stays.
FIXED = (
    'global_batch', 'seed', 'data', 'model', 'optimizer', 'loss.crops_for_assign', 'loss.queue',
    'loss.normalize_last_layer', 'train.per_crop_pass',
)  # fmt: skip
FREE = ('data.batchsize_per_replica', 'data.max_bad_fraction', 'model.remat')


def check_config(config: ConfigDict, global_batch: int, saved: Mapping[str, Any]) -> None:
    """Refuse to go on with settings that do not fit what was learned with others.

    Args:
      config: this run's settings.
      global_batch: its images a step.
      saved: a checkpoint's metadata.

    Raises:
      UserError: it names each setting that differs, with its old and its new value.
    """
    new = dict(_flat(settings.to_dict(config) | {'global_batch': global_batch}))
    old = dict(_flat(saved['config'] | {'global_batch': saved['global_batch']}))
    changed = [
        f'{"" if name == "global_batch" else "config."}{name} {old[name]!r} → {new[name]!r}'
        for name in new
        if name in old and old[name] != new[name] and _is(name, FIXED) and not _is(name, FREE)
    ]
    if changed:
        raise UserError(
            f'the run in this --workdir was made with other settings ({", ".join(changed)}): take '
            'them back, name another --workdir, or go on all the same with --force'
        )


def _is(name: str, of: tuple[str, ...]) -> bool:
    return any(name == path or name.startswith(f'{path}.') for path in of)


def _flat(values: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', value
