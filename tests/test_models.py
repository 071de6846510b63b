"""Trunks and head against torchvision: same features, same parameter counts, same errors."""

import json
import re
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from golden_weights import state_dict
from small_run import random_variables
from torchvision.models.regnet import BlockParams

from swav_jax import config, models, torch_weights
from swav_jax.config import trunks
from swav_jax.errors import UserError
from swav_jax.models.head import normalize
from swav_jax.models.pool import average_pool

GOLDEN = np.load(Path(__file__).parent / 'golden' / 'trunks.npz')
META = json.loads(str(GOLDEN['meta']))

TRUNKS = {
    'resnet18': dict(depth=18),
    'resnet34': dict(depth=34),
    'resnet50': dict(depth=50),
    'resnet101': dict(depth=101),
    'resnet152': dict(depth=152),
    'resnext50_32x4d': dict(depth=50, groups=32, width_per_group=4),
    'resnext101_32x8d': dict(depth=101, groups=32, width_per_group=8),
    'wide_resnet50_2': dict(depth=50, width_per_group=128),
    **{name: dict(name=name) for name in trunks.TRUNKS if name.startswith('regnet_')},
}

LARGE = ('resnet152', 'resnext101_32x8d', 'regnet_x_32gf', 'regnet_y_32gf', 'regnet_y_128gf')


