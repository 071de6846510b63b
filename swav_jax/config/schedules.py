"""Learning-rate schedules as settings: VISSL's, and what each part of one may be.

`optim.schedule` computes what passes here.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from swav_jax.config.kinds import SWITCH, Section, Several, one_of, positive, real, value_of, whole
from swav_jax.errors import UserError, refusal

HIGHEST_RATE = 1e30  # far from what trains, and within float32
MOST_EPOCHS = 1_000_000
MOST_PIECES = 1000
DEEPEST = 4  # composites within composites
TYPES = (Mapping, ConfigDict)  # `optim.schedule` reads either

RATE = real(0, HIGHEST_RATE)
SLOPE = {'start_value': RATE, 'end_value': RATE}
PARTS = {
    'constant': {'value': RATE},
    'linear': SLOPE,
    'cosine': SLOPE,
    'multistep': {
        'num_epochs': whole(1, MOST_EPOCHS),
        'milestones': Several(whole(1, MOST_EPOCHS), 0, MOST_EPOCHS),
        'values': Several(RATE, 1, MOST_EPOCHS),
    },
    'cosine_warm_restart': SLOPE
    | {
        'restart_interval_length': positive(1e-4, 1),  # of the run: at most 10,000 restarts
        'wave_type': one_of('half', 'full'),
        'is_adaptive': SWITCH,
        'lr_multiplier': positive(1e-30, HIGHEST_RATE),
    },
    'composite': {  # and `schedulers`: see `Schedule`
        'lengths': Several(positive(1e-9, 1), 1, MOST_PIECES),
        'interval_scaling': Several(one_of('rescaled', 'fixed'), 1, MOST_PIECES),
    },
}
NAME = one_of(*PARTS)
SCALING = {
    'auto_scale': SWITCH,
    'base_value': positive(1e-30, HIGHEST_RATE),
    'base_lr_batch_size': whole(1, 2**31),
    'scaling_type': one_of('linear', 'sqrt'),
}
# The outermost schedule may have these whatever its name is.
COMMON = {
    'auto_lr_scaling': Section(SCALING, types=TYPES),
    'update_interval': one_of('step', 'epoch'),
}


def warmup_cosine(
    warmup: float, base_value: float = 0.3, start_value: float = 0.3, end_value: float = 4.8
) -> ConfigDict:
    """VISSL's schedule: linear warm-up over a share of the run, then a cosine to a thousandth.

    `base_value` is the learning rate for 256 images; `optim.schedule` multiplies it, once, by the
    global batch size over 256, and the peak of the warm-up and the cosine are rescaled to it.
    """
    return ConfigDict(
        dict(
            auto_lr_scaling=dict(
                auto_scale=True,
                base_value=base_value,
                base_lr_batch_size=256,
                scaling_type='linear',
            ),
            name='composite',
            schedulers=(
                ConfigDict(dict(name='linear', start_value=start_value, end_value=end_value)),
                ConfigDict(dict(name='cosine', start_value=end_value, end_value=end_value / 1000)),
            ),
            update_interval='step',
            interval_scaling=('rescaled', 'fixed'),
            lengths=(warmup, 1 - warmup),
        )
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The kind of a schedule, a section whose `name` decides which parts it has; see `kinds.Kind`.

    Attributes:
      depth: number of composites around it; 0: the schedule of a run.
    """

    depth: int = 0
    words: str = f'a schedule with a name ({", ".join(PARTS)}) and its parts'

    def check(self, name: str, value: Any) -> None:
        """See `Kind.check`."""
        if not isinstance(value, TYPES):
            raise refusal(name, value, self.words)
        if 'name' not in value:
            raise UserError(f'{name}.name is missing: give {NAME.words}')
        kind = value_of(value, 'name', name)
        NAME.check(f'{name}.name', kind)
        parts = PARTS[kind]
        if kind == 'composite':
            if self.depth >= DEEPEST:
                raise UserError(f'{name} is a composite within {DEEPEST} others: nest fewer')
            parts = {'schedulers': Several(Schedule(self.depth + 1), 1, MOST_PIECES)} | parts
        for part in parts:
            if part not in value and not (part == 'lr_multiplier' and value.get('is_adaptive')):
                raise UserError(
                    f'{name}.{part} is missing: a {kind!r} schedule has {", ".join(parts)}; set '
                    'all of them where the config file makes the schedule'
                )
        known = {'name': NAME} | parts | ({} if self.depth else COMMON)
        Section(known, optional=tuple(known), types=TYPES).check(name, value)
        if kind in _RELATIONS:
            _RELATIONS[kind](name, value)
        scaled = not self.depth and value.get('auto_lr_scaling', {}).get('auto_scale')
        if scaled and not any(rates(value)):
            raise UserError(
                f'{name} names no rate above 0, which could be scaled to {name}.auto_lr_scaling.'
                'base_value: give one, or set auto_scale=False'
            )


def rates(lr: Mapping | ConfigDict) -> list[float]:
    """All rates that a schedule names."""
    if lr['name'] == 'composite':
        return [rate for piece in lr['schedulers'] for rate in rates(piece)]
    if lr['name'] == 'multistep':
        return list(lr['values'])
    return [lr[part] for part in ('value', 'start_value', 'end_value') if part in lr]


def _check_multistep(name: str, lr: Any) -> None:
    milestones, values = lr['milestones'], lr['values']
    borders = (0, *milestones, lr['num_epochs'])
    if not all(a < b for a, b in itertools.pairwise(borders)):
        allowed = f'ascending whole numbers of epochs, from 1 to {lr["num_epochs"] - 1:,}'
        raise refusal(f'{name}.milestones', milestones, allowed)
    if len(values) != len(milestones) + 1:
        allowed = f'{len(milestones) + 1} rates, one more than {name}.milestones has epochs'
        raise refusal(f'{name}.values', values, allowed)


def _check_restarts(name: str, lr: Any) -> None:
    restarts = math.ceil(1 / lr['restart_interval_length'])
    start, multiplier = max(lr['start_value'], 1.0), lr.get('lr_multiplier', 1.0)
    if math.log(start) + restarts * math.log(multiplier) > math.log(HIGHEST_RATE):
        allowed = f'so low that the rate stays below {HIGHEST_RATE:g} after {restarts:,} restarts'
        raise refusal(f'{name}.lr_multiplier', multiplier, allowed)


def _check_composite(name: str, lr: Any) -> None:
    pieces = len(lr['schedulers'])
    for part in ('lengths', 'interval_scaling'):
        if len(lr[part]) != pieces:
            raise refusal(f'{name}.{part}', lr[part], f'{pieces} long, like {name}.schedulers')
    total = sum(lr['lengths'])
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise refusal(f'{name}.lengths', lr['lengths'], f'shares that sum to 1, not to {total:g}')


_RELATIONS = {
    'multistep': _check_multistep,
    'cosine_warm_restart': _check_restarts,
    'composite': _check_composite,
}
