"""Weights in and out of PyTorch: torchvision's models, all layouts, and files that are bad."""

import itertools
import os
import pickle
import re
import resource
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from test_models import TRUNKS, model_config, shapes, zeros

from swav_jax import models, torch_weights
from swav_jax.errors import UserError
from swav_jax.models.regnet import RegNet
from swav_jax.models.resnet import ResNet

SMALL = dict(depth=18, width_multiplier=0.125)
FAMILIES = {
    'resnet': SMALL,
    'bottleneck': dict(depth=50, width_multiplier=0.125),
    'resnext': dict(depth=50, width_multiplier=0.5, groups=8, width_per_group=4),
    'small stem': SMALL | dict(stem='small'),
    'regnet_x': dict(name='regnet', depth=5, w_0=8, w_a=8, w_m=2.0, group_width=8, se_ratio=0.0),
    'regnet_y': dict(name='regnet', depth=5, w_0=8, w_a=8, w_m=2.0, group_width=8),
}
HEADS = {
    'as VISSL has it': dict(),
    'three layers': dict(dims=(0, 20, 24, 16)),
    'one layer': dict(dims=(0, 16)),
    'no norm, no bias': dict(use_bn=False, use_bias=False),
    'norm at the end': dict(skip_last_bn=False),
    'no activation': dict(activation_name='none'),
    'two heads': dict(num_clusters=(7, 9)),
    'weight norm': dict(use_weight_norm_prototypes=True),
}
SMALL_HEAD = dict(dims=(0, 24, 16), num_clusters=(7,))


def random_variables(settings, seed=0):
    """Variables with random float32 values everywhere, running statistics included."""
    leaves, tree = jax.tree.flatten(shapes(models.build(settings)))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [rng.random(leaf.shape, np.float32) for leaf in leaves])


def trunk_of(variables):
    """The class of a trunk, which its variables tell."""
    return ResNet if 'conv1' in variables['params']['trunk'] else RegNet


def to_torch(variables, layout, **options):
    return torch_weights.to_torch(variables, layout, trunk_of(variables), **options)