def slow(names, among):
    """Names as parameters; those that are `among` others carry the marker."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in among else n for n in names]


def model_config(trunk=None, head=None):
    """`config.model` with some settings changed."""
    settings = config.default().model
    settings.trunk = trunks.section(**{'name': 'resnet'} | (trunk or {}))
    settings.head.update(head or {})
    return settings


def shapes(net, size=32, channels=3):
    """Shapes of the variables, without computing any."""
    crops = [jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)]
    return jax.eval_shape(lambda crops: net.init(jax.random.key(0), crops, False), crops)


def zeros(tree):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('name', slow(META, set(META) - {'resnet18'}))
def test_features_equal_torchvisions_to_rounding(name, tmp_path):
    golden = state_dict(dict(META[name]['names']))
    torch_weights.write(tmp_path / 'golden.pth', golden)
    images = np.random.default_rng([0, zlib.crc32(name.encode())])
    images = images.standard_normal((2, 64, 64, 3))
    with jax.enable_x64(True):
        net = models.build(model_config(TRUNKS[name]), dtype=jnp.float64)
        variables = torch_weights.load_into(zeros(shapes(net)), tmp_path / 'golden.pth', net.trunk)
        for mode in ('eval', 'train'):
            features, _ = jax.jit(
                lambda v, x, train=mode == 'train': net.apply(
                    v, x, train, method=lambda net, *args: net.trunk(*args), mutable=['batch_stats']
                )
            )(variables, images)
            assert features.dtype == jnp.float64
            np.testing.assert_allclose(features, GOLDEN[f'{name}/{mode}'], rtol=1e-9)


@pytest.mark.parametrize('grid', [1, 2, 3, 5])
def test_parts_of_a_map_are_pooled_like_torchs(grid):
    """In its order, with parts that overlap, and more parts than there are rows."""
    x = np.random.default_rng(0).standard_normal((2, 3, 7, 4))
    theirs = torch.nn.AdaptiveAvgPool2d(grid)(torch.tensor(x).movedim(-1, 1)).flatten(1)
    with jax.enable_x64(True):
        np.testing.assert_allclose(average_pool(jnp.asarray(x), grid), theirs, atol=1e-15)
    assert average_pool(jnp.ones((1, 2, 2, 3), jnp.bfloat16), grid).dtype == jnp.float32


def test_features_of_parts_average_to_those_of_the_whole():
    net = models.build(model_config(dict(depth=10, width_multiplier=0.125)))
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 128, 128, 3)), jnp.float32)
    variables = random_variables(net, 32, 3)
    look = jax.jit(
        lambda v, x, grid: net.apply(v, x, grid=grid, method='features'), static_argnums=2
    )
    whole, parts = (look(variables, images, grid) for grid in (1, 2))
    assert parts.shape == (2, 4 * whole.shape[1])
    np.testing.assert_allclose(parts.reshape(2, -1, 4).mean(-1), whole, rtol=1e-5, atol=1e-5)


def test_a_regnet_has_features_of_parts():
    net = models.build(model_config(dict(name='regnet_y_400mf')))
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    found = jax.eval_shape(
        lambda v, x: net.apply(v, x, grid=2, method='features'), shapes(net), images
    )
    assert found.shape == (2, 4 * 440)


@pytest.mark.parametrize('name', slow(TRUNKS, LARGE))
def test_trunk_has_as_many_parameters_and_features_as_torchvisions(name):
    net = models.build(model_config(TRUNKS[name]))
    params = shapes(net)['params']['trunk']
    reference = torch_models.trunk(name)
    assert count(params) == sum(p.numel() for p in reference.parameters())
    last = [m for m in reference.modules() if isinstance(m, torch.nn.BatchNorm2d)][-1]
    assert models.feature_width(net.trunk, 3) == last.num_features


def test_regnets_of_any_parameters_have_torchvisions_stages():
    rng = np.random.default_rng(0)
    for _ in range(300):
        depth, group_width = int(rng.integers(1, 40)), int(rng.integers(1, 600))
        w_0, w_a, w_m = 8 * int(rng.integers(1, 100)), rng.uniform(0, 300), rng.uniform(1.5, 4)
        reference = BlockParams.from_init_params(depth, w_0, w_a, w_m, group_width)
        stages = trunks.RegNet(depth, w_0, w_a, w_m, group_width).stages()
        assert [tuple(stage) for stage in stages] == list(
            zip(reference.depths, reference.widths, reference.group_widths, strict=True)
        )


def test_seeds_regnety_256gf():
    trunk = dict(name='regnet', depth=27, w_0=640, w_a=230.83, w_m=2.53, group_width=373)
    settings = model_config(trunk, dict(dims=(0, 10444, 128), use_bn=False))
    net = models.build(settings)
    params = shapes(net)['params']
    assert models.feature_width(net.trunk, 3) == 10444
    assert count(params['trunk']) == 1_272_156_138
    assert count(params) == 1_382_964_678


@pytest.mark.parametrize(('depth', 'multiplier'), [(18, 0.125), (34, 0.3), (50, 2), (50, 5)])
def test_width_multiplier_widens_all_stages_and_the_output(depth, multiplier):
    net = models.build(model_config(dict(depth=depth, width_multiplier=multiplier)))
    trunk = shapes(net)['params']['trunk']
    stem = round(64 * multiplier)
    assert trunk['conv1']['kernel'].shape == (7, 7, 3, stem)
    for stage in range(4):
        assert trunk[f'layer{stage + 1}_1']['conv1']['kernel'].shape[-1] == stem * 2**stage
    last = 'conv3' if depth == 50 else 'conv2'
    output = trunk['layer4_1'][last]['kernel'].shape[-1]
    assert output == models.feature_width(net.trunk, 3) == stem * (32 if depth == 50 else 8)


@pytest.mark.parametrize(
    ('trunk', 'size', 'last'),
    [
        (dict(depth=18), 224, 7),
        (dict(depth=50, layer4_stride=1), 224, 14),
        (dict(depth=18, stem='small', width_multiplier=0.125), 28, 4),
        (dict(name='regnet_y_400mf'), 224, 7),
        (dict(name='regnet_x_400mf', stem='small'), 32, 2),
    ],
)
def test_last_feature_map(trunk, size, last):
    net = models.build(model_config(trunk))
    images = jnp.zeros((1, size, size, 3))

    def outputs(images):
        variables = net.init(jax.random.key(0), [images], False)
        _, state = net.apply(
            variables, images, method='features', capture_intermediates=True, mutable=True
        )
        blocks = state['intermediates']['trunk'].items()
        return [b['__call__'][0] for name, b in blocks if name.startswith(('layer', 'block'))]

    assert min(out.shape[1] for out in jax.eval_shape(outputs, images)) == last


@pytest.mark.parametrize(
    ('trunk', 'message'),
    [
        (dict(name='resnet50'), "name='resnet50': must be one of resnet, regnet, regnet_y_400mf"),
        (dict(depth=51), 'depth=51: must be one of 10, 18, 34'),
        (dict(stem='tiny'), "stem='tiny': must be one of imagenet, small"),
        (dict(layer4_stride=3), 'layer4_stride=3: must be one of 1, 2'),
        (dict(width_multiplier=0.0), r'width_multiplier=0\.0: must be a number above 0'),
        (dict(depth=18, groups=32), 'depth 18 has no grouped convolutions'),
        (dict(name='regnet'), 'depth=0: must be a whole number from 1 to 256'),
    ],
)
def test_a_trunk_that_does_not_exist_is_refused(trunk, message):
    with pytest.raises(UserError, match=message):
        models.build(model_config(trunk))


def test_head_dims_must_begin_with_the_trunks_width():
    for dims in ((0, 64, 16), (None, 64, 16), (512, 64, 16)):
        head = shapes(models.build(model_config(dict(depth=18), dict(dims=dims))))['params']['head']
        assert head['linear0']['kernel'].shape == (512, 64)
    with pytest.raises(UserError, match='begins with 2048, but the trunk puts out 512 features'):
        models.build(model_config(dict(depth=18), dict(dims=(2048, 64, 16))))
    with pytest.raises(UserError, match='dims is'):
        models.build(model_config(dict(depth=18), dict(dims=(512,))))
    with pytest.raises(UserError, match="activation_name is 'swish': choose one of relu, gelu"):
        models.build(model_config(head=dict(activation_name='swish')))


HEADS = {
    'as VISSL has it': dict(),
    'three layers': dict(dims=(0, 20, 24, 16)),
    'one layer': dict(dims=(0, 16)),
    'no norm, no bias': dict(use_bn=False, use_bias=False),
    'norm at the end': dict(skip_last_bn=False),
    'gelu': dict(activation_name='GELU'),
    'no activation': dict(activation_name='none'),
    'not normalised': dict(normalize_feats=False),
    'two heads': dict(num_clusters=(7, 9)),
    'weight norm': dict(use_weight_norm_prototypes=True),
}


def torch_head(settings, width):
    """VISSL's swav_head, as its documentation describes it."""
    layers, dims = [], [width, *settings.dims[1:]]
    activation = {'relu': torch.nn.ReLU, 'gelu': torch.nn.GELU}.get(
        settings.activation_name.lower()
    )
    for i in range(1, len(dims)):
        layers.append(torch.nn.Linear(dims[i - 1], dims[i], bias=settings.use_bias))
        if i == len(dims) - 1 and settings.skip_last_bn:
            break
        layers += [torch.nn.BatchNorm1d(dims[i])] if settings.use_bn else []
        layers += [activation()] if activation else []
    head = torch.nn.Module()
    head.projection_head = torch.nn.Sequential(*layers)
    for i, clusters in enumerate(settings.num_clusters):
        linear = torch.nn.Linear(dims[-1], clusters, bias=False)
        if settings.use_weight_norm_prototypes:
            linear = torch.nn.utils.parametrizations.weight_norm(linear)
        setattr(head, f'prototypes{i}', linear)
    return head.double()


