"""Settings that cannot work: each is one line with the setting's full name, at once."""

import math
import runpy

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict, config_dict
from processes import ROOT

from swav_jax import config as settings
from swav_jax import methods, models, training
from swav_jax.config.settings import SETTINGS
from swav_jax.errors import UserError
from swav_jax.main import main
from swav_jax.state import make_schedule

LR = 'optimizer.param_schedulers.lr'
HUGE = 10**5000  # Python refuses to print it


def default():
    config = settings.default()
    config.data.source = 'synthetic'
    return config.unlock()


def with_changes(*changes):
    """The defaults with values that are put in as they are, by dotted name."""
    config = default()
    for path, value in changes:
        *folders, leaf = path.split('.')
        section = config
        for folder in folders:
            section = section[folder]
        with config.ignore_type():
            section[leaf] = value
    return config


def refusal(config):
    """The line that refuses a config, where a plan or a run would."""
    with pytest.raises(UserError) as caught:
        settings.validate(config)
        method = methods.make(config)
        method.check()
        sizes = settings.sizes(config, num_images=100_000, num_devices=1)
        method.check_run(sizes)
        make_schedule(config, sizes)
        models.build(config.model, channels=config.data.channels)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 700, line
    return line


# What no setting of a type can be.
NEVER = {
    bool: (0, 1, 1.0, 'True', None, (True,), {}, np.True_),
    int: (1.5, 2.0, -2, 2**70, HUGE, math.nan, math.inf, '1', None, True, (1,), {}, np.int64(1)),
    float: (math.nan, math.inf, -math.inf, 1e300, -0.1, '1', None, True, (1.0,), {}),
    str: (1, None, True, b'demo', ('demo',), 'a\0b', {}),
    tuple: (None, 1, 1.5, True, 'ab', {}, {1: 2}, (None,), ('a',), (math.nan,), (math.inf,),
            (1, 'a'), (HUGE,), (True,), ((),), (-1, -1), (((1,),),), np.array([1, 2])),
}  # fmt: skip


def test_no_setting_takes_another_type_or_a_number_out_of_all_ranges():
    config, tried = default(), 0
    for name, value in settings.flatten(default()):
        path = name.removeprefix('config.')
        if path.startswith(LR):
            continue
        *folders, leaf = path.split('.')
        section = config
        for folder in folders:
            section = section[folder]
        for bad in NEVER[type(value)]:
            del section[leaf]  # a ConfigDict would make a float of an int, and of True
            section[leaf] = bad
            assert refusal(config).startswith((f'{name}=', f'{name}.', f'{name}[')), (name, bad)
            tried += 1
        del section[leaf]
        section[leaf] = value
    settings.validate(config)
    assert tried > 700


def test_every_default_is_allowed_and_every_setting_is_explained():
    for path, setting in SETTINGS.items():
        setting.kind.check(path, setting.default)
        assert setting.about and setting.kind.words, path


def test_the_page_of_settings_is_current():
    page = runpy.run_path(str(ROOT / 'scripts' / 'settings_page.py'))['page']()
    written = (ROOT / 'docs' / 'settings.md').read_text()
    assert written == page, 'run python scripts/settings_page.py --out docs/settings.md'


def test_every_seed_that_is_allowed_makes_other_weights():
    seeds = (0, 1, 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1)
    keys = {tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in seeds}
    assert len(keys) == len(seeds)
    for seed in seeds:
        SETTINGS['seed'].kind.check('seed', seed)
    with pytest.raises(UserError):
        SETTINGS['seed'].kind.check('seed', 2**32)


