"""Files that would hang a reader, take its memory, or mean something else than they seem to."""

import logging
import os
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from batches import evaluated, first_batches, settings
from pictures import encode, picture, png, write_all
from PIL import Image
from processes import environment

from swav_jax.data import images, pillow
from swav_jax.data.images import FileSource
from swav_jax.evaluate import gallery


def looked_at(source, channels=3, canvas=64):
    """(image, weight) by number, as evaluation has them; training has the same weights."""
    found = {
        index: (image[: size[0], : size[1]], weight)
        for index, (image, size, weight) in evaluated(source, channels, canvas).items()
    }
    (batch,) = first_batches(source, 1, data=settings(canvas, channels), global_batch=len(source))
    assert np.isfinite(batch['boxes']).all()
    for index, weight in zip(batch['index'], batch['weight'], strict=True):
        assert weight == found[int(index)][1], source.name(index)
    return found


def file_source(root, files):
    write_all(root, files)
    return FileSource([str(root / name) for name in files])


def test_what_is_no_regular_file_is_unreadable_and_hangs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(images, 'MAX_FILE_BYTES', 2**26)
    os.mkfifo(tmp_path / 'pipe.jpg')
    (tmp_path / 'folder.jpg').mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / 'socket.jpg'))
        for device in ('zero', 'null', 'random'):
            (tmp_path / f'{device}.png').symlink_to(f'/dev/{device}')
        (tmp_path / 'loop.png').symlink_to('loop.png')
        with (tmp_path / 'sparse.png').open('wb') as file:
            file.write(png(10, 10))
            file.truncate(2**27)
        names = [path.name for path in sorted(tmp_path.iterdir())]
        names += ['missing.jpg', 'n' * 300 + '.jpg', 'a\0b.jpg', 'sound.png']
        picture(20, 30).save(tmp_path / 'sound.png')
        source = FileSource([str(tmp_path / name) for name in names])
        found = looked_at(source)
        for index, name in enumerate(names):
            assert found[index][1] == (name == 'sound.png'), name
            if name != 'sound.png':
                with pytest.raises((OSError, ValueError)):
                    source.read(index)


def test_extreme_shapes_are_read_or_unreadable(tmp_path):
    """17,000,000 pixels in a line ended a run."""
    files = {f'{w}x{h}.png': png(w, h) for w, h in ((17_000_000, 1), (1, 70_000), (1, 70_001))}
    for size in ((65_500, 1), (1, 65_500), (65_500, 3)):
        files[f'{size}.jpg'] = encode(Image.new('L', size, 90), 'JPEG')
        files[f'{size}.tif'] = encode(Image.new('RGB', size, (90, 9, 0)), 'TIFF')
    source = file_source(tmp_path, files)
    found = looked_at(source)
    assert [weight for _, weight in found.values()] == [1] * len(files)
    for index, name in enumerate(files):
        level = {'jpg': 90, 'tif': 90, 'png': 0}[name[-3:]]
        assert (np.abs(found[index][0][..., 0].astype(int) - level) <= 1).all(), name
        if '17' not in name:
            assert gallery.thumbnail(source, index, 16).shape == (16, 16, 3)


RAMP = np.linspace(0, 65_535, 20 * 30).reshape(20, 30).astype(np.uint16)
LEVELS = np.rint(RAMP / 257)
UNIT = np.float32(RAMP / 65_535)


def pgm(array, maxval):
    return b'P5\n%d %d\n%d\n' % (array.shape[1], array.shape[0], maxval) + array.tobytes()