def load(variables, path, **options):
    return torch_weights.load_into(variables, path, trunk_of(variables), **options)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [
        'resnet18',
        'resnet50',
        'resnet50w2',
        'resnext50_32x4d',
        'regnet_x_400mf',
        'regnet_y_400mf',
        'regnet_y_16gf',
    ],
)
def test_an_export_gives_torchvisions_model_our_features(name, tmp_path):
    plain, _, multiplier = name.partition('w')
    multiplier = int(multiplier or 1)
    reference = torch_models.trunk(plain, multiplier)
    torch_models.fill(reference)
    torch.save(reference.state_dict(), tmp_path / 'trunk.pth')

    settings = model_config(TRUNKS[plain] | ({'width_multiplier': 2.0} if multiplier == 2 else {}))
    net = models.build(settings)
    variables = load(zeros(shapes(net)), tmp_path / 'trunk.pth')
    torch_weights.write(tmp_path / 'export.pth', to_torch(variables, 'torchvision'))
    torch_models.fill(reference, seed=1)  # so that nothing of what we loaded is left
    reference.load_state_dict(torch.load(tmp_path / 'export.pth', weights_only=True), strict=True)

    images = np.random.default_rng(1).standard_normal((2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(np.moveaxis(images, -1, 1))).numpy()
    ours = jax.jit(lambda v, x: net.apply(v, x, method='features'))(variables, images)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize('family', FAMILIES)
def test_round_trip_is_bit_exact(family, tmp_path, capsys):
    variables = random_variables(model_config(FAMILIES[family], SMALL_HEAD))
    trunk = {kind: {'trunk': tree['trunk']} for kind, tree in variables.items()}
    for layout, file_format in itertools.product(torch_weights.LAYOUTS, torch_weights.FORMATS):
        path = tmp_path / f'{layout}.{file_format}'
        torch_weights.write(path, to_torch(variables, layout), file_format)
        if layout == 'torchvision':  # it has no head
            assert_same(load(zeros(trunk), path), trunk)
        else:
            assert_same(load(zeros(variables), path), variables)
            assert 'head: 9 of 9 tensors loaded\n' in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 6  # and no temporary file


@pytest.mark.parametrize('layout', ['vissl', 'swav'])
@pytest.mark.parametrize('head', HEADS)
def test_round_trip_of_heads_is_bit_exact(head, layout, tmp_path):
    settings = model_config(SMALL, SMALL_HEAD | HEADS[head])
    variables = random_variables(settings)
    activation = settings.head.activation_name != 'none'
    torch_weights.write(tmp_path / 'a.pth', to_torch(variables, layout, activation=activation))
    assert_same(load(zeros(variables), tmp_path / 'a.pth'), variables)


def test_vissl_layout_has_vissls_nesting_and_names(tmp_path):
    variables = random_variables(model_config(FAMILIES['regnet_y'], SMALL_HEAD))
    torch_weights.write(tmp_path / 'a.pth', to_torch(variables, 'vissl'))
    model = torch.load(tmp_path / 'a.pth', weights_only=True)
    model = model['classy_state_dict']['base_model']['model']
    assert set(model) == {'trunk', 'heads'}
    assert set(model['heads']) == {
        *(f'0.projection_head.{i}.{leaf}' for i in (0, 1, 3) for leaf in ('weight', 'bias')),
        *(f'0.projection_head.1.{s}' for s in ('running_mean', 'running_var')),
        '0.projection_head.1.num_batches_tracked',
        '0.prototypes0.weight',
    }
    # ClassyVision's RegNet, as VISSL renames its stages.
    block = '_feature_blocks.res2.block1-0.'
    weights = {name.removeprefix(block) for name in model['trunk'] if name.startswith(block)}
    assert {name for name in weights if name.endswith('weight')} == {
        *('proj.weight', 'bn.weight', 'f.a.0.weight', 'f.a.1.weight', 'f.b.0.weight'),
        *('f.b.1.weight', 'f.se.excitation.0.weight', 'f.se.excitation.2.weight'),
        *('f.c.weight', 'f.final_bn.weight'),
    }
    assert {'_feature_blocks.conv1.stem.0.weight', '_feature_blocks.conv1.stem.1.running_var'} <= (
        set(model['trunk'])
    )


def test_swav_layout_has_the_official_names():
    variables = random_variables(model_config(SMALL, SMALL_HEAD))
    names = set(to_torch(variables, 'swav'))
    assert {'module.conv1.weight', 'module.layer2.0.downsample.1.running_mean'} <= names
    assert {'module.projection_head.3.bias', 'module.prototypes.weight'} <= names
    variables = random_variables(model_config(SMALL, SMALL_HEAD | HEADS['two heads']))
    assert 'module.prototypes.prototypes1.weight' in to_torch(variables, 'swav')


@pytest.mark.parametrize(
    'wrap',
    [
        lambda state: {'state_dict': state, 'optimizer': {'state': {0: torch.ones(3)}}, 'epoch': 7},
        lambda state: {'state_dict': state, 'best': np.float64(0.7), 'seen': np.arange(5)},
        lambda state: {'model': {f'module.{name}': tensor for name, tensor in state.items()}},
        lambda state: {name: tensor.double() for name, tensor in state.items()},
        lambda state: state | {'fc.weight': torch.ones(1000, 64), 'fc.bias': torch.ones(1000)},
        lambda state: {f'trunk._feature_blocks.{name}': tensor for name, tensor in state.items()},
        lambda state: {f'_feature_blocks.{name}': tensor for name, tensor in state.items()},
    ],
)
def test_checkpoints_as_they_are_found(wrap, tmp_path):
    variables = random_variables(model_config(SMALL))
    state = to_torch(variables, 'torchvision')
    state = {name: torch.from_numpy(value) for name, value in state.items()}
    torch.save(wrap(state), tmp_path / 'a.pth')
    loaded = load(zeros(variables), tmp_path / 'a.pth')
    assert_same(loaded['params']['trunk'], variables['params']['trunk'])
    assert_same(loaded['batch_stats']['trunk'], variables['batch_stats']['trunk'])


PREFIXES = (
    'module.', '_orig_mod.', 'backbone.', 'encoder_q.', 'student.', 'encoder.', 'model.', 'net.',
    'state_dict.', 'teacher.', 'online_network.',
)  # fmt: skip


def test_whatever_is_before_the_names_of_a_whole_trunk_is_found(tmp_path):
    beside = dict.fromkeys(('queue', 'optimizer.0', 'epoch.loss'), torch.ones(2))
    for settings in (SMALL, FAMILIES['regnet_y']):
        for layout in ('torchvision', 'swav', 'vissl'):
            state = to_torch(random_variables(model_config(settings, SMALL_HEAD)), layout)
            names = torch_weights.unwrapped(state, '').keys()
            pairs = itertools.permutations(PREFIXES, 2) if layout == 'torchvision' else ()
            for prefix in itertools.chain(PREFIXES, map(''.join, pairs)):
                wrapped = beside | {f'{prefix}{name}': 0 for name in state}
                assert torch_weights.unwrapped(wrapped, '').keys() == names, (layout, prefix)
            inside = {re.sub(r'(layer\d+|trunk_output)\.', r'\1._orig_mod.', n): 0 for n in state}
            assert torch_weights.unwrapped(inside, '').keys() == names
    variables = random_variables(model_config(SMALL))
    state = {n: torch.from_numpy(v) for n, v in to_torch(variables, 'torchvision').items()}
    state = {f'module._orig_mod.encoder_q.{name}': tensor for name, tensor in state.items()}
    torch.save({'state_dict': state | beside, 'optimizer': beside}, tmp_path / 'a.pth')
    loaded = load(zeros(variables), tmp_path / 'a.pth')
    assert_same(loaded['params']['trunk'], variables['params']['trunk'])


def test_of_several_models_in_a_file_one_is_named(tmp_path):
    variables = [random_variables(model_config(SMALL), seed) for seed in (0, 1)]
    student, teacher = (
        {name: torch.from_numpy(value) for name, value in to_torch(v, 'torchvision').items()}
        for v in variables
    )
    content = {
        'student': {f'module.backbone.{name}': value for name, value in student.items()},
        'teacher': {f'backbone.{name}': value for name, value in teacher.items()},
    }
    torch.save({'state_dict': content}, tmp_path / 'a.pth')
    with pytest.raises(UserError, match=r'several trunks, student\.module\.backbone\., teacher\.'):
        torch_weights.read(tmp_path / 'a.pth')
    for part, expected in zip(('student', 'teacher'), variables, strict=True):
        loaded = load(zeros(expected), f'{tmp_path}/a.pth:{part}')
        assert_same(loaded['params']['trunk'], expected['params']['trunk'])
    with pytest.raises(UserError, match="no tensors of 'ema'; their names begin with state_dict"):
        torch_weights.read(f'{tmp_path}/a.pth:ema')


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        (torch.full((8, 3, 7, 7), torch.nan), 'conv1.weight holds 1,176 values that are not fin'),
        (torch.full((8, 3, 7, 7), torch.inf), 'conv1.weight holds 1,176 values that are not fin'),
        (torch.full((8, 3, 7, 7), torch.nan).bfloat16(), 'conv1.weight holds 1,176 values'),
        (torch.full((8, 3, 7, 7), 1e300, dtype=torch.float64), 'too large for float32'),
        (torch.ones(8, 3, 7, 7, dtype=torch.int8), 'conv1.weight holds int8 numbers'),
        (torch.ones(8, 3, 7, 7, dtype=torch.bool), 'conv1.weight holds bool numbers'),
        (torch.ones(8, 3, 7, 7, dtype=torch.complex64), 'conv1.weight holds complex64 numbers'),
    ],
)
def test_weights_that_are_no_numbers_to_compute_with_are_refused(value, message, tmp_path):
    variables = random_variables(model_config(SMALL))
    state = {n: torch.from_numpy(v) for n, v in to_torch(variables, 'torchvision').items()}
    torch.save(state | {'conv1.weight': value}, tmp_path / 'a.pth')
    for allow_partial in (False, True):
        with pytest.raises(UserError, match=message):
            load(variables, tmp_path / 'a.pth', allow_partial=allow_partial)