REFUSED = [
    # What a tuple holds.
    ('data.num_crops', ()),
    ('data.num_crops', (2, 6.0)),
    ('data.num_crops', (2, 0)),
    ('data.num_crops', (2, -1)),
    ('data.num_crops', (2, '6')),
    ('data.num_crops', ((2, 6),)),
    ('data.num_crops', (1_000_000,)),
    ('data.num_crops', (1, 10**20)),
    ('data.num_crops', (50, 51)),
    ('data.size_crops', (224,)),
    ('data.size_crops', (224, 0)),
    ('data.size_crops', (224, 100_000)),
    ('data.size_crops', (224.0, 96)),
    ('data.crop_scales', (0.14, 1.0)),
    ('data.crop_scales', ((0.14, 1.0),)),
    ('data.crop_scales', ((0.14, 1.0), (0.05,))),
    ('data.crop_scales', ((0.14, 1.0), (0.5, 0.1))),
    ('data.crop_scales', ((0.14, 1.0), (0, 0.1))),
    ('data.crop_scales', ((0.14, 1.0), (0.05, math.nan))),
    ('data.crop_scales', ((0.14, 1.0), (0.05, '1'))),
    ('data.crop_scales', ((0.14, 1.0), 0.5)),
    ('data.mean', (0.5,)),
    ('data.mean', (0.5, 0.5, None)),
    ('data.mean', (0.5, 0.5, 1e9)),
    ('data.std', (0.2, 0.2, 0.0)),
    ('data.std', (0.2, 0.2, 1e-40)),
    ('data.std', (0.2, 0.2, math.inf)),
    ('loss.crops_for_assign', ()),
    ('loss.crops_for_assign', (0, 0)),
    ('loss.crops_for_assign', (0, 8)),
    ('loss.crops_for_assign', (0, -1)),
    ('loss.crops_for_assign', (0, 1.0)),
    ('model.head.num_clusters', ()),
    ('model.head.num_clusters', (1,)),
    ('model.head.num_clusters', (3000, 0)),
    ('model.head.num_clusters', (10**12,)),
    ('model.head.num_clusters', (3000.0,)),
    ('model.head.num_clusters', (30,) * 100),
    ('model.head.dims', ()),
    ('model.head.dims', (0,)),
    ('model.head.dims', (0, -3)),
    ('model.head.dims', (0, 0, 128)),
    ('model.head.dims', (0, 2048, 0)),
    ('model.head.dims', (7, 2048, 128)),
    ('model.head.dims', (None, 2048, 128)),
    ('model.head.dims', (0, 2048, 10**9)),
    ('model.head.dims', (0, (2048, 128))),
    ('model.head.dims', (0,) + (8,) * 1000),
    ('model.head.activation_name', 'swish'),
    ('model.head.activation_name', ''),
    ('model.temp_frozen_params_iter_map', ('head/prototypes0', 313)),
    ('model.temp_frozen_params_iter_map', (('head/prototypes0',),)),
    ('model.temp_frozen_params_iter_map', (('head/prototypes0', -1),)),
    ('model.temp_frozen_params_iter_map', (('head/prototypes0', 1.5),)),
    ('model.temp_frozen_params_iter_map', ((313, 'head/prototypes0'),)),
    ('model.temp_frozen_params_iter_map', (('head/prototypes0', 2**40),)),
    ('model.temp_frozen_params_iter_map', (('', 1),)),
    ('model.temp_frozen_params_iter_map', (('trunk', 1), ('trunk', 2))),
    ('model.temp_frozen_params_iter_map', {'head/prototypes0': 313}),
    # Sizes that no machine has, numbers that would be rounded to 0 or to infinity.
    ('seed', 2**32),
    ('seed', 2**63),
    ('seed', -1),
    ('data.batchsize_per_replica', 10**9),
    ('data.canvas_size', 1_000_000),
    ('data.channels', 10**6),
    ('loss.queue.queue_length', 10**15),
    ('loss.temperature', 1e-300),
    ('loss.epsilon', 0),
    ('optimizer.num_epochs', 10**12),
    ('train.max_steps', 2**70),
    ('evaluate.batch_size', 10**9),
    ('evaluate.resize', 10**6),
    ('data.limit', 2**40),
    # Words.
    ('precision', 'float8'),
    ('precision', 'Float32'),
    ('sharding', ''),
    ('model.remat', 'Block'),
    ('optimizer.name', 'adagrad'),
    ('train.on_nan', 'ignore'),
    ('train.on_collapse', 'die\nat\x1b[31m once'),
    # The trunk.
    ('model.trunk.name', 'resnet50'),
    ('model.trunk.name', ''),
    ('model.trunk.depth', 51),
    ('model.trunk.depth', 100_000),
    ('model.trunk.stem', 'tiny'),
    ('model.trunk.layer4_stride', 7),
    ('model.trunk.layer4_stride', 0),
    ('model.trunk.width_multiplier', 0.0),
    ('model.trunk.width_multiplier', 1e9),
    ('model.trunk.groups', 0),
    ('model.trunk.groups', 60_000),
    ('model.trunk.width_per_group', 60_000),
    ('model.trunk.w_0', 48),
    ('model.trunk.group_width', 8),
]


