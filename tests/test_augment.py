"""Crops and distortions against PIL and torchvision, and their distributions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from jax.sharding import PartitionSpec
from PIL import Image, ImageFilter
from torchvision.transforms import functional

from swav_jax import augment
from swav_jax.augment import crop, distortion
from swav_jax.config import default
from swav_jax.data import pipeline, sources

LEVEL = 1 / 255


def photo(height, width, channels=3, seed=0):
    """A smooth picture with some noise, uint8: what a resampling error shows up on."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))
    noisy = smooth + rng.normal(0, 10, smooth.shape)
    return noisy.clip(0, 255).astype(np.uint8)[..., :channels]


def to_torch(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def from_torch(image):
    return image.permute(1, 2, 0).numpy()


def assert_close(ours, theirs, mean, worst):
    """Both in [0, 1]; the tolerances are gray levels."""
    error = np.abs(np.asarray(ours, np.float64) - theirs) / LEVEL
    assert error.mean() <= mean and error.max() <= worst, (error.mean(), error.max())


@pytest.mark.parametrize('size', [224, 96])
@pytest.mark.parametrize(
    'box', [(0, 0, 375, 500), (37, 101, 250, 263), (300, 450, 60, 40), (10, 20, 41, 300)]
)
def test_cut_is_pils_crop_and_resize(box, size):
    image = photo(375, 500)
    canvas = np.zeros((512, 512, 3), np.uint8)
    canvas[:375, :500] = image
    y, x, height, width = box
    expected = Image.fromarray(image).crop((x, y, x + width, y + height))
    expected = np.asarray(expected.resize((size, size), Image.BILINEAR)) / 255
    ours = crop.cut(jnp.array(canvas), jnp.array(box, jnp.float32), size)
    assert_close(ours, expected, 0.1, 1.01)


def test_cut_reads_only_the_box():
    canvas = np.full((64, 64, 1), 255, np.uint8)
    canvas[10:20, 30:40] = 51
    ours = crop.cut(jnp.array(canvas), jnp.array([10.0, 30.0, 10.0, 10.0]), 28)
    np.testing.assert_allclose(ours, 0.2, atol=1e-6)


@pytest.mark.parametrize(
    'box', [(0.0, 0.0, 0.3, 30.0), (3.4, 7.7, 0.9, 0.2), (63.5, 0.0, 0.5, 64.0)]
)
def test_cut_of_less_than_a_pixel_is_finite(box):
    canvas = np.full((64, 64, 3), 51, np.uint8)
    ours = crop.cut(jnp.array(canvas), jnp.array(box), 8)
    np.testing.assert_allclose(ours, 0.2, atol=1e-6)


def test_cut_of_a_fractional_box_moves_continuously():
    canvas = jnp.array(photo(64, 64))
    whole = np.asarray(crop.cut(canvas, jnp.array([8.0, 5.0, 30.0, 30.0]), 16))
    for start in (7.99, 8.01):
        ours = crop.cut(canvas, jnp.array([start, 5.0, 30.0, 30.0]), 16)
        assert_close(ours, whole, 0.5, 2)


@pytest.mark.parametrize('resize, size', [(128, 112), (64, 64), (200, 97)])
def test_center_crop_of_files_is_torchvisions(tmp_path, resize, size):
    for i, shape in enumerate([(375, 500), (500, 333), (300, 300), (71, 500), (90, 91)]):
        Image.fromarray(photo(*shape, seed=i)).save(tmp_path / f'{i}.png')
    source = sources.open_source(f'folder:{tmp_path}', channels=3)
    (batch,) = pipeline.eval_batches(
        source, canvas_size=512, channels=3, resize=resize, size=size, batch_size=len(source)
    )
    data = default().data
    ours = augment.center_crop(batch, size=size, data=data)
    for i in range(len(source)):
        with Image.open(source.name(i)) as image:
            expected = functional.center_crop(functional.resize(image, resize), size)
        pixels = ours[i] * np.array(data.std) + np.array(data.mean)
        assert_close(pixels, np.asarray(expected) / 255, 0.1, 1.01)


FACTORS = [
    (0.3, 1.7, 0.2, 0.2),
    (1.8, 0.2, 1.8, -0.2),
    (1.2, 1.3, 0.0, 0.07),
    (0.2, 0.9, 1.1, -0.13),
]


@pytest.mark.parametrize('factors', FACTORS)
def test_jitter_is_torchvisions_in_every_order(factors):
    image = photo(96, 96, seed=3) / np.float32(255)
    operations = [
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    ]
    jitter = jax.jit(distortion.jitter)
    for order in itertools.permutations(range(4)):
        expected = to_torch(image)
        for operation in order:
            expected = operations[operation](expected, factors[operation])
        ours = jitter(jnp.array(image), jnp.array(order), jnp.array(factors, jnp.float32))
        assert_close(ours, from_torch(expected), 0.1, 1)


@pytest.mark.parametrize('factors', FACTORS)
def test_jitter_is_pils_up_to_its_rounding(factors):
    # PIL cuts off the fraction after each operation: half a level, on average, for each.
    image = photo(96, 96, seed=4)
    expected = Image.fromarray(image)
    expected = functional.adjust_brightness(expected, factors[0])
    expected = functional.adjust_contrast(expected, factors[1])
    expected = functional.adjust_saturation(expected, factors[2])
    ours = distortion.jitter(
        jnp.array(image / np.float32(255)), jnp.arange(3), jnp.array(factors, jnp.float32)
    )
    assert_close(ours, np.asarray(expected) / 255, 1.5, 4)


def test_hue_of_gray_black_and_primaries():
    colours = np.array(
        [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]],
        np.float32,
    )[None]
    for turn in (-0.5, -0.2, 0.0, 1 / 3, 0.5):
        expected = from_torch(functional.adjust_hue(to_torch(colours), turn))
        np.testing.assert_allclose(
            distortion.turn_hue(jnp.array(colours), turn), expected, atol=1e-5
        )


