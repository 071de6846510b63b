"""What every setting may be: its type is that of its default, its range is listed here.

The upper ends are no recommendations. They lie far above what was ever trained, and below what no
machine could hold or count, so that a slip of the keyboard is a line and not hours of waiting.
"""

import difflib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from swav_jax.config.schedule_checks import check_schedule, value_of
from swav_jax.errors import UserError, refusal
from swav_jax.terminal import printable

SCHEDULES = 'optimizer.param_schedulers.lr'  # checked by its kind, not by its default
MOST_STEPS = 2**31 - 1  # steps are counted in int32
MOST_CROPS = 100  # of an image
MOST_HEADS = 16  # of prototypes, and layers of the projection
WIDEST = 65_536  # channels or features
MOST_BATCH_BYTES = 64e9  # of canvases, or of crops, on one device


class Range(NamedTuple):
    """Which numbers a setting may be, both ends included, and how a line says it."""

    least: float
    most: float
    words: str

    def holds(self, x: float) -> bool:
        """Whether a number is in it."""
        return self.least <= x <= self.most


def _count(least: int, most: int) -> Range:
    return Range(least, most, f'{least} or more and at most {most:,}')


def _positive(least: float, most: float) -> Range:
    return Range(least, most, f'a number above 0, from {least:g} to {most:g}')


def _at_least_0(most: float) -> Range:
    return Range(0, most, f'a number of 0 or more, at most {most:g}')


_SHARE = Range(0, 1, 'from 0 to 1')
_STEPS = _count(0, MOST_STEPS)

RANGES = {
    # jax.random.key takes 32 bits of a seed and would make the same weights of 0 and 2**32.
    'seed': _count(0, 2**32 - 1),
    'data.limit': _count(0, MOST_STEPS),
    'data.batchsize_per_replica': _count(1, 65_536),
    'data.canvas_size': _count(1, 8192),
    'data.channels': _count(1, 1024),
    'data.max_bad_fraction': _SHARE,
    'augment.flip_p': _SHARE,
    'augment.brightness': _at_least_0(100),
    'augment.contrast': _at_least_0(100),
    'augment.saturation': _at_least_0(100),
    'augment.hue': Range(0, 0.5, 'from 0 to 0.5'),
    'augment.color_jitter_p': _SHARE,
    'augment.grayscale_p': _SHARE,
    'augment.blur_p': _SHARE,
    'augment.blur_radius_min': _positive(1e-3, 100),
    'augment.blur_radius_max': _positive(1e-3, 100),
    'model.trunk.depth': _count(1, 256),
    'model.trunk.width_multiplier': Range(0, 16, 'a positive number, at most 16'),
    'model.trunk.groups': _count(1, WIDEST),
    'model.trunk.width_per_group': _count(1, WIDEST),
    'model.trunk.layer4_stride': Range(1, 2, 'one of 1, 2'),
    'model.trunk.w_0': _count(0, WIDEST),
    'model.trunk.w_a': _at_least_0(WIDEST),
    'model.trunk.w_m': _at_least_0(1000),
    'model.trunk.group_width': _count(0, WIDEST),
    'model.trunk.se_ratio': _at_least_0(16),
    'model.sync_bn.group_size': Range(-1, 2**20, 'a divisor of the devices, 0 or -1'),
    'loss.temperature': _positive(1e-4, 1e4),
    'loss.num_iters': _count(1, 1000),
    'loss.epsilon': _positive(1e-4, 1e4),
    'loss.temp_hard_assignment_iters': _STEPS,
    'loss.shk_powerlaw': _at_least_0(100),
    'loss.queue.queue_length': _count(0, 10_000_000),
    'loss.queue.start_iter': _STEPS,
    'optimizer.larc_config.trust_coefficient': _positive(1e-9, 1e6),
    'optimizer.larc_config.eps': _at_least_0(1),
    'optimizer.weight_decay': _at_least_0(1000),
    'optimizer.momentum': Range(0, math.nextafter(1, 0), 'from 0 to below 1'),
    'optimizer.num_epochs': _count(1, 1_000_000),
    'train.max_steps': _STEPS,
    'train.log_every_steps': _count(1, MOST_STEPS),
    'train.max_nan_skips': _STEPS,
    'train.collapse_patience': _count(1, MOST_STEPS),
    'checkpoint.every_epochs': _count(0, 1_000_000),
    'checkpoint.every_steps': _STEPS,
    'checkpoint.every_minutes': _at_least_0(1e6),
    'checkpoint.keep': _count(1, 1_000_000),
    'checkpoint.keep_every_epochs': _count(0, 1_000_000),
    'evaluate.every_epochs': _count(0, 1_000_000),
    'evaluate.k': _count(1, 100_000),
    'evaluate.temperature': _positive(1e-3, 1e4),
    'evaluate.size': _count(1, 4096),
    'evaluate.resize': _count(1, 8192),
    'evaluate.batch_size': _count(1, 65_536),
}

