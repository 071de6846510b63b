"""A section has the settings of its trunk alone, and any trunk that is registered works."""

import contextlib
import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from processes import TINY
from test_settings import NEVER
from test_torch_weights import assert_same

import swav_jax
from swav_jax import cli, export, main, models, torch_weights, training
from swav_jax import config as settings
from swav_jax.commands import replay, traced
from swav_jax.config import saved as saved_settings
from swav_jax.config import trunks
from swav_jax.config.file import load_config, override
from swav_jax.config.kinds import whole
from swav_jax.errors import RunFailedError, UserError
from swav_jax.evaluate import classifier
from swav_jax.evaluate.classifier import Recipe
from swav_jax.models.trunk import Trunk
from swav_jax.runs.checkpoint import Checkpoints
from swav_jax.runs.resume import check_config

# What `default()` had for all trunks before each had a section of its own.
FLAT = {
    'name': 'resnet', 'depth': 50, 'width_multiplier': 1.0, 'groups': 1, 'width_per_group': 64,
    'layer4_stride': 2, 'zero_init_residual': False, 'stem': 'imagenet', 'w_0': 0, 'w_a': 0.0,
    'w_m': 0.0, 'group_width': 0, 'se_ratio': 0.25,
}  # fmt: skip
REGNET = dict(depth=1, w_0=8, w_m=2.0, group_width=4)


def with_trunk(section):
    config = settings.default()
    config.model.trunk = section
    return config


# Sections


@pytest.mark.parametrize('name', trunks.TRUNKS)
def test_a_section_has_the_settings_of_its_trunk(name):
    section = trunks.section(name)
    assert section.name == name and section.is_locked
    expected = {'resnet': 8, 'regnet': 8}.get(name, 2)  # by torchvision's name: a stem alone
    assert len(section) == expected
    if name == 'regnet':  # whose defaults make no network
        section = trunks.section('regnet', **REGNET)
    settings.validate(with_trunk(section))
    for key, value in section.items():
        for bad in NEVER[type(value)]:
            changed = ConfigDict({k: v for k, v in section.items() if k != key})
            changed[key] = bad
            with pytest.raises(UserError) as caught:
                trunks.parse(changed)
            assert str(caught.value).startswith(f'config.model.trunk.{key}='), (key, bad)


def test_a_section_that_cannot_be_made():
    with pytest.raises(UserError, match=r"trunk\.name='vgg': must be one of resnet, regnet, regn"):
        trunks.section('vgg')
    with pytest.raises(KeyError, match='Did you mean "depth"'):
        trunks.section('resnet', deptth=3)
    with pytest.raises(TypeError):
        trunks.section('resnet', depth='many')


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        (3, r'config.model.trunk=3: must be a section'),
        (ConfigDict(), 'config.model.trunk.name is missing: give one of resnet, regnet, regnet_y'),
        (ConfigDict({'name': 'resnet'}), 'config.model.trunk.depth is missing'),
        (
            ConfigDict(FLAT),
            r"trunk.group_width is not a setting of the trunk 'resnet', which has dept",
        ),
        (
            ConfigDict(dict(trunks.section('resnet')) | {'name': 'regnet_y_16gf'}),
            r"depth is not a setting .* config.model.trunk = trunks.section\('regnet_y_16gf'\)",
        ),
    ],
)
def test_what_is_no_section_is_one_line(section, message):
    with pytest.raises(UserError, match=message) as caught:
        trunks.parse(section)
    assert str(caught.value).isprintable()


# Flags and files


@pytest.mark.parametrize('name_first', [True, False])
def test_a_flag_that_names_another_trunk_counts_before_its_settings(name_first):
    changes = [('config.model.trunk.name', 'regnet'), ('config.model.trunk.depth', '1')]
    changes += [('config.model.trunk.w_0', '8'), ('config.model.trunk.w_m', '2')]
    changes += [('config.model.trunk.group_width', '4'), ('config.loss.epsilon', '0.03')]
    config = override(settings.default(), changes if name_first else changes[::-1])
    assert config.model.trunk.to_dict() == trunks.section('regnet', **REGNET).to_dict()
    assert config.loss.epsilon == 0.03
    settings.validate(config)