def test_one_channel_jitter_keeps_brightness_and_contrast():
    image = photo(28, 28, channels=1) / np.float32(255)
    ours = distortion.jitter(jnp.array(image), jnp.array([1, 0]), jnp.array([0.6, 1.5, 0.1, 0.2]))
    expected = functional.adjust_contrast(to_torch(image), 1.5)
    expected = functional.adjust_brightness(expected, 0.6)
    assert_close(ours, from_torch(expected), 0.1, 1)


@pytest.mark.parametrize('size, sigma', [(96, 0.1), (96, 0.7), (96, 2.0), (16, 2.0)])
def test_blur_is_torchvisions_gaussian_and_near_pils(size, sigma):
    image = photo(size, size, seed=5)
    pixels = image / np.float32(255)
    ours = distortion.blur(jnp.array(pixels), jnp.float32(sigma), max_sigma=2.0)
    padded = np.pad(pixels, ((8, 8), (8, 8), (0, 0)), mode='edge')
    expected = functional.gaussian_blur(to_torch(padded), 17, sigma)
    assert_close(ours, from_torch(expected)[8:-8, 8:-8], 0.01, 0.05)
    pil = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))) / 255
    assert_close(ours, pil, 1, 6)


def test_no_blur_and_no_jitter_change_nothing():
    image = jnp.array(photo(32, 32) / np.float32(255))
    np.testing.assert_array_equal(distortion.blur(image, jnp.float32(0), max_sigma=2.0), image)
    same = distortion.jitter(image, jnp.array([3, 1, 0, 2]), jnp.array([1.0, 1.0, 1.0, 0.0]))
    np.testing.assert_allclose(same, image, atol=1e-6)


def test_flip_and_gray():
    image = photo(32, 32) / np.float32(255)
    choice = distortion.Distortion(
        flip=jnp.array(True),
        order=jnp.arange(4),
        factors=jnp.array([1.0, 1.0, 1.0, 0.0]),
        gray=jnp.array(True),
        sigma=jnp.float32(0),
    )
    ours = distortion.distort(jnp.array(image), choice, max_sigma=2.0)
    expected = functional.rgb_to_grayscale(functional.hflip(to_torch(image)), 3)
    assert_close(ours, from_torch(expected), 0.1, 1)


def choices(count, channels=3, **settings):
    config = default().augment
    config.update(settings)
    keys = jax.random.split(jax.random.key(7), count)
    return jax.vmap(lambda key: distortion.draw(key, config, channels))(keys)


def test_draws_follow_torchvisions_distributions():
    count = 20_000
    drawn = jax.tree.map(np.asarray, choices(count))
    jittered = drawn.factors[:, 0] != 1

    def share(hits, p, trials=count):
        assert scipy.stats.binomtest(int(hits.sum()), trials, p).pvalue > 1e-4

    share(drawn.flip, 0.5)
    share(jittered, 0.8)
    share(drawn.gray, 0.2)
    share(drawn.sigma > 0, 0.5)
    uniform = scipy.stats.uniform
    for column, low, high in ((0, 0.2, 1.8), (1, 0.2, 1.8), (2, 0.2, 1.8), (3, -0.2, 0.2)):
        sample = drawn.factors[jittered, column]
        assert scipy.stats.kstest(sample, uniform(low, high - low).cdf).pvalue > 1e-4
    assert scipy.stats.kstest(drawn.sigma[drawn.sigma > 0], uniform(0.1, 1.9).cdf).pvalue > 1e-4
    orders = np.unique(drawn.order, axis=0, return_counts=True)
    assert len(orders[0]) == 24
    assert scipy.stats.chisquare(orders[1]).pvalue > 1e-4
    # What the choices have in common is nothing: no pair is correlated.
    table = np.stack(
        [drawn.flip, jittered, drawn.gray, drawn.sigma > 0, *drawn.factors.T, *drawn.order.T]
    )
    correlation = np.corrcoef(table[:, jittered & (drawn.sigma > 0)][[0, 2, 4, 5, 6, 7]])
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.05


