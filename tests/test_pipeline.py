"""Batches: order, boxes, pixels as PIL decodes them, and files that nobody can read."""

import io
import itertools
import subprocess
import sys
import tarfile

import torchvision  # isort: skip  (first: its triton crashes if TensorFlow is there already)
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
import torch
from PIL import Image

from swav_jax.config import default
from swav_jax.data import boxes, decode, pipeline, sources
from swav_jax.data.bad_images import BadImages
from swav_jax.errors import UserError


def settings(canvas=28, channels=1):
    data = default().data
    data.update(canvas_size=canvas, channels=channels, num_crops=(2, 3))
    return data


def first_batches(source, count, *, data=None, seed=0, global_batch=8, first_step=0, **kwargs):
    batches = pipeline.train_batches(
        source,
        data or settings(),
        seed=seed,
        global_batch=global_batch,
        first_step=first_step,
        **kwargs,
    )
    return list(itertools.islice(batches, count))


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


def demo(limit=0):
    return sources.open_source('demo', limit=limit, channels=1)


def test_batch_has_the_agreed_shapes_and_the_images():
    source = demo()
    (batch,) = first_batches(source, 1)
    shapes = {key: (x.shape, x.dtype) for key, x in batch.items()}
    assert shapes == {
        'image': ((8, 28, 28, 1), np.uint8),
        'size': ((8, 2), np.int32),
        'boxes': ((8, 5, 4), np.float32),
        'weight': ((8,), np.float32),
        'epoch': ((8,), np.int32),
        'position': ((8,), np.int32),
        'index': ((8,), np.int32),
    }
    np.testing.assert_array_equal(batch['image'], source.images[batch['index']])
    assert (batch['weight'] == 1).all() and (batch['size'] == 28).all()
    y, x, height, width = np.moveaxis(batch['boxes'], -1, 0)
    assert (
        (y >= 0).all() and (y + height <= 28).all() and (x >= 0).all() and (x + width <= 28).all()
    )
    assert (height * width)[:, :2].mean() > 2 * (height * width)[:, 2:].mean()


def test_an_epoch_reads_each_image_once_and_drops_the_rest():
    source = demo(limit=45)
    batches = first_batches(source, 10)  # two epochs of five steps of eight
    for epoch in (0, 1):
        part = batches[5 * epoch : 5 * epoch + 5]
        assert np.concatenate([b['position'] for b in part]).tolist() == list(range(40))
        assert len({i for b in part for i in b['index'].tolist()}) == 40
        assert all((b['epoch'] == epoch).all() for b in part)
    orders = [np.concatenate([b['index'] for b in batches[i : i + 5]]) for i in (0, 5)]
    assert (orders[0] == orders[1]).mean() < 0.3