@pytest.mark.parametrize(('path', 'value'), REFUSED, ids=lambda x: repr(x)[:40])
def test_a_bad_value_is_one_line_with_its_name(path, value):
    assert f'config.{path}' in refusal(with_changes((path, value)))


REGNET = dict(name='regnet', depth=16, w_0=48, w_a=27.89, w_m=2.09, group_width=8)


@pytest.mark.parametrize(
    ('change', 'name'),
    [
        ({'depth': 257}, 'depth'),
        ({'w_0': 0}, 'w_0'),
        ({'w_0': 47}, 'w_0'),
        ({'w_0': 10**6}, 'w_0'),
        ({'w_a': 1e300}, 'w_a'),
        ({'w_a': 60_000.0}, 'w_a'),
        ({'w_m': 1.0}, 'w_m'),
        ({'w_m': 0.0}, 'w_m'),
        ({'w_m': 1e300}, 'w_m'),
        ({'group_width': 0}, 'group_width'),
        ({'se_ratio': 0.001}, 'se_ratio'),
        ({'se_ratio': 1000.0}, 'se_ratio'),
        ({'width_multiplier': 2.0}, 'width_multiplier'),
        ({'name': 'regnet_y_400mf'}, 'depth'),
    ],
)
def test_a_regnet_that_cannot_be_built_is_named(change, name):
    trunk = ConfigDict(dict(stem='imagenet', se_ratio=0.25) | REGNET | change)
    assert f'config.model.trunk.{name}' in refusal(with_changes(('model.trunk', trunk)))