@pytest.mark.parametrize('name', HEADS)
@pytest.mark.parametrize('train', [False, True])
def test_head_equals_torchs(name, train, tmp_path):
    settings = model_config(
        dict(depth=18, width_multiplier=0.125), dict(dims=(0, 24, 16), num_clusters=(7,))
    )
    settings.head.update(HEADS[name])
    rng = np.random.default_rng(1)
    reference = torch_head(settings.head, 64)
    for tensor in reference.state_dict().values():
        if tensor.dtype == torch.float64:
            tensor.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, tensor.shape)))
    trunk = {'conv1.weight': torch.zeros(1, 1, 1, 1)}  # a trunk that the file fills
    torch.save(reference.state_dict() | trunk, tmp_path / 'head.pth')
    x = rng.standard_normal((12, 64))

    reference.train(train)
    with torch.no_grad():
        z = reference.projection_head(torch.from_numpy(x))
        z = torch.nn.functional.normalize(z) if settings.head.normalize_feats else z
        heads = range(len(settings.head.num_clusters))
        expected = [z, *(getattr(reference, f'prototypes{i}')(z) for i in heads)]

    with jax.enable_x64(True):
        net = models.build(settings, dtype=jnp.float64)
        head = zeros(jax.eval_shape(lambda: net.head.init(jax.random.key(0), jnp.array(x), False)))
        trunk = {'trunk': {'conv1': {'kernel': np.zeros((1, 1, 1, 1))}}}
        loaded = torch_weights.load_into(
            {
                'params': trunk | {'head': head['params']},
                'batch_stats': {'head': head.get('batch_stats', {})},
            },
            tmp_path / 'head.pth',
            net.trunk,
        )
        variables = {kind: tree.get('head', {}) for kind, tree in loaded.items()}
        (embeddings, scores), new = net.head.apply(variables, x, train, mutable=['batch_stats'])
        for ours, theirs in zip((embeddings, *scores), expected, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-10, atol=1e-12)
        norms = [m for m in reference.projection_head if isinstance(m, torch.nn.BatchNorm1d)]
        stats = sorted(new.get('batch_stats', {}).items())
        for (_, stat), norm in zip(stats, norms, strict=True):
            np.testing.assert_allclose(stat['mean'], norm.running_mean.numpy(), rtol=1e-10)
            np.testing.assert_allclose(stat['var'], norm.running_var.numpy(), rtol=1e-10)