def test_a_flag_with_the_same_name_changes_nothing():
    config = override(
        with_trunk(trunks.section('resnet', depth=18)), [('config.model.trunk.name', 'resnet')]
    )
    assert config.model.trunk.depth == 18


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--config.model.trunk.name=vgg', "config.model.trunk.name='vgg': must be one of resnet"),
        ('--config.model.trunk.name=', "config.model.trunk.name='': must be one of resnet"),
        ('--config.model.trunk.name', 'config.model.trunk.name: has no value'),
        ('--config.model.trunk.w_0=48', 'is not a setting; the nearest one is --config.'),
        ('--config.model.trunk.name=regnet_y_400mf --config.model.trunk.depth=18', 'not a setting'),
        (
            '--config.model.trunk.name=regnet',
            'config.model.trunk.depth=0: must be a whole number from 1 to 256',
        ),
    ],
)
def test_flags_that_name_no_trunk_are_one_line(flags, message, tmp_path, capsys):
    argv = ['--config=configs/swav_r50.py', f'--workdir={tmp_path}/run', *flags.split()]
    assert main.main(['--config.data.source=synthetic:64x8', *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and message in error, error
    assert not (tmp_path / 'run').exists()


def test_help_lists_the_settings_of_the_trunk_that_a_flag_names(capsys):
    argv = ['--help', '--config=configs/swav_r50.py', '--config.model.trunk.name=regnet_y_400mf']
    assert main.main(argv) == 0
    found = capsys.readouterr().out
    assert '--config.model.trunk.name=regnet_y_400mf\n' in found
    assert '--config.model.trunk.stem=imagenet  ' in found
    assert '--config.model.trunk.depth' not in found


def written(path, *lines):
    text = (
        'from swav_jax import config\nfrom swav_jax.config import trunks\n\n\ndef get_config():\n'
    )
    body = ('c = config.default()', *lines, 'return c')
    path.write_text(text + ''.join(f'    {line}\n' for line in body))
    return str(path)


@pytest.mark.parametrize(
    ('line', 'expected'),
    [
        ("c.model.trunk = trunks.section('regnet', depth=27)", ('regnet', dict(depth=27))),
        ("c.model.trunk.name = 'regnet_y_16gf'", ('regnet_y_16gf', {})),
        (
            "c.model.trunk.name, c.model.trunk.stem = 'regnet_y_16gf', 'small'",
            ('regnet_y_16gf', dict(stem='small')),
        ),
        ('c.model.trunk.depth = 18', ('resnet', dict(depth=18))),
    ],
)
def test_a_file_that_names_a_trunk(line, expected, tmp_path):
    config = load_config(written(tmp_path / 'c.py', line))
    name, changes = expected
    assert config.model.trunk.to_dict() == trunks.section(name, **changes).to_dict()
    assert config.model.trunk.is_locked


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ("c.model.trunk.name = 'vgg'", "config.model.trunk.name='vgg': must be one of"),
        (
            "c.model.trunk.update(name='regnet_y_400mf', depth=18)",
            'begin with config.model.trunk =',
        ),
        ("c.model.trunk.update(name='regnet', w_0=8)", 'KeyError: Key "w_0" does not exist'),
        ("c.model.trunk = trunks.section('resnet', dept=3)", 'KeyError: Key "dept" does not exist'),
        ('c.unlock(); c.model.trunk.w_0 = 8', "w_0 is not a setting of the trunk 'resnet'"),
        ('c.unlock(); del c.model.trunk', 'config.model.trunk is missing'),
    ],
)
def test_a_file_that_names_no_trunk_is_one_line(line, message, tmp_path):
    with pytest.raises(UserError) as caught:
        load_config(written(tmp_path / 'c.py', *line.split('; ')))
    assert message in str(caught.value) and str(caught.value).isprintable(), caught.value


# Runs of earlier versions


@pytest.mark.parametrize(
    ('flat', 'section'),
    [
        (FLAT, trunks.section('resnet')),
        (FLAT | {'depth': 18, 'stem': 'small'}, trunks.section('resnet', depth=18, stem='small')),
        (FLAT | {'name': 'regnet'} | REGNET, trunks.section('regnet', **REGNET)),
        (FLAT | {'name': 'regnet_y_16gf'}, trunks.section('regnet_y_16gf')),
    ],
)
def test_settings_of_earlier_versions_are_read_and_compared(flat, section):
    config = with_trunk(section)
    saved = settings.to_dict(config)
    saved['model']['trunk'] = flat
    saved = json.loads(json.dumps(saved))
    restored = saved_settings.restore(saved)
    assert settings.to_dict(restored) == settings.to_dict(config)
    settings.validate(restored)

    about = {'global_batch': 64, 'images': {'count': 24, 'digest': '0'}}
    check_config({'config': settings.to_dict(config)} | about, {'config': saved} | about)
    config.model.trunk.stem = {'small': 'imagenet', 'imagenet': 'small'}[section.stem]
    with pytest.raises(UserError, match=r"config\.model\.trunk\.stem '\w+' → '\w+'\)"):
        check_config({'config': settings.to_dict(config)} | about, {'config': saved} | about)


@pytest.mark.parametrize('trunk', [7, {}, {'name': 7}, FLAT | {'name': 'vgg'}, FLAT | {'new': 1}])
def test_settings_of_another_version_are_refused(trunk):
    saved = settings.to_dict(settings.default())
    saved['model']['trunk'] = trunk
    with pytest.raises(UserError):
        saved_settings.restore(saved)