def deep_files():
    """Name: (content, levels that the first channel should have, or None of the unreadable)."""
    big = RAMP.astype('>u2')
    signed = (RAMP // 2).astype(np.int16)
    wide = Image.fromarray(RAMP.astype(np.int32))
    lab = Image.merge('LAB', [Image.new('L', (30, 20), 90)] * 3)
    missing = UNIT.copy()
    missing[3, 4] = np.nan
    deep_rgb = encode(Image.fromarray(RAMP), 'PNG')
    return {
        '16.png': (deep_rgb, LEVELS),
        '16.tif': (encode(Image.fromarray(RAMP), 'TIFF'), LEVELS),
        '16_lzw.tif': (encode(Image.fromarray(RAMP), 'TIFF', compression='tiff_lzw'), LEVELS),
        '16_big.tif': (encode(Image.fromarray(big), 'TIFF'), LEVELS),
        '16.pgm': (pgm(big, 65_535), LEVELS),
        '10.pgm': (pgm((RAMP // 64).astype('>u2'), 1023), np.rint(RAMP // 64 / 1023 * 255)),
        '4.pgm': (pgm((RAMP // 4096).astype(np.uint8), 15), RAMP // 4096 * 17.0),
        'unit.tif': (encode(Image.fromarray(UNIT), 'TIFF'), np.rint(UNIT * 255)),
        'unit.pfm': (encode(Image.fromarray(UNIT), 'PPM'), np.rint(UNIT * 255)),
        'dark.tif': (encode(Image.fromarray(0 * UNIT), 'TIFF'), 0 * LEVELS),
        'beyond.tif': (encode(Image.fromarray(UNIT * 300), 'TIFF'), None),
        'below.tif': (encode(Image.fromarray(UNIT - 0.5), 'TIFF'), None),
        'missing.tif': (encode(Image.fromarray(missing), 'TIFF'), None),
        'endless.tif': (encode(Image.fromarray(np.where(UNIT > 0.5, np.inf, 0)), 'TIFF'), None),
        '32.tif': (encode(wide, 'TIFF'), None),
        'lab.tif': (encode(lab, 'TIFF'), None),
        'signed.tif': (encode(Image.fromarray(signed.astype(np.int32)), 'TIFF'), None),
    }


@pytest.mark.parametrize('channels', [1, 3])
def test_levels_of_more_than_8_bits_are_scaled_or_refused_and_it_is_said(
    tmp_path, channels, caplog, monkeypatch
):
    monkeypatch.setattr(pillow, '_reported', set())
    files = deep_files()
    source = file_source(tmp_path, {name: content for name, (content, _) in files.items()})
    with caplog.at_level(logging.WARNING):
        found = looked_at(source, channels)
        looked_at(source, channels)
    for index, (name, (_, expected)) in enumerate(files.items()):
        image, weight = found[index]
        assert weight == (expected is not None), name
        if expected is not None:
            error = np.abs(image - expected[..., None])
            assert error.max() <= 1 and image.shape == (20, 30, channels), name
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 6 and all('(reported once)' in line for line in said)
    for reason in (
        '16 bits are scaled',
        '0 to 1 are scaled',
        'outside of 0 to 1',
        '32 bits',
        'LAB',
    ):
        assert sum(reason in line for line in said) == 1, reason


def test_odd_metadata_raises_nothing_and_prints_nothing(tmp_path, capfd):
    small, rng = picture(20, 30), np.random.default_rng(0)
    exif = b'Exif\0\0II*\0\x08\0\0\0\xff\xff' + rng.bytes(600)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        'exif.jpg': encode(small, 'JPEG', exif=exif),
        'exif.png': encode(small, 'PNG', exif=exif),
        'exif.webp': encode(small, 'WEBP', exif=exif),
        'icc.jpg': encode(small, 'JPEG', icc_profile=rng.bytes(5000)),
        'icc.png': encode(small, 'PNG', icc_profile=rng.bytes(5000)),
        'palette.png': encode(small.quantize(9), 'PNG', transparency=bytes(range(9))),
        'palette.gif': encode(small.quantize(9), 'GIF', transparency=3),
        'tags.tif': encode(small, 'TIFF', tiffinfo={700: b'x' * 99, 33432: '\u20ac', 270: 'a\0b'}),
        'turned.tif': encode(small, 'TIFF', exif=turned),
        'comment.gif': encode(small, 'GIF', comment=b'\x1b[2J' * 99),
        'clear.png': encode(small, 'PNG', transparency=(1, 2, 3)),
        'clear_gray.png': encode(small.convert('L'), 'PNG', transparency=7),
        'clear_bits.png': encode(small.convert('1'), 'PNG', transparency=0),
    }
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = looked_at(file_source(tmp_path, files))
    for index, name in enumerate(files):
        assert found[index][1] == 1, name
    assert capfd.readouterr().err == ''


def test_budget_lets_in_what_fits_and_the_largest_alone():
    budget = pillow.Budget(10)
    inside, most, lock = [0], [0], threading.Lock()

    def work(amount):
        with budget.hold(amount):
            with lock:
                inside[0] += amount
                most[0] = max(most[0], inside[0])
            threading.Event().wait(0.002)
            with lock:
                inside[0] -= amount

    threads = [threading.Thread(target=work, args=(n,)) for n in [3, 4, 10, 1] * 10]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 10 and budget._free == 10
    with budget.hold(1000):
        assert budget._free == 0


@pytest.mark.slow
def test_small_files_take_no_gigabytes(tmp_path):
    """Some kilobytes each, within the limit of pixels; many are decoded at the same time."""
    side = 8000
    flat = Image.new('RGB', (side, side))
    bombs = {
        'rgba.png': png(9400, 9400, 8, 6),
        'deep.png': png(9400, 9400, 16, 6),
        'gray16.png': png(9400, 9400, 16, 0),
        'a.gif': encode(Image.new('P', (9400, 9400)), 'GIF'),
        'a.webp': encode(flat, 'WEBP', lossless=True, method=0),
        'strip.tif': encode(
            flat.convert('RGBA'), 'TIFF', compression='tiff_adobe_deflate', tiffinfo={278: side}
        ),
        'float.tif': encode(Image.new('F', (side, side)), 'TIFF', compression='tiff_lzw'),
        'progressive.jpg': encode(flat, 'JPEG', progressive=True, subsampling=0),
    }
    write_all(tmp_path, bombs)
    (tmp_path / 'sound.png').write_bytes(encode(picture(50, 70), 'PNG'))
    code = f"""
import itertools, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from batches import settings
from swav_jax.data import pipeline, sources
from swav_jax.evaluate import gallery

def peak():
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('VmHWM'))

source = sources.open_source('folder:{tmp_path}', channels=3)
(batch,) = pipeline.eval_batches(
    source.take([len(source) - 1]), canvas_size=64, channels=3, resize=32, size=32, batch_size=1
)
before = peak()
weights = 0
for batch in pipeline.eval_batches(
    source, canvas_size=64, channels=3, resize=32, size=32, batch_size=len(source)
):
    weights += batch['weight'].sum()
print('evaluation', peak() - before, weights)
batches = pipeline.train_batches(
    source, settings(64, 3), seed=0, global_batch=len(source), first_step=0
)
print('training', peak() - before, next(batches)['weight'].sum())
del batches  # at the interpreter's end its threads would wait for ever to read more
for i in range(4):
    gallery.thumbnail(source, i)
print('thumbnails', peak() - before, 9)
"""
    result = subprocess.run(
        [sys.executable, '-c', code], env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        what, grown, readable = line.split()
        assert int(grown) < 1.3e9 and float(readable) == 9, (what, result.stdout)