def test_half_precision_weights_become_float32(tmp_path):
    variables = random_variables(model_config(SMALL))
    state = to_torch(variables, 'torchvision')
    state = {name: torch.from_numpy(value).bfloat16() for name, value in state.items()}
    torch.save(state, tmp_path / 'a.pth')
    loaded = load(zeros(variables), tmp_path / 'a.pth')
    ours, theirs = loaded['params']['trunk'], variables['params']['trunk']
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, jnp.bfloat16(b).astype(np.float32))


def test_coverage_is_printed_and_the_classifier_is_left_out_by_name(tmp_path, capsys):
    variables = random_variables(model_config(SMALL, SMALL_HEAD))
    state = to_torch(variables, 'torchvision') | {'fc.bias': np.ones(10, np.float32)}
    torch_weights.write(tmp_path / 'a.pth', state)
    loaded = load(zeros(variables), tmp_path / 'a.pth')
    out = capsys.readouterr().out
    assert 'trunk: 100 of 100 tensors loaded\n' in out
    assert 'head: 0 of 9 tensors loaded; 9 keep the values they had' in out
    assert 'missing: prototypes0.weight' in out
    assert 'left out, no part of this model: fc.bias' in out
    assert not any(leaf.any() for leaf in jax.tree.leaves(loaded['params']['head']))