CHOICES = {
    'precision': ('float32', 'bfloat16', 'float16', 'float64'),
    'sharding': ('replicated', 'zero'),
    'model.remat': ('none', 'block', 'stage'),
    'optimizer.name': ('sgd', 'lars'),
    'train.on_nan': ('stop', 'skip'),
    'train.on_collapse': ('warn', 'stop'),
}


def check(config: Any, default: ConfigDict) -> None:
    """Check every setting that can be checked without images, devices and networks.

    Args:
      config: what should be a ConfigDict with the names and types of `default`.
      default: the settings with their defaults.

    Raises:
      UserError: naming the first setting that cannot work, its value and what is allowed.
    """
    values = dict(_walk(config, default, 'config'))
    for path, allowed in RANGES.items():
        _need(values, path, allowed.holds, allowed.words)
    for path, words in CHOICES.items():
        _need(values, path, words.__contains__, f'one of {", ".join(words)}')
    _check_crops(values)
    _check_memory(values)
    _check_normalisation(values)
    _check_model(values)
    _need(
        values,
        'augment.blur_radius_min',
        lambda x: x <= values['augment.blur_radius_max'],
        f'at most config.augment.blur_radius_max={values["augment.blur_radius_max"]}',
    )
    resize = values['evaluate.resize']
    _need(
        values,
        'evaluate.size',
        lambda x: x <= resize,
        f'at most config.evaluate.resize={resize}: a crop lies inside of its image',
    )
    check_schedule(values[SCHEDULES], f'config.{SCHEDULES}')


# Types


def _walk(section: Any, default: ConfigDict, name: str) -> Iterator[tuple[str, Any]]:
    """Every setting below a section, by its path without 'config.'; its type is checked."""
    if not isinstance(section, ConfigDict):
        settings = ', '.join(default)
        raise refusal(name, section, f'a section (ConfigDict) with {settings}')
    for key in section:
        if key not in default:
            near = difflib.get_close_matches(str(key), list(default), n=1, cutoff=0)[0]
            raise UserError(f'{name}.{printable(key)} is not a setting: {near} is, for one')
    for key, like in default.items():
        path = f'{name}.{key}'
        if key not in section:
            raise UserError(
                f'{path} is missing: start from swav_jax.config.default(), which has it'
            )
        value = value_of(section, key, name)
        if path == f'config.{SCHEDULES}':
            yield SCHEDULES, value
        elif isinstance(like, ConfigDict):
            yield from _walk(value, like, path)
        else:
            if not _is_like(value, like):
                raise refusal(path, value, _described(like))
            yield path.removeprefix('config.'), _plain(value)


def _is_like(value: Any, like: Any) -> bool:
    """Whether a value has the type of a default, its parts those of the default's parts."""
    if isinstance(like, tuple):
        if not isinstance(value, (tuple, list)):
            return False
        if _is_record(like):
            return len(value) == len(like) and all(map(_is_like, value, like))
        return all(_is_like(part, like[0]) for part in value)
    if isinstance(like, str):
        return isinstance(value, str) and '\0' not in value
    if isinstance(like, bool) or isinstance(value, bool):
        return isinstance(like, bool) and isinstance(value, bool)
    kinds = int if isinstance(like, int) else (int, float)
    return isinstance(value, kinds) and -1e308 < value < 1e308


def _is_record(like: tuple) -> bool:
    """Whether the parts of a tuple differ in type, and so have their places."""
    return len(set(map(type, like))) > 1


def _described(like: Any) -> str:
    if isinstance(like, tuple):
        leaf = like[0]
        while isinstance(leaf, tuple) and not _is_record(leaf):
            leaf = leaf[0]
        each = {int: 'whole numbers', float: 'finite numbers'}.get(type(leaf), 'pairs')
        return f'{each} in a tuple, as {like!r}'
    return {
        bool: 'True or False',
        int: 'a whole number',
        float: 'a finite number',
        str: 'a string without zero bytes',
    }[type(like)]


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value


