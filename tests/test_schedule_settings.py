"""Schedules of the learning rate that cannot work: each is one line with its part's full name."""

import math

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from test_settings import HUGE, LR, default, refusal

from swav_jax import config as settings
from swav_jax.config.schedules import Schedule
from swav_jax.errors import UserError
from swav_jax.state import make_schedule

# By the part that is wrong: what is changed, in a composite or in a whole schedule.

RESTARTS = dict(
    name='cosine_warm_restart',
    start_value=1.0,
    end_value=0.1,
    restart_interval_length=0.5,
    wave_type='half',
    is_adaptive=False,
    lr_multiplier=1.0,
)
STEPS = dict(name='multistep', values=(1.0, 0.1, 0.01), milestones=(3, 6), num_epochs=9)
LINEAR = dict(name='linear', start_value=1.0, end_value=0.1)
BAD_RATES = (-0.1, math.nan, math.inf, 1e300, HUGE, '1', None, True, (1.0,), {'a': 1})
BAD_WORDS = ('', 'SQRT', 1, None, True, ('linear',), 'lin\near')


def refused_schedules():
    """(schedule, full name below lr of what is wrong with it)."""
    composite = settings.to_dict(settings.warmup_cosine(0.1))
    pieces = (settings.warmup_cosine(0.1).schedulers[0].to_dict(), LINEAR)

    def without(schedule, part):
        return {key: value for key, value in schedule.items() if key != part}

    for schedule in (RESTARTS, STEPS, LINEAR, dict(name='constant', value=1.0), composite):
        for part in without(schedule, 'auto_lr_scaling').keys() - {'update_interval'}:
            yield without(schedule, part), f'.{part}'
        yield schedule | {'end_vlaue': 1.0}, '.end_vlaue'
        for bad in BAD_WORDS:
            yield schedule | {'name': bad}, '.name'
            yield schedule | {'update_interval': bad}, '.update_interval'
        for bad in (None, 3, 'linear', ()):
            yield schedule | {'auto_lr_scaling': bad}, '.auto_lr_scaling'
    for bad in BAD_RATES:
        yield dict(name='constant', value=bad), '.value'
        for schedule in (LINEAR, LINEAR | {'name': 'cosine'}, RESTARTS):
            for part in ('start_value', 'end_value'):
                yield schedule | {part: bad}, f'.{part}'
                piece = LINEAR | {part: bad}
                yield composite | {'schedulers': (pieces[0], piece)}, f'.schedulers[1].{part}'
        yield STEPS | {'values': (1.0, bad, 0.1)}, '.values[1]'
        yield RESTARTS | {'restart_interval_length': bad}, '.restart_interval_length'
        yield RESTARTS | {'lr_multiplier': bad}, '.lr_multiplier'
        yield STEPS | {'num_epochs': bad}, '.num_epochs'
        yield STEPS | {'milestones': (3, bad)}, '.milestones'
        yield composite | {'lengths': (0.5, bad)}, '.lengths[1]'
        for part in ('base_value', 'base_lr_batch_size'):
            scaling = composite['auto_lr_scaling'] | {part: bad}
            yield composite | {'auto_lr_scaling': scaling}, f'.auto_lr_scaling.{part}'
    for bad in (0, 1.01, -0.5, 1e-12):
        yield RESTARTS | {'restart_interval_length': bad}, '.restart_interval_length'
    yield RESTARTS | {'restart_interval_length': 0.001, 'lr_multiplier': 2.0}, '.lr_multiplier'
    yield RESTARTS | {'lr_multiplier': 0}, '.lr_multiplier'
    for bad in (1, 'True', None):
        yield RESTARTS | {'is_adaptive': bad}, '.is_adaptive'
        scaling = composite['auto_lr_scaling'] | {'auto_scale': bad}
        yield composite | {'auto_lr_scaling': scaling}, '.auto_lr_scaling.auto_scale'
    for bad in (*BAD_WORDS, 'quarter'):
        yield RESTARTS | {'wave_type': bad}, '.wave_type'
        scaling = composite['auto_lr_scaling'] | {'scaling_type': bad}
        yield composite | {'auto_lr_scaling': scaling}, '.auto_lr_scaling.scaling_type'
        yield composite | {'interval_scaling': ('fixed', bad)}, '.interval_scaling[1]'
    yield composite | {'update_interval': 'epochs'}, '.update_interval'
    yield composite | {'interval_scaling': ('rescale', 'fixed')}, '.interval_scaling[0]'
    for bad in ((6, 3), (3, 3), (0, 3), (3, 9), (3, 6.5), 3, None, 'ab'):
        yield STEPS | {'milestones': bad}, '.milestones'
    for bad in ((1.0,), (1.0,) * 4, (), 1.0, None):
        yield STEPS | {'values': bad}, '.values'
    for part in ('lengths', 'interval_scaling', 'schedulers'):
        for bad in ((), (1,), 'fixed', None, 3, {'a': 1}):
            yield composite | {part: bad}, f'.{part}'
    for bad in ((0.5, 0.6), (0.1, 0.8)):
        yield composite | {'lengths': bad}, '.lengths'
    for bad in ((0, 1), (1.5, -0.5)):
        yield composite | {'lengths': bad}, '.lengths['
    for bad in (
        None,
        'linear',
        3,
        (),
        {},
        dict(name='linear'),
        LINEAR | {'update_interval': 'step'},
    ):
        yield composite | {'schedulers': (pieces[0], bad)}, '.schedulers[1]'
    for part in composite['auto_lr_scaling']:
        scaling = without(composite['auto_lr_scaling'], part)
        yield composite | {'auto_lr_scaling': scaling}, f'.auto_lr_scaling.{part}'
    scaling = composite['auto_lr_scaling'] | {'base': 3}
    yield composite | {'auto_lr_scaling': scaling}, '.auto_lr_scaling.base'
    scaling = composite['auto_lr_scaling']
    yield dict(name='constant', value=0.0, auto_lr_scaling=scaling), ' names no rate above 0'
    nested = LINEAR
    for _ in range(10):
        nested = dict(
            name='composite', schedulers=(nested,), lengths=(1,), interval_scaling=('fixed',)
        )
    yield nested, '.schedulers[0].schedulers[0]'
    for bad in (None, 3, 'cosine', (), [LINEAR]):
        yield bad, '='