def test_a_run_of_an_earlier_version_is_loaded_and_exported(tmp_path):
    config = cli.load_config(TINY)
    net = models.build(config.model, channels=1)
    crops = [np.zeros((2, 16, 16, 1), np.float32)]
    variables = jax.jit(lambda: net.init(jax.random.key(0), crops, train=True))()
    saved = settings.to_dict(config)
    saved['model']['trunk'] = FLAT | {'name': 'regnet'} | REGNET
    (tmp_path / 'run').mkdir()
    with contextlib.closing(Checkpoints(tmp_path / 'run' / 'checkpoints')) as checkpoints:
        checkpoints.save(3, variables, {'config': saved})
    model = swav_jax.load(tmp_path / 'run')
    assert settings.to_dict(model.config) == settings.to_dict(config)
    export.export(tmp_path / 'run', tmp_path / 'a.pth', layout='swav')
    for path in (tmp_path / 'run', tmp_path / 'a.pth'):
        assert_same(swav_jax.load_weights(path, config).variables, model.variables)


# Any trunk


@dataclasses.dataclass(frozen=True)
class Patches:
    """The settings of a trunk without BatchNorm."""

    width: int = trunks.setting(8, whole(1, 64), 'channels')

    def check(self):
        pass


class PatchTrunk(Trunk):
    settings: Patches

    torch_blocks = 'patches'

    @nn.compact
    def __call__(self, x, train):
        x = self.conv(self.settings.width, 3, 2, use_bias=True, name='patches_0')(x)
        return nn.LayerNorm(name='norm')(x.mean((1, 2)))

    @staticmethod
    def torch_name(modules, layout):
        return '.'.join(modules).replace('_', '.')


@pytest.fixture
def config(monkeypatch):
    """Settings of a network without BatchNorm, whose trunk is one class that is registered."""
    monkeypatch.setitem(trunks.TRUNKS, 'patches', Patches)
    monkeypatch.setitem(models.TRUNKS, Patches, PatchTrunk)
    config = cli.load_config(TINY)
    config.model.trunk = trunks.section('patches', width=6)
    config.model.head.use_bn = False
    config.optimizer.num_epochs = 4
    config.train.max_steps = 2
    return config


def test_a_trunk_without_parts_says_so(config):
    net = models.build(config.model, channels=1)
    with pytest.raises(UserError, match=r'feature_grid=2: PatchTrunk has no .*: use 1'):
        net.apply({}, np.zeros((1, 8, 8, 1)), grid=2, method='features')


def params_of(workdir):
    with contextlib.closing(Checkpoints(workdir / 'checkpoints')) as checkpoints:
        return checkpoints.read(('params',))[1]['params']


@pytest.mark.parametrize(
    'changes',
    [
        {},
        pytest.param({'train.per_crop_pass': True}, marks=pytest.mark.slow),
        pytest.param({'sharding': 'zero', 'precision': 'bfloat16'}, marks=pytest.mark.slow),
    ],
)
def test_a_network_without_batch_statistics_works_everywhere(config, changes, tmp_path):
    config.update_from_flattened_dict(changes)
    training.run(config, tmp_path / 'run')
    config.train.max_steps = 4
    training.run(config, tmp_path / 'run')
    rows = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(row)['step'] for row in rows] == [1, 2, 3, 4]
    assert traced.kept_bytes(config) > 0

    model = swav_jax.load(tmp_path / 'run')
    assert model.step == 4 and model.config.model.trunk.width == 6
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), np.uint8)
    expected = model.embed(images)
    assert expected.trunk.shape == (5, 6) and expected.embeddings.shape == (5, 4)
    for layout in torch_weights.LAYOUTS:
        out = tmp_path / f'{layout}.pth'
        export.export(tmp_path / 'run', out, layout=layout)
        loaded = swav_jax.load_weights(out, config)
        assert loaded.digest() == model.digest()
        np.testing.assert_allclose(loaded.embed(images).trunk, expected.trunk, rtol=1e-6)
    config.init_from = str(tmp_path / 'swav.pth')
    config.train.max_steps = 1
    training.run(config, tmp_path / 'again')
    assert jax.tree.structure(params_of(tmp_path / 'again')) == jax.tree.structure(
        params_of(tmp_path / 'run')
    )


@pytest.mark.slow
def test_classifiers_on_a_network_without_batch_statistics(config, tmp_path):
    training.run(config, tmp_path / 'run')
    model = swav_jax.load(tmp_path / 'run')
    train, test = model.open('demo', limit=64), model.open('demo:test', limit=16)
    for name, rate in (('probe', 0.0), ('tuned', 0.1)):
        recipe = Recipe(1, 0.1, batch_size=16, trunk_learning_rate=rate)
        classifier.fit(model, train, test, recipe, tmp_path / name)
        params = params_of(tmp_path / name)
        assert ('trunk' in params) == (rate > 0)
    before = model.variables['params']['trunk']['norm']['bias']
    assert np.any(np.asarray(params['trunk']['norm']['bias']) != before)


@pytest.mark.slow
def test_the_dump_of_a_network_without_batch_statistics_is_replayed(config, tmp_path):
    config.data.std = (1e-30,)  # squares overflow
    with pytest.raises(RunFailedError, match='step 1 is not finite'):
        training.run(config, tmp_path / 'run')
    metrics = replay.replay(tmp_path / 'run' / 'nan_dump')
    assert not metrics['finite']
