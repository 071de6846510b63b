"""`--plan`: its figures against counts by hand, and its warnings."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swav_jax import config as settings
from swav_jax.commands import plan, traced
from swav_jax.main import main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def show(capsys):
    """The plan that main prints."""

    def show(config, *flags):
        code = main([f'--config=configs/{config}.py', '--plan', *flags])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return show


def test_flops_of_convolutions_and_products():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), 'SAME', feature_group_count=2,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )  # fmt: skip

    x, kernel = jnp.zeros((3, 8, 8, 4)), jnp.zeros((3, 3, 2, 6))
    forward = 2 * (3 * 4 * 4 * 6) * (3 * 3 * 2)
    assert traced.cost(convolve, x, kernel)['flops'] == forward
    loop = lambda a: jax.lax.scan(lambda c, _: (c @ c, None), a, length=5)[0]  # noqa: E731
    assert traced.cost(loop, jnp.zeros((7, 7)))['flops'] == 5 * 2 * 7**3


@pytest.mark.slow
def test_the_paper_recipe_on_64_devices(show):
    """4,096 images a step; the issue's 76 GFLOP an image and 4 bytes a parameter sent."""
    out = show('swav_r50', '--replicas=64', '--config.data.source=synthetic:1281167x8')
    assert '64 replicas × 64 = 4,096 images' in out
    assert '312 an epoch (1,281,167 images), 124,800 in all' in out
    assert 'parameters            28,354,752' in out
    flops = float(out.partition('step and device, ')[2].split()[0])
    assert flops == pytest.approx(76 + 3, abs=3)  # trunk, and the cutting of the crops
    sent = float(out.partition('\nsent ')[2].split()[0])
    assert sent == pytest.approx(4 * 28.354752, rel=0.02)
    assert '--config.loss.epsilon=0.05' in out
    assert 'warning' not in out and 'nothing to warn of' in out
    curve = [line for line in out.splitlines() if '█' in line]
    assert len(curve) == 8 and max(map(len, curve)) == 60


@pytest.mark.slow
def test_slices_and_recomputing_show_in_the_memory():
    config = settings.default()
    config.data.source, config.data.batchsize_per_replica = 'synthetic:100000x8', 2
    config.model.trunk.depth = 50
    costs = []
    for sharding, remat in (('replicated', 'none'), ('zero', 'block')):
        config.sharding, config.model.remat = sharding, remat
        mesh = plan.AbstractMesh((1, 8), plan.meshes.AXES)
        sizes = settings.sizes(config, num_images=100_000, num_devices=8)
        schedule = plan.make_schedule(config, sizes)
        costs.append(plan.cost(config, sizes, schedule, mesh))
    whole, sliced = costs
    assert whole.num_params == sliced.num_params
    np.testing.assert_allclose(
        [sliced.params, sliced.opt_state], [whole.params / 8, whole.opt_state / 8], rtol=0.01
    )
    assert sliced.gathered == whole.params and sliced.kept < whole.kept / 2


@pytest.mark.parametrize(
    ('changes', 'warning'),
    [
        ({}, None),
        ({'model.head.num_clusters': (300,)}, 'set config.loss.queue.queue_length=256'),
        ({'data.limit': 500}, '500 images are fewer than 20 for each of 60 prototypes'),
        (
            {'model.temp_frozen_params_iter_map': (('head/prototypes0', 5000),)},
            'freezes for 5,000 of 936 steps',
        ),
        (
            {'loss.queue.queue_length': 128, 'loss.queue.start_iter': 2000},
            'the queue is full after step 2,002',
        ),
        (
            {
                'optimizer.param_schedulers.lr.schedulers': settings.warmup_cosine(
                    0.1, start_value=3.0, end_value=1.6
                ).schedulers
            },
            'the warm-up does not climb',
        ),
        ({'optimizer.param_schedulers.lr.lengths': (0.0001, 0.9999)}, 'shorter than a step'),
        (
            {
                'optimizer.param_schedulers.lr.schedulers': [
                    {'name': 'linear', 'start_value': 3, 'end_value': 1.6},
                    {'name': 'cosine', 'start_value': 1.6, 'end_value': 0},
                ]
            },
            'the warm-up does not climb',
        ),
        ({'optimizer.name': 'lars'}, None),
        ({'optimizer.name': 'lars', 'optimizer.use_larc': True}, 'optimizer.use_larc=True: set it'),
        ({'optimizer.name': 'lars', 'optimizer.larc_config.clip': True}, 'larc_config.clip=True'),
        ({'data.source': 'folder:/none'}, 'the plan assumes 1,281,167 images'),
    ],
)
def test_warnings_come_with_remedies(changes, warning):
    config = runpy.run_path(str(ROOT / 'configs' / 'demo.py'))['get_config']()
    config.update_from_flattened_dict(changes)
    num_images, warnings = plan.count_images(config)
    sizes = settings.sizes(config, num_images=num_images, num_devices=1)
    warnings += plan.warn(config, sizes, plan.make_schedule(config, sizes))
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]


def test_a_batch_larger_than_the_data_is_refused(capsys):
    flags = ['--config=configs/demo.py', '--plan', '--replicas=64', '--config.data.limit=100']
    assert main(flags) == 2
    assert "makes a batch of 4096 images, but 'demo' has only 100" in capsys.readouterr().err


@pytest.mark.parametrize('share', [0.6, 0.3, 0.001])
def test_as_few_micro_batches_as_fit_are_proposed(share):
    """Of the memory that the batch takes at once."""
    config = runpy.run_path(str(ROOT / 'scripts' / 'tiny.py'))['get_config']()
    config.data.batchsize_per_replica = 32
    mesh = plan.AbstractMesh((1, 1), plan.meshes.AXES)
    sizes = settings.sizes(config, num_images=32, num_devices=1)
    place = sizes, plan.make_schedule(config, sizes), mesh
    at_once = plan.cost(config, *place)
    memory = share * at_once.memory / plan.fit.USABLE
    lines = list(plan.fit.proposal(config, *place, at_once, memory))
    if share == 0.001:
        assert len(lines) == 1 and 'one image at a time takes' in lines[0]
        return
    turns, rows = (int(line.rpartition('=')[2]) for line in lines[1:3])
    assert turns > 1 and turns * rows == 32

    def cost(turns):
        config.train.micro_batches, config.data.batchsize_per_replica = turns, 32 // turns
        return plan.cost(config, *place)

    assert cost(turns).memory <= share * at_once.memory < cost(turns // 2).memory
    assert f'BatchNorm over {rows} images, {cost(turns).repeated:.2f} times' in lines[3]
    assert 1.2 < cost(turns).repeated < 1.5


def test_more_micro_batches_than_images_are_refused(capsys):
    flags = ['--config=configs/demo.py', '--plan', '--replicas=1', '--config.data.limit=100']
    assert main([*flags, '--config.train.micro_batches=2']) == 2
    error = capsys.readouterr().err
    assert 'on 1 device with config.train.micro_batches=2 makes a batch of 128' in error
    assert 'use at most 50, or fewer micro-batches' in error
    assert (
        main([*flags, '--config.train.micro_batches=60000', '--config.data.canvas_size=512']) == 2
    )
    assert (
        'config.train.micro_batches=60000 with config.data.canvas_size=512'
        in capsys.readouterr().err
    )


def test_the_learning_rate_is_drawn_to_scale():
    lines = list(plan.draw(np.array([0.0, 1.0, 2.0, 4.0]), 4, 2))
    assert lines == ['   █', ' ▄██']