@pytest.mark.parametrize(
    ('saved', 'message'),
    [
        (
            dict(depth=50, width_multiplier=0.125),
            'fills 77 of its 100 tensors.*165 unexpected.*23 misshapen',
        ),
        (dict(depth=34, width_multiplier=0.125), r'fills 100 of its 100 tensors \(.*unexpected'),
        (dict(depth=18, width_multiplier=0.25), 'conv1.weight .16, 3, 7, 7. instead of .8, 3'),
        (dict(name='regnet_y_400mf'), 'fills 0 of its 100 tensors'),
    ],
)
def test_weights_of_another_trunk_are_refused(saved, message, tmp_path):
    state = to_torch(random_variables(model_config(saved)), 'torchvision')
    torch_weights.write(tmp_path / 'a.pth', state)
    with pytest.raises(UserError, match=message) as error:
        load(random_variables(model_config(SMALL)), tmp_path / 'a.pth')
    assert '\n' not in str(error.value)


def test_a_partial_load_keeps_what_the_file_does_not_have(tmp_path):
    variables = random_variables(model_config(SMALL))
    state = to_torch(random_variables(model_config(SMALL), seed=1), 'torchvision')
    del state['conv1.weight']
    torch_weights.write(tmp_path / 'a.pth', state)
    with pytest.raises(UserError, match=r'fills 99 of its 100 tensors \(1 missing: conv1.weight\)'):
        load(variables, tmp_path / 'a.pth')
    loaded = load(variables, tmp_path / 'a.pth', allow_partial=True)['params']['trunk']
    kept, replaced = variables['params']['trunk'], loaded['layer1_0']['conv1']['kernel']
    np.testing.assert_array_equal(loaded['conv1']['kernel'], kept['conv1']['kernel'])
    assert (replaced != kept['layer1_0']['conv1']['kernel']).any()
    torch_weights.write(tmp_path / 'b.pth', {'other': np.ones(3, np.float32)})
    with pytest.raises(UserError, match='fills 0 of its 100 tensors'):
        load(variables, tmp_path / 'b.pth', allow_partial=True)


class RunsCode:
    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ('echo code of the file ran',)


