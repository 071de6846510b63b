"""Evaluation of images that are larger than the canvas: what torchvision would look at."""

import numpy as np
import pytest
from batches import first_batches, settings
from pictures import encode, picture
from PIL import Image
from torchvision.transforms import functional

from swav_jax import augment
from swav_jax.data import pipeline, sources
from swav_jax.data.images import ArraySource, FileSource

SHAPES = [
    (60, 300), (300, 60), (20, 600), (600, 21), (1, 500), (500, 1), (65, 64), (64, 64), (33, 71),
    (130, 130), (31, 65), (400, 399), (97, 1000),
]  # fmt: skip


def torchvisions(image, resize, size):
    return np.asarray(functional.center_crop(functional.resize(image, resize), size), np.float64)


def ours(source, channels, resize, size, canvas=64):
    data = settings(canvas, channels)
    data.mean, data.std = (0.0,) * channels, (1 / 255,) * channels
    for batch in pipeline.eval_batches(
        source, canvas_size=canvas, channels=channels, resize=resize, size=size, batch_size=13
    ):
        assert (batch['weight'][batch['index'] >= 0] == 1).all()
        crops = np.asarray(augment.center_crop(batch, size=size, data=data))
        for crop, index in zip(crops, batch['index'], strict=True):
            if index >= 0:
                yield index, crop


@pytest.mark.parametrize('resize, size, canvas', [(32, 28, 64), (40, 33, 64), (37, 37, 20)])
def test_any_shape_is_torchvisions_resize_and_crop(tmp_path, resize, size, canvas):
    """Fine noise is the hardest: two ways to scale it down differ by tens of levels."""
    rng = np.random.default_rng(0)
    for i, shape in enumerate(SHAPES):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(tmp_path / f'{i}.png')
        picture(*shape).save(tmp_path / f'{i}.jpg')
    source = sources.open_source(f'folder:{tmp_path}', channels=3)
    seen = 0
    for index, crop in ours(source, 3, resize, size, canvas):
        with Image.open(source.name(index)) as image:
            error = np.abs(crop - torchvisions(image, resize, size))
        assert error.mean() <= 0.25 and error.max() <= 1.01, (source.name(index), error.max())
        seen += 1
    assert seen == 2 * len(SHAPES)


@pytest.mark.parametrize('have, want', [(1, 1), (3, 3), (1, 3), (3, 1), (5, 5), (4, 4)])
def test_arrays_larger_than_the_canvas_too(have, want):
    images = np.random.default_rng(0).integers(0, 256, (3, 60, 300, have), np.uint8)
    for index, crop in ours(ArraySource('noise', images), want, 32, 28):
        for channel in range(want):
            plane = images[index]
            if have != want:
                mode = 'RGB' if want == 3 else 'L'
                picture = Image.fromarray(plane if have == 3 else plane[..., 0]).convert(mode)
                plane = np.asarray(picture).reshape(60, 300, want)
            expected = torchvisions(Image.fromarray(plane[..., channel]), 32, 28)
            assert np.abs(crop[..., channel] - expected).max() <= 1.01


def test_training_keeps_wide_pictures_whole(tmp_path):
    """The crops of a wide picture come from a strip of the canvas, as their boxes say."""
    Image.fromarray(np.tile(np.uint8([[[0], [255]]]), (60, 150, 3))).save(tmp_path / 'a.png')
    (tmp_path / 'b.jpg').write_bytes(encode(picture(600, 3000), 'JPEG'))
    source = FileSource([str(tmp_path / name) for name in ('a.png', 'b.jpg')])
    (batch,) = first_batches(source, 1, data=settings(64, 3), global_batch=2)
    for size in batch['size']:
        assert size.tolist() == [13, 64]
    ends = batch['boxes'][..., :2] + batch['boxes'][..., 2:]
    assert (ends <= batch['size'][:, None] + 1e-3).all()
    striped = batch['image'][batch['index'].tolist().index(0)]
    assert np.abs(striped[:13].astype(int) - 127.5).max() < 40, 'stripes of a pixel become gray'