def test_strength_above_one_is_cut_at_zero():
    drawn = choices(2000, brightness=1.5, color_jitter_p=1.0)
    assert 0 <= drawn.factors[:, 0].min() < 0.01 and 2.4 < drawn.factors[:, 0].max() <= 2.5


def crop_settings(channels=3, num_crops=(2, 3), size_crops=(24, 12)):
    data = default().data
    data.update(num_crops=num_crops, size_crops=size_crops, canvas_size=40, channels=channels)
    data.update(mean=(0.4,) * channels, std=(0.2,) * channels)
    return data


def small_batch(rows=8, channels=3, crops=5):
    rng = np.random.default_rng(0)
    boxes = rng.uniform((0, 0, 8, 8), (20, 20, 20, 20), (rows, crops, 4))
    return {
        'image': np.stack([photo(40, 40, channels, seed) for seed in range(rows)]),
        'size': np.full((rows, 2), 40, np.int32),
        'boxes': boxes.astype(np.float32),
        'epoch': np.full(rows, 3, np.int32),
        'position': np.arange(10, 10 + rows, dtype=np.int32),
    }


@functools.cache
def renderer(channels=3):
    return jax.jit(
        functools.partial(
            augment.multi_crop, seed=5, data=crop_settings(channels), augment=default().augment
        )
    )


@pytest.mark.parametrize('channels', [1, 3, 2])
def test_multi_crop_shapes_and_order(channels):
    batch, render = small_batch(channels=channels), renderer(channels)
    large, small = render(batch)
    assert large.shape == (16, 24, 24, channels) and small.shape == (24, 12, 12, channels)
    # Rolled by three rows, the crops of an image are found at its new place in every crop's block.
    rolled = render(jax.tree.map(lambda x: np.roll(x, 3, 0), batch))
    for ours, before in zip(rolled, (large, small), strict=True):
        blocks = before.reshape(-1, 8, *before.shape[1:])
        np.testing.assert_allclose(ours.reshape(blocks.shape), np.roll(blocks, 3, 1), atol=1e-5)


def test_multi_crop_draws_depend_on_seed_epoch_position_and_crop():
    batch, render = small_batch(), renderer()
    batch['image'][:] = batch['image'][:1]
    batch['boxes'][:] = batch['boxes'][:1, :1]
    large, _ = render(batch)
    assert len({np.asarray(crop).tobytes() for crop in large}) == 16
    again, _ = render(batch)
    np.testing.assert_array_equal(large, again)
    batch['epoch'] += 1
    later, _ = render(batch)
    assert (np.abs(later - large).max(axis=(1, 2, 3)) > 0.1).mean() > 0.9


def test_multi_crop_without_distortions_is_cut():
    batch = small_batch(crops=2)
    config = default().augment
    config.update(dict.fromkeys(('flip_p', 'color_jitter_p', 'grayscale_p', 'blur_p'), 0.0))
    data = crop_settings(num_crops=(2,), size_crops=(24,))
    render = functools.partial(augment.multi_crop, seed=0, data=data, augment=config)
    (crops,) = jax.jit(render)(batch)
    expected = crop.cut(jnp.array(batch['image'][2]), jnp.array(batch['boxes'][2, 1]), 24)
    np.testing.assert_allclose(crops[8 + 2], (expected - 0.4) / 0.2, atol=1e-4)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_multi_crop_comes_in_the_type_that_was_asked_for(dtype):
    render = functools.partial(
        augment.multi_crop, seed=0, data=crop_settings(), augment=default().augment, dtype=dtype
    )
    assert [crops.dtype for crops in jax.eval_shape(render, small_batch())] == [dtype] * 2


def test_multi_crop_is_the_same_on_eight_devices():
    batch = small_batch(rows=16, channels=1, crops=2)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ('group', 'member'))
    data = crop_settings(channels=1, num_crops=(1, 1), size_crops=(12, 8))
    render = functools.partial(augment.multi_crop, seed=5, data=data, augment=default().augment)
    rows = PartitionSpec(('group', 'member'))
    sharded = jax.jit(
        jax.shard_map(render, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=True)
    )(batch)
    for ours, alone in zip(sharded, jax.jit(render)(batch), strict=True):
        np.testing.assert_allclose(ours, alone, atol=1e-5)


def test_three_channels_trace_under_shard_map():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ('member',))
    render = functools.partial(
        augment.multi_crop, seed=5, data=crop_settings(), augment=default().augment
    )
    rows = PartitionSpec('member')
    sharded = jax.shard_map(render, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=True)
    large, _ = jax.eval_shape(sharded, small_batch())
    assert large.shape == (16, 24, 24, 3)
