"""Pixels as PIL decodes them, and files that nobody can read."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from batches import demo, evaluated, first_batches, settings
from pictures import encode, picture, png, write_all
from PIL import Image

from swav_jax.data import decode, pillow, pipeline, sources
from swav_jax.data.bad_images import BadImages
from swav_jax.data.images import FileSource
from swav_jax.errors import UserError


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


def decoded(source, channels, canvas=128):
    """What `evaluated` returns, by the image's name."""
    found = evaluated(source, channels, canvas)
    return {source.name(index).rpartition('/')[2]: image for index, image in found.items()}


@pytest.mark.filterwarnings('ignore:Palette images')
@pytest.mark.parametrize('channels', [1, 3])
def test_pixels_are_pils(tmp_path, channels, capfd):
    write_all(tmp_path, readable_files())
    source = sources.open_source(f'folder:{tmp_path}', channels=channels)
    found = decoded(source, channels)
    assert len(found) == len(readable_files())
    for name, (image, (height, width), weight) in found.items():
        with Image.open(tmp_path / name) as opened:
            expected = np.asarray(opened.convert('RGB'))
            if name == 'deep.png':  # PIL clips what is above 255
                levels = np.rint(np.asarray(opened) / 257)
                expected = levels.astype(np.uint8)[..., None].repeat(3, -1)
        if channels == 1:
            expected = np.asarray(Image.fromarray(expected).convert('L'))[..., None]
        assert weight == 1 and expected.shape[:2] == (height, width), name
        np.testing.assert_array_equal(image[:height, :width], expected, err_msg=name)
        assert not image[height:].any() and not image[:, width:].any()
    assert capfd.readouterr().err == '', 'a decoder talks past us'


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


def peak_memory():
    """The most bytes of memory that this process had, since it was set back."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith('VmHWM'):
            return int(line.split()[1]) * 1024
    raise AssertionError


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='reads Linux counters')
@pytest.mark.parametrize('kind', ['png', 'webdataset'])
def test_a_decompression_bomb_is_never_decoded(tmp_path, kind):
    """20,000² pixels take 1.2 GB, and TensorFlow by itself refuses only more than that."""
    for side in (20_000, 50_000):
        bomb = png(side, side)
        assert len(bomb) < 2e6
        if kind == 'png':
            (tmp_path / f'{side}.png').write_bytes(bomb)
        else:
            with tarfile.open(tmp_path / 'shard.tar', 'a') as archive:
                info = tarfile.TarInfo(f'{side}.png')
                info.size = len(bomb)
                archive.addfile(info, io.BytesIO(bomb))
    spec = f'folder:{tmp_path}' if kind == 'png' else f'webdataset:{tmp_path}/shard.tar'
    source = sources.open_source(spec, channels=3)
    Path('/proc/self/clear_refs').write_text('5')  # sets the peak back
    before = peak_memory()
    assert {weight for _, _, weight in decoded(source, 3).values()} == {0}
    assert peak_memory() - before < 300e6


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


@pytest.mark.parametrize('damage', ['folder', 'bytes', 'escapes', 'gone'])
def test_a_damaged_list_of_bad_images_ends_no_run(tmp_path, damage):
    source, path = demo(limit=10), tmp_path / 'bad_images.txt'
    listed = BadImages(source, path, max_bad_fraction=1)
    listed.update(np.array([1]), np.array([0.0]))
    if damage == 'folder':
        path.unlink()
        (path / 'inside').mkdir(parents=True)
    elif damage == 'gone':
        path.unlink()
    else:
        path.write_bytes(b'\xff\xfe\x00\n' if damage == 'bytes' else b'\x1b[2J\n')
    listed.update(np.array([2]), np.array([0.0]))
    lines = path.read_text().splitlines()
    assert lines[-2:] == ['demo:train[1000]', 'demo:train[2000]'] and '\x1b' not in lines[0]
    kept = [other for other in tmp_path.iterdir() if other != path]
    assert [other.is_dir() for other in kept] == [True] * (damage == 'folder')


@pytest.mark.parametrize('size', [(375, 500), (700, 1300), (90, 300), (1100, 520), (9, 1500)])
@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_both_ways_of_decoding_see_the_same(tmp_path, size, kind):
    (tmp_path / 'a').write_bytes(encode(picture(*size), kind))
    source = FileSource([str(tmp_path / 'a')])
    slow, original, weight = pillow.decode_with_pil(source, 128, 3, 0)
    decoded, expected_original = decode.decode(tf.constant(source.read(0)), 128)
    expected = decode.shrink(decoded, 128).numpy().astype(int)
    assert weight == 1 and original.tolist() == expected_original.numpy().tolist() == list(size)
    assert slow.shape == expected.shape and np.abs(slow - expected).max() <= 1


def test_large_images_are_scaled_like_pil_and_boxes_with_them(tmp_path):
    sizes = {'wide.jpg': (90, 300), 'tall.png': (260, 128), 'line.png': (20_000, 20)}
    for name, (height, width) in sizes.items():
        picture(height, width).save(tmp_path / name, quality=95)
    source = sources.open_source(f'folder:{tmp_path}', channels=3)
    (batch,) = first_batches(source, 1, data=settings(128, 3), global_batch=3)
    found = {
        source.name(index).rpartition('/')[2]: (image, tuple(size.tolist()))
        for image, size, index in zip(batch['image'], batch['size'], batch['index'], strict=True)
    }
    assert found['wide.jpg'][1] == (38, 128)
    assert found['tall.png'][1] == (128, 63)
    assert found['line.png'][1] == (128, 1)
    for name, tolerance in (('tall.png', 1), ('wide.jpg', 3)):  # the JPEG is halved while decoding
        image, (height, width) = found[name]
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