@pytest.mark.parametrize(
    ('changes', 'name', 'text'),
    [
        ({'evaluate.size': 300}, 'evaluate.size', 'at most config.evaluate.resize=256'),
        ({'augment.blur_radius_min': 3.0}, 'augment.blur_radius_min', 'blur_radius_max=2.0'),
        ({'data.num_crops': (1,), 'data.size_crops': (224,), 'data.crop_scales': ((0.1, 1.0),)},
         'data.num_crops', 'makes one crop'),
        ({'data.channels': 1}, 'data.mean', '1 numbers, one per channel'),
        ({'data.batchsize_per_replica': 60_000, 'data.canvas_size': 8000},
         'data.batchsize_per_replica', 'takes 11,520 GB'),
        ({'data.batchsize_per_replica': 60_000, 'data.size_crops': (4000, 96)},
         'data.batchsize_per_replica', 'for the pixels alone'),
        ({'data.batchsize_per_replica': 20_000, 'optimizer.num_epochs': 10}, None, None),
        ({'data.batchsize_per_replica': 1, 'optimizer.num_epochs': 1_000_000},
         'optimizer.num_epochs', 'use at most 21,474'),
        ({'loss.queue.queue_length': 63}, 'loss.queue.queue_length', 'global batch of 64'),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(changes, name, text):
    config = with_changes(*changes.items())
    if name is None:
        return settings.validate(config)
    line = refusal(config)
    assert f'config.{name}' in line and text in line, line
    return None


@pytest.mark.parametrize('value', [(2 + 3j,), (b'x',), (...,), ({1},)])
def test_a_run_refuses_what_json_cannot_hold(value, tmp_path):
    """Before processes compare their settings as JSON."""
    for name in ('data.num_crops', 'data.mean', 'model.head.dims', 'data.crop_scales'):
        with pytest.raises(UserError, match=rf'config\.{name}[\[=]'):
            training.run(with_changes((name, value)), tmp_path)


class Odd:
    def __repr__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ('config', 'name'),
    [
        (None, 'config=None'),
        (3, 'config=3'),
        ({}, 'config={}'),
        (settings.default().to_dict(), 'config={'),
        (Odd(), 'config=<Odd'),
        (ConfigDict(), 'config.seed is missing'),
        (ConfigDict({'seed': 0, 'sede': 0}), 'config.sede is not a setting'),
        (with_changes(('loss', 3)), 'config.loss=3'),
        (with_changes(('loss', None)), 'config.loss=None'),
        (with_changes(('data', 'demo')), "config.data='demo'"),
        (with_changes(('optimizer.param_schedulers', ())), 'config.optimizer.param_schedulers=()'),
        (with_changes(('loss.queue', ConfigDict())), 'config.loss.queue.queue_length is missing'),
        (with_changes(('loss.epsilom', 1)), 'config.loss.epsilom is not a setting: epsilon is'),
        (with_changes(('a\x1b[31m', 1)), r'config.a\x1b[31m is not a setting'),
        (with_changes(('seed', config_dict.required_placeholder(int))), 'config.seed has no value'),
        (with_changes(('seed', config_dict.placeholder(int))), 'config.seed=None'),
        (with_changes(('loss.epsilon', Odd())), 'config.loss.epsilon=<Odd'),
    ],
    ids=lambda x: x if isinstance(x, str) else '',
)  # fmt: skip
def test_what_is_no_config_of_ours(config, name):
    assert name in refusal(config)


def test_a_section_that_is_missing_or_holds_itself():
    config = default()
    del config.train
    assert 'config.train is missing' in refusal(config)
    config = default()
    with config.ignore_type():
        config.loss.queue = config.loss
    assert 'config.loss.queue.' in refusal(config)


def test_harmless_variants_stay_valid():
    config = default()
    for path, value in settings.flatten(default()):
        if type(value) is float and value == int(value):
            *folders, leaf = path.split('.')[1:]
            section = config
            for folder in folders:
                section = section[folder]
            with config.ignore_type():
                section[leaf] = int(value)
    config.data.num_crops = [2, 6]
    config.data.crop_scales = [[0.14, 1], [0.05, 0.14]]
    config.model.head.num_clusters = [300, 30]
    config.model.temp_frozen_params_iter_map = [['head/prototypes0', 0]]
    settings.validate(config)
    assert models.build(config.model).head.num_clusters == (300, 30)
    config.data.source = ''
    settings.validate(config)
    config.optimizer.param_schedulers.lr = dict(name='constant', value=1.0)
    settings.validate(FrozenConfigDict(config))


@pytest.mark.parametrize(
    ('flags', 'text'),
    [
        (
            '--config.seed=4294967296',
            'config.seed=4294967296: must be a whole number',
        ),
        (f'--config.{LR}.name=cosine', f'config.{LR}.start_value is missing'),
        (f'--config.{LR}.lengths=(1,)', f'config.{LR}.lengths=(1,)'),
        (f'--config.{LR}.interval_scaling=("rescale","fixed")', '.interval_scaling[0]='),
        (f'--config.{LR}.auto_lr_scaling.scaling_type=SQRT', '.auto_lr_scaling.scaling_type='),
        (f'--config.{LR}.update_interval=epochs', '.update_interval='),
        ('--config.data.num_crops=(1000000,)', 'config.data.num_crops[0]=1000000: must be'),
        ('--config.data.canvas_size=1000000', 'config.data.canvas_size=1000000'),
        ('--config.model.trunk.depth=100000', 'config.model.trunk.depth=100000'),
        ('--config.model.trunk.layer4_stride=7', 'config.model.trunk.layer4_stride'),
        ('--config.model.temp_frozen_params_iter_map=(("head/protos",3),)', "'head/protos' fits"),
        ('--config.precision=float64', 'config.precision asks for float64'),
        ('--config.loss.use_double_precision=True', 'config.loss.use_double_precision asks for'),
    ],
)
def test_a_plan_and_a_run_refuse_alike(flags, text, tmp_path, capsys, monkeypatch):
    config = (
        'from swav_jax import config\n\n\ndef get_config():\n    c = config.default()\n'
        "    c.data.source = 'synthetic:64x8'\n    c.data.batchsize_per_replica = 8\n"
        '    c.model.trunk.depth = 18\n'
        "    c.model.trunk.width_multiplier, c.model.trunk.stem = 0.0625, 'small'\n"
        '    c.model.head.dims, c.model.head.num_clusters = (0, 8), (6,)\n'
        '    c.data.num_crops, c.data.size_crops, c.data.canvas_size = (2, 1), (8, 8), 8\n'
        '    return c\n'
    )
    (tmp_path / 'c.py').write_text(config)
    for how in ('--plan', f'--workdir={tmp_path}/run'):
        assert main([f'--config={tmp_path}/c.py', how, flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith('error: ') and error.count('\n') == 1 and text in error, error