def test_every_part_of_a_schedule_is_checked():
    config, tried = default(), 0
    sizes = settings.sizes(config, num_images=100_000, num_devices=1)
    for lr, name in refused_schedules():
        with pytest.raises(UserError) as caught:
            Schedule().check(f'config.{LR}', lr)
        line = str(caught.value)
        assert line.startswith(f'config.{LR}{name}') and line.isprintable(), (line, lr)
        if tried % 20 == 0:
            with config.ignore_type():
                config.optimizer.param_schedulers.lr = lr
            assert refusal(config).startswith(f'config.{LR}{name}')
            with pytest.raises(UserError, match=LR):
                make_schedule(config, sizes)
        tried += 1
    assert tried > 300


def test_a_schedule_that_holds_itself():
    config = default()
    lr = config.optimizer.param_schedulers.lr
    inner = ConfigDict(dict(name='composite', lengths=(0.5, 0.5), interval_scaling=('fixed',) * 2))
    inner.schedulers = (inner, inner)
    lr.schedulers = (inner, inner)
    assert 'nest fewer' in refusal(config)


def test_sound_schedules_stay_valid():
    whole = settings.to_dict(settings.warmup_cosine(0.1))
    for lr in (
        RESTARTS,
        RESTARTS | {'is_adaptive': True, 'wave_type': 'full'},
        {key: RESTARTS[key] for key in RESTARTS if key != 'lr_multiplier'} | {'is_adaptive': True},
        STEPS | {'update_interval': 'epoch', 'auto_lr_scaling': whole['auto_lr_scaling']},
        dict(name='constant', value=0),
        whole,
        whole | {'lengths': (1 / 3, 2 / 3)},
        whole | {'schedulers': [whole, LINEAR | {'start_value': 1}], 'update_interval': 'epoch'},
    ):
        if lr is not whole and 'schedulers' in lr:
            inner = {key: lr['schedulers'][0][key] for key in lr['schedulers'][0]}
            inner.pop('auto_lr_scaling', None), inner.pop('update_interval', None)
            lr = lr | {'schedulers': [inner, lr['schedulers'][1]]}
        config = default()
        with config.ignore_type():
            config.optimizer.param_schedulers.lr = lr
        settings.validate(config)
        sizes = settings.sizes(config, num_images=100_000, num_devices=1)
        rates = jax.vmap(make_schedule(config, sizes))(jnp.arange(sizes.total_steps))
        assert jnp.isfinite(rates).all() and rates.min() >= 0
        assert (rates.max() > 0) == (lr['name'] != 'constant')