def test_bad_files_are_one_clear_line(tmp_path, capfd):
    good = tmp_path / 'good.pth'
    torch.save({'conv1.weight': torch.ones(64, 3, 7, 7)}, good)
    (tmp_path / 'truncated.pth').write_bytes(good.read_bytes()[:-2000])
    (tmp_path / 'empty file.pth').touch()
    (tmp_path / 'text.pth').write_text('<!DOCTYPE html>')
    (tmp_path / 'text.safetensors').write_text('<!DOCTYPE html>')
    torch.save({'conv1.weight': RunsCode(print)}, tmp_path / 'code.pth')
    torch.save({'a': np.array([RunsCode(os.system)], object)}, tmp_path / 'array.pth')
    (tmp_path / 'pickle.pth').write_bytes(pickle.dumps({'a': RunsCode(os.system)}, protocol=2))
    torch.save({}, tmp_path / 'empty.pth')
    torch.save({'epoch': 3, 'names': ['a']}, tmp_path / 'no tensors.pth')
    for name, message in {
        'missing.pth': 'does not exist: give PyTorch weights or the folder of a run',
        'truncated.pth': 'is damaged or not of PyTorch',
        'empty file.pth': 'is damaged or not of PyTorch',
        'text.pth': 'is damaged or not of PyTorch',
        'text.safetensors': 'is damaged or not of PyTorch',
        'code.pth': 'holds Python objects, whose unpickling can run code',
        'array.pth': 'holds Python objects, whose unpickling can run code',
        'pickle.pth': 'holds Python objects, whose unpickling can run code',
        'empty.pth': 'holds no tensors',
        'no tensors.pth': 'holds no tensors',
    }.items():
        with pytest.raises(UserError, match=message) as error:
            torch_weights.read(tmp_path / name)
        assert '\n' not in str(error.value)
    assert capfd.readouterr().out == ''


def test_what_is_no_file_is_one_clear_line(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').touch()
    for name, message in {
        'pipe': 'is neither a file nor a folder',
        'folder': 'does not hold checkpoints',
        'file/a.pth': 'does not exist',
        'a' * 300: 'File name too long',
        'a' * 300 + ':student': 'File name too long',
        'two\nlines\x1b.pth': r'two\\nlines\\x1b.pth does not exist',
        'a\0b': 'a.x00b does not exist',
    }.items():
        with pytest.raises(UserError, match=message) as error:
            torch_weights.read(tmp_path / name)
        assert str(error.value).isprintable()
    with pytest.raises(UserError, match=r'~nosuchuser/a\.pth cannot be read'):
        torch_weights.read('~nosuchuser/a.pth')
    assert list((tmp_path / 'folder').iterdir()) == []


def test_a_file_that_cannot_be_written_whole_leaves_nothing(tmp_path, monkeypatch):
    state = {'a': np.ones(100_000, np.float32)}
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'target').touch()
    (tmp_path / 'link').symlink_to(tmp_path / 'target')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for file_format in torch_weights.FORMATS:
        for name in ('pipe', 'a' * 300, '.', '..'):
            with pytest.raises(UserError, match='cannot be written') as error:
                torch_weights.write(tmp_path / name, state, file_format)
            assert '\n' not in str(error.value)
        with pytest.raises(UserError, match='~nosuchuser/a cannot be written'):
            torch_weights.write('~nosuchuser/a', state, file_format)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as on a full disk
            with pytest.raises(UserError, match='full cannot be written'):
                torch_weights.write(tmp_path / 'full', state, file_format)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['link', 'pipe', 'target']
    assert stat.S_ISFIFO((tmp_path / 'pipe').stat().st_mode)
    monkeypatch.setenv('HOME', str(tmp_path))
    torch_weights.write('~/new/a.pth', state)
    assert (tmp_path / 'new' / 'a.pth').is_file()


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot be written'):
        torch_weights.write(tmp_path / 'file' / 'a.pth', {'a': np.ones(3, np.float32)})
    (tmp_path / 'taken.pth').mkdir()
    with pytest.raises(UserError, match='cannot be written'):
        torch_weights.write(tmp_path / 'taken.pth', {'a': np.ones(3, np.float32)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'taken.pth']
    with pytest.raises(UserError, match="format is 'onnx': choose one of pth, safetensors"):
        torch_weights.write(tmp_path / 'a', {}, 'onnx')
    with pytest.raises(UserError, match="layout is 'timm': choose one of torchvision, vissl, swav"):
        torch_weights.to_torch({}, 'timm', ResNet)


def test_import_does_not_import_torch():
    code = 'import sys, swav_jax.torch_weights; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)
