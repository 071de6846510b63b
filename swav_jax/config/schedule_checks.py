"""What a learning-rate schedule may say: `optim.schedule` computes what passes here.

Words, numbers and the parts that each kind of schedule has, checked without JAX.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from swav_jax.errors import UserError, refusal
from swav_jax.terminal import printable

# The parts of each kind. Beside them the outermost schedule may have COMMON.
KINDS = {
    'constant': ('value',),
    'linear': ('start_value', 'end_value'),
    'cosine': ('start_value', 'end_value'),
    'multistep': ('values', 'milestones', 'num_epochs'),
    'cosine_warm_restart': (
        'start_value',
        'end_value',
        'restart_interval_length',
        'wave_type',
        'is_adaptive',
        'lr_multiplier',
    ),
    'composite': ('schedulers', 'lengths', 'interval_scaling'),
}
COMMON = ('auto_lr_scaling', 'update_interval')
SCALING = ('auto_scale', 'base_value', 'base_lr_batch_size', 'scaling_type')

HIGHEST_RATE = 1e30  # far from what trains, and within float32
MOST_EPOCHS = 1_000_000
SHORTEST_RESTART = 1e-4  # of the run: 10,000 restarts
DEEPEST = 4  # composites within composites

RATES = f'a number from 0 to {HIGHEST_RATE:g}'


def check_schedule(lr: Any, name: str) -> None:
    """Check every part of a schedule.

    Args:
      lr: the schedule, a mapping as `optim.schedule` describes it.
      name: the setting's full name, with which those of its parts begin.

    Raises:
      UserError: naming the first part that is missing, not known, or cannot work.
    """
    _check_kind(lr, name, COMMON, 0)
    if 'update_interval' in lr:
        _one_of(lr, name, 'update_interval', 'step', 'epoch')
    if 'auto_lr_scaling' in lr:
        _check_scaling(lr['auto_lr_scaling'], f'{name}.auto_lr_scaling')
        if lr['auto_lr_scaling']['auto_scale'] and not any(_rates(lr)):
            raise UserError(
                f'{name} names no rate above 0, which could be scaled to {name}.auto_lr_scaling.'
                'base_value: give one, or set auto_scale=False'
            )


def _check_kind(lr: Any, name: str, beside: tuple[str, ...], depth: int) -> None:
    kinds = ', '.join(KINDS)
    if not isinstance(lr, (Mapping, ConfigDict)):
        raise refusal(name, lr, f'a schedule with a name ({kinds}) and its parts')
    if 'name' not in lr:
        raise UserError(f'{name}.name is missing: give one of {kinds}')
    kind = value_of(lr, 'name', name)
    if not (isinstance(kind, str) and kind in KINDS):
        raise refusal(f'{name}.name', kind, f'one of {kinds}: there is no other schedule')
    parts = KINDS[kind]
    whole = f'a {kind!r} schedule has {", ".join(parts)}'
    for part in parts:
        if part not in lr and not (part == 'lr_multiplier' and lr.get('is_adaptive') is True):
            raise UserError(
                f'{name}.{part} is missing: {whole}; set all of them where the config file makes '
                'the schedule'
            )
    for part in lr:
        if part not in ('name', *parts, *beside):
            raise UserError(f'{name}.{printable(part)} is not known here: {whole}; leave it out')
        value_of(lr, part, name)
    _CHECKS.get(kind, _check_rates)(lr, name, depth)


def _check_rates(lr: Any, name: str, depth: int) -> None:
    del depth
    for part in ('value', 'start_value', 'end_value'):
        if part in lr:
            _number(lr, name, part, _is_rate, RATES)


def _check_multistep(lr: Any, name: str, depth: int) -> None:
    del depth
    _number(
        lr,
        name,
        'num_epochs',
        lambda x: _is_whole(x) and 1 <= x <= MOST_EPOCHS,
        f'a whole number of epochs from 1 to {MOST_EPOCHS:,}',
    )
    epochs = lr['num_epochs']
    milestones = _list(lr, name, 'milestones', 'ascending whole numbers of epochs')
    sound = all(_is_whole(x) and 0 < x < epochs for x in milestones)
    if not (sound and all(a < b for a, b in itertools.pairwise(milestones))):
        raise refusal(
            f'{name}.milestones',
            milestones,
            f'ascending whole numbers of epochs, 1 to {epochs - 1:,}',
        )
    values = _list(lr, name, 'values', f'numbers from 0 to {HIGHEST_RATE:g}')
    if len(values) != len(milestones) + 1:
        raise refusal(
            f'{name}.values',
            values,
            f'{len(milestones) + 1} rates, one more than {name}.milestones has epochs',
        )
    for i, value in enumerate(values):
        if not _is_rate(value):
            raise refusal(f'{name}.values[{i}]', value, RATES)


def _check_restarts(lr: Any, name: str, depth: int) -> None:
    _check_rates(lr, name, depth)
    _number(
        lr,
        name,
        'restart_interval_length',
        lambda x: SHORTEST_RESTART <= x <= 1,
        f'a share of the run, from {SHORTEST_RESTART:g} to 1',
    )
    _one_of(lr, name, 'wave_type', 'half', 'full')
    _check_bool(lr, name, 'is_adaptive')
    if 'lr_multiplier' not in lr:
        return
    restarts = math.ceil(1 / lr['restart_interval_length'])
    start = max(lr['start_value'], 1.0)

    def stays_low(x):
        return x > 0 and math.log(start) + restarts * math.log(x) <= math.log(HIGHEST_RATE)

    _number(
        lr,
        name,
        'lr_multiplier',
        stays_low,
        f'a number above 0 that keeps the rate below {HIGHEST_RATE:g} after {restarts:,} restarts',
    )


def _check_composite(lr: Any, name: str, depth: int) -> None:
    if depth >= DEEPEST:
        raise UserError(f'{name} is a composite within {DEEPEST} others: nest fewer')
    pieces = _list(lr, name, 'schedulers', 'schedules, one after the other')
    if not pieces:
        raise refusal(f'{name}.schedulers', pieces, 'schedules, at least one')
    for i, piece in enumerate(pieces):
        _check_kind(piece, f'{name}.schedulers[{i}]', (), depth + 1)
    each = f'one for each of the {len(pieces)} {name}.schedulers'
    lengths = _list(lr, name, 'lengths', f'numbers above 0, {each}')
    scalings = _list(lr, name, 'interval_scaling', f'words, {each}')
    if len(lengths) != len(pieces):
        raise refusal(f'{name}.lengths', lengths, f'numbers above 0, {each}')
    for i, length in enumerate(lengths):
        if not (_is_number(length) and 0 < length <= 1):
            raise refusal(
                f'{name}.lengths[{i}]', length, 'a share of the run, above 0 and at most 1'
            )
    if not math.isclose(sum(lengths), 1.0, abs_tol=1e-6):
        raise UserError(f'{name}.lengths={lengths}: they sum to {sum(lengths):g}, not to 1')
    if len(scalings) != len(pieces):
        raise refusal(f'{name}.interval_scaling', scalings, f"'rescaled' or 'fixed', {each}")
    for i, word in enumerate(scalings):
        if not (isinstance(word, str) and word in ('rescaled', 'fixed')):
            raise refusal(f'{name}.interval_scaling[{i}]', word, 'one of rescaled, fixed')


_CHECKS: dict[str, Callable[[Any, str, int], None]] = {
    'multistep': _check_multistep,
    'cosine_warm_restart': _check_restarts,
    'composite': _check_composite,
}


def _check_scaling(scaling: Any, name: str) -> None:
    whole = f'it has {", ".join(SCALING)}'
    if not isinstance(scaling, (Mapping, ConfigDict)):
        raise refusal(name, scaling, f'a section: {whole}')
    for part in SCALING:
        if part not in scaling:
            raise UserError(f'{name}.{part} is missing: {whole}')
    for part in scaling:
        if part not in SCALING:
            raise UserError(f'{name}.{printable(part)} is not a setting: {whole}')
        value_of(scaling, part, name)
    _check_bool(scaling, name, 'auto_scale')
    _number(
        scaling,
        name,
        'base_value',
        lambda x: 0 < x <= HIGHEST_RATE,
        f'a number above 0, at most {HIGHEST_RATE:g}: the highest rate at base_lr_batch_size',
    )
    _number(
        scaling,
        name,
        'base_lr_batch_size',
        lambda x: _is_whole(x) and 1 <= x <= 2**31,
        f'a whole number from 1 to {2**31:,}',
    )
    _one_of(scaling, name, 'scaling_type', 'linear', 'sqrt')


def value_of(parts: Mapping | ConfigDict, part: Any, name: str) -> Any:
    """What a section `name` holds under `part`, which ConfigDict may have to compute.

    Raises:
      UserError: that fails, as of a reference to a value that was never set.
    """
    try:
        return parts[part]
    except Exception as error:
        reason = printable(' '.join(str(error).split()))
        raise UserError(
            f'{name}.{printable(part)} has no value: {type(error).__name__}: {reason}'
        ) from error


def _rates(lr: Any) -> list[float]:
    """All rates that a schedule names."""
    if lr['name'] == 'composite':
        return [rate for piece in lr['schedulers'] for rate in _rates(piece)]
    if lr['name'] == 'multistep':
        return list(lr['values'])
    return [lr[part] for part in ('value', 'start_value', 'end_value') if part in lr]


def _number(parts: Any, name: str, part: str, holds: Callable[[float], bool], allowed: str) -> None:
    value = parts[part]
    if not (_is_number(value) and holds(value)):
        raise refusal(f'{name}.{part}', value, allowed)


def _one_of(parts: Any, name: str, part: str, *words: str) -> None:
    if not (isinstance(parts[part], str) and parts[part] in words):
        raise refusal(f'{name}.{part}', parts[part], f'one of {", ".join(words)}')


def _check_bool(parts: Any, name: str, part: str) -> None:
    if not isinstance(parts[part], bool):
        raise refusal(f'{name}.{part}', parts[part], 'True or False')


def _list(parts: Any, name: str, part: str, allowed: str) -> tuple:
    value = parts[part]
    if not isinstance(value, (tuple, list)):
        raise refusal(f'{name}.{part}', value, allowed)
    return tuple(value)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and -1e308 < x < 1e308


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_rate(x: Any) -> bool:
    return _is_number(x) and 0 <= x <= HIGHEST_RATE