def test_orders_of_epochs_and_seeds_are_unrelated():
    count = 100_000
    orders = [pipeline.permutation(count, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(count))
    pairs = [*itertools.combinations(orders, 2), (orders[0], np.arange(count))]
    pairs.append((orders[0][1:], orders[0][:-1]))
    for one, other in pairs:
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(count)


@pytest.mark.parametrize('processes', [2, 8])
def test_processes_split_the_same_batches(processes):
    source = demo()
    whole = first_batches(source, 3, first_step=1249)  # across the end of the first epoch
    parts = [
        first_batches(source, 3, first_step=1249, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    for step in range(3):
        joined = {key: np.concatenate([part[step][key] for part in parts]) for key in whole[step]}
        assert_same(joined, whole[step])


def test_a_batch_depends_on_seed_and_step_alone(tmp_path):
    source = folder_of_photos(tmp_path, 12)
    data = settings(canvas=64, channels=3)
    run = first_batches(source, 5, data=data, global_batch=4)
    for step in (0, 2, 4):
        assert_same(
            first_batches(source, 1, data=data, global_batch=4, first_step=step)[0], run[step]
        )
    (other,) = first_batches(source, 1, data=data, global_batch=4, seed=1)
    assert (other['boxes'] != run[0]['boxes']).mean() > 0.5
    # The draws belong to the position, not to the batch: a batch of other size has the same.
    (larger,) = first_batches(source, 1, data=data, global_batch=12)
    for key in ('index', 'boxes', 'image'):
        np.testing.assert_array_equal(larger[key][:4], run[0][key])


def test_starting_at_step_a_million_reads_only_its_batch(tmp_path):
    source = folder_of_photos(tmp_path, 8)
    reads = []
    read = type(source).read

    class Counting(sources.Source):
        labels = class_names = None

        def __len__(self):
            return 8

        def name(self, index):
            return str(index)

        def read(self, index):
            reads.append(index)
            return read(source, index)

        def _select(self, indices):
            raise AssertionError

    (batch,) = first_batches(Counting(), 1, data=settings(64, 3), first_step=10**6)
    assert (batch['epoch'] == 10**6).all() and len(reads) <= 8 * 64  # what is prefetched, no more


def test_batch_mistakes():
    with pytest.raises(UserError, match=r'5 images are fewer than the global batch of 8'):
        first_batches(demo(limit=5), 1)
    with pytest.raises(UserError, match='does not divide among 3 processes'):
        first_batches(demo(), 1, process_count=3)


# Boxes.


def our_boxes(height, width, scale, count=20_000):
    draws = boxes.draw(3, 1, 0, count // 20, 20)
    sizes = tf.tile([[height, width]], [count // 20, 1])
    found = boxes.random_resized(draws, sizes, np.tile(np.array([scale]), (20, 1)))
    return found.numpy().reshape(-1, 4)


@pytest.mark.parametrize(
    'height, width, scale',
    [
        (375, 500, (0.14, 1.0)),
        (375, 500, (0.05, 0.14)),
        (300, 90, (0.3, 1.0)),
        (28, 28, (0.2, 0.4)),
    ],
)
def test_boxes_follow_torchvisions_distribution(height, width, scale):
    ours = our_boxes(height, width, scale)
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array(
        [
            torchvision.transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
            for _ in range(20_000)
        ]
    )
    for name, of in {
        'y': lambda box: box[:, 0],
        'x': lambda box: box[:, 1],
        'height': lambda box: box[:, 2],
        'width': lambda box: box[:, 3],
        'area': lambda box: box[:, 2] * box[:, 3],
        'aspect': lambda box: box[:, 3] / box[:, 2],
        'y relative': lambda box: (box[:, 0] + 0.5) / (height - box[:, 2] + 1),
        'right': lambda box: box[:, 1] + box[:, 3],
    }.items():
        assert scipy.stats.ks_2samp(of(ours), of(theirs)).pvalue > 1e-4, name
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= (height, width)).all()


@pytest.mark.parametrize('height, width', [(20, 20_000), (20_000, 20), (1, 1), (4, 3), (1000, 700)])
def test_boxes_fall_back_to_torchvisions_centre(height, width):
    # No box of 2,000 times the area fits, so all tries fail.
    expected = torchvision.transforms.RandomResizedCrop.get_params(
        torch.empty(1, height, width), (2000.0, 2000.0), (3 / 4, 4 / 3)
    )
    ours = our_boxes(height, width, (2000.0, 2000.0), count=20)
    np.testing.assert_array_equal(ours, np.tile(expected, (20, 1)))


def test_box_draws_of_crops_positions_epochs_and_seeds_are_unrelated():
    draws = [boxes.draw(*key, 2, 4) for key in ((0, 0, 0), (0, 0, 2), (0, 1, 0), (1, 0, 0))]
    assert len(np.unique(draws)) == np.size(draws)
    np.testing.assert_array_equal(boxes.draw(0, 0, 1, 2, 4)[0], draws[0][1])
    np.testing.assert_array_equal(boxes.draw(0, 0, 1, 2, 4)[1], draws[1][0])
    far = boxes.draw(2**31, 2**31, 2**31, 2, 4)
    np.testing.assert_array_equal(boxes.draw(2**31, 2**31, 2**31 + 1, 1, 4)[0], far[1])


# Pixels.


def picture(height, width, seed=0, mode='RGB'):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC).convert(mode)


def folder_of_photos(root, count, size=(40, 56)):
    for i in range(count):
        picture(*size, seed=i).save(root / f'{i:03d}.jpg')
    return sources.open_source(f'folder:{root}', channels=3)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def frames(kind, **options):
    later = [picture(50, 70, seed=i) for i in range(1, 4)]
    return encode(picture(50, 70), kind, save_all=True, append_images=later, **options)


def readable_files():
    rng = np.random.default_rng(0)
    rgb = picture(50, 70)
    deep = Image.fromarray(rng.integers(0, 65_536, (50, 70), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: ignored, as torchvision does
    return {
        'rgb.jpg': encode(rgb, 'JPEG'),
        'gray.jpg': encode(rgb.convert('L'), 'JPEG'),
        'cmyk.jpg': encode(rgb.convert('CMYK'), 'JPEG'),
        'progressive.jpg': encode(rgb, 'JPEG', progressive=True),
        'sharp.jpg': encode(rgb, 'JPEG', subsampling=0, quality=100),
        'turned.jpg': encode(rgb, 'JPEG', exif=exif),
        'a_png_in_truth.JPEG': encode(rgb, 'PNG'),
        'rgb.png': encode(rgb, 'PNG'),
        'gray.png': encode(rgb.convert('L'), 'PNG'),
        'rgba.png': encode(Image.fromarray(rng.integers(0, 256, (50, 70, 4), np.uint8)), 'PNG'),
        'palette.png': encode(rgb.quantize(100), 'PNG'),
        'small_palette.png': encode(rgb.quantize(4), 'PNG', bits=2),
        'clear_palette.png': encode(rgb.quantize(100), 'PNG', transparency=bytes(range(100))),
        'gray_alpha.png': encode(rgb.convert('LA'), 'PNG'),
        'two_levels.png': encode(rgb.convert('1'), 'PNG'),
        'deep.png': encode(deep, 'PNG'),
        'rgb.bmp': encode(rgb, 'BMP'),
        'still.gif': encode(rgb.quantize(50), 'GIF'),
        'animated.gif': frames('GIF'),
        'rgb.webp': encode(rgb, 'WEBP'),
        'animated.webp': frames('WEBP'),
        'animated.png': frames('PNG'),
        'rgb.tif': encode(rgb, 'TIFF'),
        'rgb.ppm': encode(rgb, 'PPM'),
        'one_pixel.png': encode(picture(1, 1), 'PNG'),
        'one_pixel.jpg': encode(picture(1, 1), 'JPEG'),
    }


def unreadable_files():
    jpeg, png = encode(picture(50, 70), 'JPEG'), encode(picture(50, 70), 'PNG')
    bomb = bytearray(png)
    bomb[16:24] = (60_000).to_bytes(4, 'big') * 2
    large = bytearray(jpeg)
    at = large.index(b'\xff\xc0') + 5
    large[at : at + 4] = (65_000).to_bytes(2, 'big') * 2
    files = {
        'empty.jpg': b'',
        'empty.png': b'',
        'text.jpg': b'This is no image.\n' * 100,
        'html.png': b'<!DOCTYPE html><html></html>',
        'zeros.jpg': bytes(5000),
        'png_head.png': png[:33],
        'short_head.png': png[:20],
        'bomb.png': bytes(bomb),
        'bomb.jpg': bytes(large),
        'cut.gif': encode(picture(50, 70), 'GIF')[:300],
        'cut.webp': encode(picture(50, 70), 'WEBP')[:100],
        'cut.bmp': encode(picture(50, 70), 'BMP')[:1000],
        'script.jpg': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n9 9 moveto showpage\n',
    }
    for i, share in enumerate(np.linspace(0.02, 0.98, 7)):
        files[f'cut_{i}.jpg'] = jpeg[: int(share * len(jpeg))]
        files[f'cut_{i}.png'] = png[: int(share * len(png))]
    files['cut_progressive.jpg'] = encode(picture(50, 70), 'JPEG', progressive=True)[:900]
    files['noise.jpg'] = jpeg[:200] + np.random.default_rng(0).bytes(10) + b'\xff\xd9'
    return files


def write_all(root, files):
    for name, content in files.items():
        (root / name).write_bytes(content)


def decoded(source, channels, canvas=128):
    """(image, size, weight) by the image's name."""
    found = {}
    batches = pipeline.eval_batches(
        source, canvas_size=canvas, channels=channels, resize=32, size=32, batch_size=7
    )
    for batch in batches:
        for image, size, weight, index in zip(
            *(batch[key] for key in ('image', 'size', 'weight', 'index')), strict=True
        ):
            if index >= 0:
                name = source.name(index).rpartition('/')[2]
                assert name not in found
                found[name] = image, tuple(size.tolist()), weight
    return found


@pytest.mark.filterwarnings('ignore:Palette images')
@pytest.mark.parametrize('channels', [1, 3])
def test_pixels_are_pils(tmp_path, channels):
    write_all(tmp_path, readable_files())
    source = sources.open_source(f'folder:{tmp_path}', channels=channels)
    found = decoded(source, channels)
    assert len(found) == len(readable_files())
    for name, (image, (height, width), weight) in found.items():
        with Image.open(tmp_path / name) as opened:
            expected = np.asarray(opened.convert('RGB'))
        if channels == 1:
            expected = np.asarray(Image.fromarray(expected).convert('L'))[..., None]
        assert weight == 1 and expected.shape[:2] == (height, width), name
        np.testing.assert_array_equal(image[:height, :width], expected, err_msg=name)
        assert not image[height:].any() and not image[:, width:].any()


def test_unreadable_files_become_gray_and_are_listed(tmp_path):
    write_all(tmp_path, unreadable_files())
    for i in range(10):
        picture(50, 70, seed=i).save(tmp_path / f'good_{i}.jpg')
    (tmp_path / 'vanished.jpg').write_bytes(b'')
    source = sources.open_source(f'folder:{tmp_path}', channels=3)
    (tmp_path / 'vanished.jpg').unlink()
    bad = {*unreadable_files(), 'vanished.jpg'}
    assert len(bad) >= 30
    found = decoded(source, 3)
    for name, (image, size, weight) in found.items():
        assert (weight == 0) == (name in bad), name
        if name in bad:
            assert (image == 128).all() and size == (128, 128), name

    listed = BadImages(source, tmp_path / 'run.txt', max_bad_fraction=0.9)
    for batch in first_batches(source, 12, data=settings(64, 3), global_batch=10):
        assert np.isfinite(batch['boxes']).all()
        listed.update(batch['index'], batch['weight'])
    names = (tmp_path / 'run.txt').read_text().splitlines()
    assert sorted(names) == sorted(str(tmp_path / name) for name in bad)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith('.')]


def test_bad_images_are_listed_once_and_stop_the_run_above_the_limit(tmp_path):
    source, path = demo(limit=10), tmp_path / 'bad_images.txt'
    path.write_text('from an earlier run\ndemo:train[1000]\n')
    listed = BadImages(source, path, max_bad_fraction=0.3)
    names = [f'demo:train[{i}000]' for i in (1, 2, 3)]
    assert listed.update(np.array([0, 1, -1]), np.array([1.0, 0.0, 0.0])) == names[:1]
    assert listed.update(np.array([1, 2, 3]), np.array([0.0, 0.0, 0.0])) == names[1:]
    assert listed.update(np.array([1, 2, 3]), np.array([0.0, 0.0, 0.0])) == []
    assert path.read_text().splitlines() == ['from an earlier run', *names]
    with pytest.raises(UserError, match=r'4 of 10 images .*max_bad_fraction=0\.3') as caught:
        listed.update(np.array([9, 3]), np.array([0.0, 0.0]))
    assert '\n' not in str(caught.value) and str(path) in str(caught.value)
    assert path.read_text().splitlines()[-1] == 'demo:train[9000]'


def test_large_images_are_scaled_like_pil_and_boxes_with_them(tmp_path):
    sizes = {'wide.jpg': (90, 300), 'tall.png': (260, 128), 'line.png': (20_000, 20)}
    for name, (height, width) in sizes.items():
        picture(height, width).save(tmp_path / name, quality=95)
    source = sources.open_source(f'folder:{tmp_path}', channels=3)
    found = decoded(source, 3)
    assert found['wide.jpg'][1] == (38, 128)
    assert found['tall.png'][1] == (128, 63)
    assert found['line.png'][1] == (128, 1)
    for name, tolerance in (('tall.png', 1), ('wide.jpg', 3)):  # the JPEG is halved while decoding
        image, (height, width), _ = found[name]
        with Image.open(tmp_path / name) as opened:
            expected = np.asarray(opened.resize((width, height), Image.BILINEAR), np.float64)
        assert np.abs(image[:height, :width] - expected).mean() < tolerance
    data = settings(128, 3)
    data.crop_scales = ((1.0, 1.0), (0.1, 0.3))
    for batch in first_batches(source, 30, data=data, global_batch=3):
        ends = batch['boxes'][..., :2] + batch['boxes'][..., 2:]
        assert (batch['boxes'] >= 0).all() and (ends <= batch['size'][:, None] + 1e-3).all()
        assert (batch['boxes'][..., 2:] > 0).all()


def test_huge_jpegs_are_decoded_small():
    for longer, expected in ((1000, 1000), (1024, 512), (2047, 1024), (2048, 512), (9000, 1125)):
        encoded = encode(Image.new('RGB', (longer, 16)), 'JPEG')
        image, size = decode.decode(tf.constant(encoded), 512)
        assert image.shape[1] == expected and size.numpy().tolist() == [16, longer]


def test_order_is_kept_when_some_files_are_slow(tmp_path):
    # Every other image takes the slow way through PIL.
    for i in range(60):
        picture(40, 56, seed=i).save(tmp_path / f'{i:03d}.{"jpg" if i % 2 else "webp"}')
    source = sources.open_source(f'folder:{tmp_path}', channels=3)
    batches = pipeline.eval_batches(
        source, canvas_size=64, channels=3, resize=32, size=32, batch_size=16
    )
    for batch in batches:
        for image, index in zip(batch['image'], batch['index'], strict=True):
            if index >= 0:
                with Image.open(source.name(index)) as opened:
                    np.testing.assert_array_equal(
                        image[:40, :56], np.asarray(opened.convert('RGB'))
                    )


def test_archives_reach_the_batches(tmp_path):
    with tarfile.open(tmp_path / '0.tar', 'w') as archive:
        for i in range(10):
            content = encode(picture(40, 56, seed=i), 'PNG') if i != 4 else b'broken'
            info = tarfile.TarInfo(f'{i}.png')
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    source = sources.open_source(f'webdataset:{tmp_path}/0.tar', channels=3)
    found = decoded(source, 3)
    for i in range(10):
        image, _, weight = found[f'{i}.png']
        assert weight == (i != 4)
        if i != 4:
            np.testing.assert_array_equal(image[:40, :56], np.asarray(picture(40, 56, seed=i)))


# Evaluation.


def test_eval_batches_show_every_image_once_and_fill_the_last():
    source = demo(limit=10)
    batches = list(
        pipeline.eval_batches(source, canvas_size=28, channels=1, resize=28, size=28, batch_size=4)
    )
    assert [b['index'].tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
    assert batches[2]['weight'].tolist() == [1, 1, 0, 0]
    assert (batches[2]['image'][2:] == 128).all()
    np.testing.assert_array_equal(batches[1]['boxes'], np.tile([0, 0, 28, 28], (4, 1, 1)))
    with pytest.raises(UserError, match=r'config\.evaluate\.size=32 is larger'):
        pipeline.eval_batches(source, canvas_size=28, channels=1, resize=28, size=32, batch_size=4)


def test_one_channel_sources_serve_three_channel_runs():
    source = sources.open_source('demo', limit=4, channels=3)
    (batch,) = pipeline.eval_batches(
        source, canvas_size=32, channels=3, resize=28, size=28, batch_size=4
    )
    np.testing.assert_array_equal(batch['image'][:, :28, :28], source.images.repeat(3, -1))


def test_sources_open_without_tensorflow():
    code = (
        'import sys; from swav_jax.data import sources; sources.open_source("demo", channels=1); '
        'assert not {"tensorflow", "torch", "jax", "scipy"} & set(sys.modules)'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
