"""Every recipe builds: its settings are VISSL's, its network has shapes, its step can be traced."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swav_jax import config as settings
from swav_jax import methods, models, optim
from swav_jax.commands import traced
from swav_jax.config import recipes
from swav_jax.errors import UserError
from swav_jax.parallel import mesh as meshes
from swav_jax.state import make_state
from swav_jax.step import make_train_step

CONFIGS = Path(__file__).parents[1] / 'configs'
IMAGES = 1_281_167  # of ImageNet
MULTI6, MULTI4 = '2x224+6x96', '2x224+4x96'

# From VISSL's and the official files: trunk, head, crops, replicas, images a replica, queue, peak
# of the learning rate.
RECIPES = {
    'swav_r50': (dict(depth=50), (2048, 128), True, MULTI6, 64, 64, 0, 4.8),
    'swav_r50:100,2x224': (dict(depth=50), (2048, 128), True, '2x224', 64, 64, 0, 4.8),
    'swav_r50:2x160+4x96,800': (dict(depth=50), (2048, 128), True, '2x160+4x96', 64, 64, 0, 4.8),
    'swav_r50:6x160': (dict(depth=50), (2048, 128), True, '6x160', 64, 64, 0, 4.8),
    'swav_r50:8gpu': (dict(depth=50), (2048, 128), True, MULTI6, 8, 64, 0, 4.8),
    'swav_r50:2gpu': (dict(depth=50), (2048, 128), True, MULTI6, 2, 256, 0, 4.8),
    'swav_r50:4gpu': (dict(depth=50), (2048, 128), True, MULTI6, 4, 128, 0, 4.8),
    'swav_r50:16gpu': (dict(depth=50), (2048, 128), True, MULTI6, 16, 64, 0, 4.8),
    'swav_r50:32gpu': (dict(depth=50), (2048, 128), True, MULTI6, 32, 64, 0, 4.8),
    'swav_r50:64gpu': (dict(depth=50), (2048, 128), True, MULTI6, 64, 64, 0, 4.8),
    'swav_r50:1gpu,800': (dict(depth=50), (2048, 128), True, MULTI6, 1, 512, 0, 4.8),
    'swav_r50:head3': (dict(depth=50), (2048, 2048, 128), True, MULTI6, 64, 64, 0, 4.8),
    'swav_r50:head4096': (dict(depth=50), (4096, 128), True, MULTI6, 64, 64, 0, 4.8),
    'swav_r50_bs256': (dict(depth=50), (2048, 128), True, MULTI6, 4, 64, 3840, 0.6),
    'swav_r50_bs256:vissl,200': (dict(depth=50), (2048, 128), True, MULTI6, 4, 64, 3840, 0.6),
    'swav_r50_powerlaw': (dict(depth=50), (2048, 128), True, MULTI6, 64, 64, 0, 4.8),
    'swav_r50_restarts': (dict(depth=50), (2048, 128), True, MULTI6, 64, 64, 0, 4.8),
    'swav_r50_restarts:full': (dict(depth=50), (2048, 128), True, MULTI6, 64, 64, 0, 4.8),
    'swav_r50_restarts:half_warmup': (dict(depth=50), (2048, 128), True, MULTI6, 64, 64, 0, 4.8),
    'swav_resnet:r18': (dict(depth=18), (2048, 128), True, MULTI6, 64, 64, 0, 4.8),
    'swav_resnet:r34': (dict(depth=34), (2048, 128), True, MULTI6, 64, 64, 0, 4.8),
    'swav_resnet:r101': (dict(depth=101), (2048, 128), True, MULTI6, 64, 64, 0, 4.8),
    'swav_r50_wide:w2': (dict(width_multiplier=2), (8192, 128), True, MULTI4, 128, 32, 0, 4.8),
    'swav_r50_wide:w3': (dict(width_multiplier=3), (6144, 128), True, MULTI6, 64, 64, 0, 4.8),
    'swav_r50_wide:w4': (dict(width_multiplier=4), (8192, 128), True, MULTI4, 64, 40, 2560, 3.0),
    'swav_r50_wide:w5': (dict(width_multiplier=5), (10240, 128), False, MULTI4, 128, 12, 1536, 1.8),
    'swav_resnext': (dict(groups=32, width_per_group=4), (2048, 128), True, MULTI6, 64, 64, 0, 4.8),
    'swav_resnext:101-32x8d': (
        *(dict(depth=101, groups=32, width_per_group=8), (2048, 128)),
        *(True, MULTI6, 64, 64, 0, 4.8),
    ),
    'swav_regnety': (
        *(dict(name='regnet_y_400mf'), (440, 128)),
        *(True, MULTI6, 64, 64, 0, 4.8),
    ),
    'swav_regnety:3_2gf': (
        *(dict(name='regnet_y_3_2gf'), (1512, 128)),
        *(True, MULTI6, 64, 64, 0, 4.8),
    ),
    'swav_regnety:16gf': (
        *(dict(name='regnet_y_16gf'), (3024, 128)),
        *(False, MULTI6, 64, 64, 0, 4.8),
    ),
    'swav_regnety:128gf': (
        *(dict(name='regnet_y_128gf'), (7392, 128)),
        *(False, MULTI6, 64, 64, 0, 4.8),
    ),
    'swav_regnety:256gf': (
        *(dict(name='regnet', depth=27, w_0=640), (10444, 128)),
        *(False, MULTI6, 64, 64, 0, 4.8),
    ),
    'swav_regnety:256gf,proto16k': (
        *(dict(name='regnet', depth=27, w_0=640), (8192, 8192, 256)),
        *(False, MULTI6, 64, 64, 0, 4.8),
    ),
}


def get_config(name):
    file, _, arg = name.partition(':')
    spec = importlib.util.spec_from_file_location(file, CONFIGS / f'{file}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg) if arg else module.get_config()
    config.data.source = config.data.source or 'folder:/imagenet/train'
    return config


def learning_rate(config, sizes):
    return optim.learning_rate(
        config.optimizer.param_schedulers.lr,
        batch_size=sizes.batch_size,
        total_steps=sizes.total_steps,
        steps_per_epoch=sizes.steps_per_epoch,
    )


def test_every_file_is_tested():
    files = {path.stem for path in CONFIGS.glob('*.py')}
    small = {'demo', 'small_images', 'own_images', 'deepclusterv2_r50'}  # tests of their own
    assert files == {name.partition(':')[0] for name in RECIPES} | small


@pytest.mark.parametrize('name', RECIPES)
def test_settings_are_vissls(name):
    trunk, dims, use_bn, crops, replicas, batch, queue, peak = RECIPES[name]
    config = get_config(name)
    settings.validate(config)
    sizes = settings.sizes(config, num_images=IMAGES, num_devices=replicas)
    for key, value in trunk.items():
        assert config.model.trunk[key] == value
    assert config.model.head.dims == (0, *dims)
    assert config.model.head.use_bn == use_bn
    sized = zip(config.data.num_crops, config.data.size_crops, strict=True)
    assert '+'.join(f'{count}x{size}' for count, size in sized) == crops
    assert config.data.batchsize_per_replica == batch
    assert methods.make(config).queue_batches(sizes) * sizes.batch_size == queue
    rate = jax.vmap(learning_rate(config, sizes))(np.linspace(0, sizes.total_steps - 1, 2001))
    np.testing.assert_allclose(rate.max(), peak, rtol=2e-3)
    models.build(config.model)


@pytest.mark.parametrize(
    ('arg', 'crops', 'epochs'),
    [('', MULTI6, 800), (':400,2x160+4x96', '2x160+4x96', 400), (':400,2x224,8gpu', '2x224', 400)],
)
def test_deepcluster_settings_are_the_official_ones(arg, crops, epochs):
    config = get_config(f'deepclusterv2_r50{arg}')
    settings.validate(config)
    methods.make(config).check()
    expected = get_config(f'swav_r50:{crops},{epochs}')
    assert config.optimizer == expected.optimizer
    for name in ('num_crops', 'size_crops'):
        assert config.data[name] == expected.data[name]
    least = config.data.crop_scales[0][0]
    assert least == {MULTI6: 0.14, '2x160+4x96': 0.08, '2x224': 0.08}[crops]
    assert config.loss.crops_for_mb == (0, 1) and config.loss.temperature == 0.1
    assert config.model.head.num_clusters == (3000, 3000, 3000)
    sizes = settings.sizes(config, num_images=IMAGES, num_devices=8 if '8gpu' in arg else 64)
    assert sizes.batch_size == 4096


# One recipe of each network.
NETWORKS = {repr(recipe[:3]): name for name, recipe in reversed(RECIPES.items())}


@pytest.mark.parametrize('name', [*NETWORKS.values(), 'demo'])
def test_every_network_has_shapes(name):
    config = get_config(name)
    net = models.build(config.model, channels=config.data.channels)
    image = jax.ShapeDtypeStruct((1, 64, 64, config.data.channels), jnp.float32)

    (embeddings, scores), variables = jax.eval_shape(
        lambda image: net.init_with_output(jax.random.key(0), [image], False), image
    )
    assert embeddings.shape == (1, config.model.head.dims[-1])
    assert [s.shape for s in scores] == [(1, k) for k in config.model.head.num_clusters]
    width = models.feature_width(net.trunk, config.data.channels)
    params = variables['params']
    assert params['head']['linear0']['kernel'].shape[0] == width
    frozen = dict(config.model.temp_frozen_params_iter_map)
    optim.make_optimizer(config.optimizer, lambda step: 0.1, frozen, params)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['swav_r50_bs256', 'swav_regnety:256gf,proto16k'])
def test_one_step_has_shapes(name):
    """The step that a run compiles, on 8 devices, without allocating any of it."""
    config = get_config(name)
    mesh = meshes.make_mesh(config.model.sync_bn)
    sizes = settings.sizes(config, num_images=IMAGES, num_devices=mesh.size)
    made = {}

    def first_state():
        made['net'], made['tx'], made['layout'], state = make_state(
            config, sizes, learning_rate(config, sizes), mesh
        )
        return state

    state = jax.eval_shape(first_state)
    step = make_train_step(made['net'], made['tx'], config, made['layout'])
    batch = traced.batch_shapes(config, sizes.batch_size)
    after, metrics, _ = jax.eval_shape(step, state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    assert metrics['loss'].shape == ()


@pytest.mark.parametrize(
    ('name', 'word'),
    [
        ('swav_r50:300', '300'),
        ('swav_r50:400,800', '800'),
        ('swav_r50:2x224,fast', 'fast'),
        ('swav_resnext:50-32x5d', '50-32x5d'),
        ('swav_r50_restarts:200,quarter', 'quarter'),
        ('swav_resnet:r51', 'r51'),
        ('swav_r50_wide:w2,w3', 'w3'),
        ('swav_regnety:16gf,100gf', '100gf'),
    ],
)
def test_an_unknown_word_is_named(name, word):
    with pytest.raises(UserError, match=rf"--config: '{word}' after the colon is not known"):
        get_config(name)


def test_words_come_in_any_order():
    one, other = recipes.imagenet('200,2x224,head3'), recipes.imagenet('head3,200,2x224')
    assert settings.to_dict(one) == settings.to_dict(other)