# Settings that go together


def _check_crops(values: dict[str, Any]) -> None:
    counts = values['data.num_crops']
    groups, total = len(counts), sum(counts)
    per_group = f'{groups} {{}}, one per group of crops (config.data.num_crops={counts})'
    _need(
        values,
        'data.num_crops',
        lambda x: x and min(x) >= 1 and total <= MOST_CROPS,
        f'at least one number above 0, together at most {MOST_CROPS}',
    )
    _need(
        values,
        'data.size_crops',
        lambda x: len(x) == groups and min(x) >= 1 and max(x) <= 4096,
        per_group.format('numbers from 1 to 4,096'),
    )
    _need(
        values,
        'data.crop_scales',
        lambda x: len(x) == groups and all(len(s) == 2 and 1e-6 <= s[0] <= s[1] <= 1 for s in x),
        per_group.format(
            'pairs (least, most) of shares of the area, above 0 (1e-06) and at most 1'
        ),
    )
    if total < 2:
        raise UserError(
            f'config.data.num_crops={counts} makes one crop: SwAV predicts codes of a crop from '
            'another one, use at least 2'
        )
    _need(
        values,
        'loss.crops_for_assign',
        lambda x: x and len(set(x)) == len(x) and min(x) >= 0 and max(x) < total,
        f'different indices of the {total} crops, from 0 to {total - 1}, at least one',
    )


def _check_memory(values: dict[str, Any]) -> None:
    rows, channels = values['data.batchsize_per_replica'], values['data.channels']
    crops = zip(values['data.num_crops'], values['data.size_crops'], strict=True)
    for each, what in (
        (values['data.canvas_size'] ** 2, f'canvas_size={values["data.canvas_size"]}'),
        (4 * sum(n * size**2 for n, size in crops), f'size_crops={values["data.size_crops"]}'),
    ):
        needed = rows * channels * each
        if needed > MOST_BATCH_BYTES:
            raise UserError(
                f'config.data.batchsize_per_replica={rows} with config.data.{what} and '
                f'config.data.channels={channels} takes {needed / 1e9:,.0f} GB of one device for '
                f'the pixels alone: lower them to less than {MOST_BATCH_BYTES / 1e9:.0f} GB'
            )


def _check_normalisation(values: dict[str, Any]) -> None:
    channels = values['data.channels']
    count = f'{channels} numbers, one per channel (config.data.channels={channels})'
    _need(
        values,
        'data.mean',
        lambda x: len(x) == channels and max(map(abs, x)) <= 1000,
        f'{count}, from -1000 to 1000',
    )
    _need(
        values,
        'data.std',
        lambda x: len(x) == channels and min(x) >= 1e-30 and max(x) <= 1000,
        f'{count}, above 0 (1e-30) and at most 1000',
    )


def _check_model(values: dict[str, Any]) -> None:
    _need(
        values,
        'model.head.num_clusters',
        lambda x: 0 < len(x) <= MOST_HEADS and min(x) > 1 and max(x) <= 1_000_000,
        f'one number above 1 per head, at most 1,000,000, and at most {MOST_HEADS} heads',
    )
    _need(
        values,
        'model.head.dims',
        lambda x: (
            2 <= len(x) <= MOST_HEADS + 1 and x[0] >= 0 and min(x[1:]) >= 1 and max(x) <= WIDEST
        ),
        "at least two widths, the trunk's (or 0 to have it inferred) and, each from 1 to "
        f'{WIDEST:,}, those of at most {MOST_HEADS} layers',
    )
    frozen = values['model.temp_frozen_params_iter_map']
    _need(
        values,
        'model.temp_frozen_params_iter_map',
        lambda x: (
            all(name and 0 <= n <= MOST_STEPS for name, n in x) and len(dict(x)) == len(frozen)
        ),
        f'pairs of a name and a number of steps, 0 or more and at most {MOST_STEPS:,}, each name '
        'once',
    )


def _need(values: dict[str, Any], path: str, holds: Callable[[Any], Any], allowed: str) -> None:
    if not holds(values[path]):
        raise refusal(f'config.{path}', values[path], allowed)