def test_a_zero_embedding_has_length_zero_and_finite_gradient():
    value, grad = jax.value_and_grad(lambda x: normalize(x).sum())(jnp.zeros((2, 3)))
    assert value == 0
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(
    ('trunk', 'dtype'),
    [
        (dict(depth=18), jnp.float32),
        (dict(depth=18), jnp.bfloat16),
        (dict(name='regnet_y_400mf'), jnp.float16),
    ],
)
def test_half_precision_keeps_parameters_statistics_and_scores_in_float32(trunk, dtype):
    net = models.build(model_config(trunk), dtype=dtype)
    crops = [jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)]
    variables = shapes(net)

    def forward(variables, crops):
        return net.apply(variables, crops, True, mutable=['batch_stats'])

    for leaf in jax.tree.leaves((variables, jax.eval_shape(forward, variables, crops))):
        assert leaf.dtype == jnp.float32
    convolutions = re.findall(
        r':(\w+)\[\S* = conv_general_dilated', str(jax.make_jaxpr(forward)(variables, crops))
    )
    short = {jnp.float32: 'f32', jnp.bfloat16: 'bf16', jnp.float16: 'f16'}[dtype]
    assert set(convolutions) == {short}


def test_initial_weights_have_torchvisions_scale():
    net = models.build(model_config(dict(depth=18, zero_init_residual=True)))

    @jax.jit  # which leaves out what is not asked for
    def initial():
        params = net.init(jax.random.key(0), [jnp.zeros((1, 32, 32, 3))], False)['params']
        return params['trunk']['layer3_0'], params['head']['linear0']

    block, linear = initial()
    for name, fan_out in (('conv1', 9 * 256), ('conv2', 9 * 256), ('downsample_0', 256)):
        np.testing.assert_allclose(block[name]['kernel'].std(), (2 / fan_out) ** 0.5, rtol=0.02)
    np.testing.assert_array_equal(block['bn2']['scale'], 0)
    np.testing.assert_array_equal(block['bn1']['scale'], 1)
    for leaf in jax.tree.leaves(linear):
        np.testing.assert_allclose(np.abs(leaf).max(), 512**-0.5, rtol=0.01)
        np.testing.assert_allclose(leaf.std(), (3 * 512) ** -0.5, rtol=0.05)
