"""From an image's number to its pixels, the same ones that PIL gives, whatever the file holds.

Small JPEG and PNG files are decoded in TensorFlow, without Python. What that cannot read, or reads
otherwise than PIL, and what is large, PIL reads, as much at once as `MEMORY` has room for; what PIL
cannot read becomes a gray canvas of weight 0. No image stops a run, and none takes a gigabyte.

Training keeps a picture whole: its longer side is scaled down to the canvas, so the crops of a wide
one come from few pixels (those of a 600×3000 picture from 102×512, on a canvas of 512).
Evaluation looks at the middle only: of a picture that is larger than the canvas it gets that part,
resized from the file's own pixels, as torchvision resizes it.
"""

import contextlib
import functools
import io
import logging
import math
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from PIL import Image, features

from swav_jax.data.images import ArraySource, FileSource, RangeSource, Source
from swav_jax.terminal import printable

Sample = dict[str, tf.Tensor]
Box = tuple[float, float, float, float]  # as PIL has it: left, upper, right, lower
GRAY = 128  # level of what stands for an unreadable image
MAX_PIXELS = 89_478_485  # PIL's limit: more in one image is taken for a decompression bomb
MAX_MEMORY = 2**30  # bytes that decoding one image may take
FAST_PIXELS, FAST_BYTES = 2**22, 2**24  # of an image and its file: more is decoded by PIL
BAND = 2**20  # pixels that are converted at once
FORMATS = ['JPEG', 'PNG', 'BMP', 'GIF', 'WEBP', 'PPM', 'TIFF']  # not those that run programs
if features.check('avif'):
    FORMATS.append('AVIF')
PILS = re.compile(r'PIL\.')  # the modules whose warnings are ignored
LOG = logging.getLogger(__name__)
_said: set[str] = set()


class UnreadableError(Exception):
    """A sound image that is refused; the text says why."""


class Budget:
    """Lets threads work side by side as long as what they take together is at most `total`."""

    def __init__(self, total: int):
        self.total = self._free = total
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Waits until there is room for `amount`; more than all of it waits for all of it."""
        amount = min(amount, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()


MEMORY = Budget(max(2**29, (os.cpu_count() or 8) * 2**26))  # bytes


def add_pixels(
    dataset: tf.data.Dataset,
    source: Source,
    canvas_size: int,
    channels: int,
    centre: tuple[int, int] | None = None,
) -> tf.data.Dataset:
    """Adds to samples that have an `index`, in the same order:

    image uint8 (height, width, channels), at most canvas_size high and wide; size int32 (2,) of it;
    original_size int32 (2,) before it was scaled down; weight float32, 0 for an unreadable one.

    Args:
      dataset: the samples.
      source: the images.
      canvas_size: larger images are scaled down to it.
      channels: of the result.
      centre: (resize, size), if torchvision's Resize(resize), CenterCrop(size) are all that will be
        looked at. Larger images then become what these leave, and a frame around it that makes it
        resize × resize, with these numbers as their original size: the same box cuts the crop out
        of them as out of any image. `resize` must be at most canvas_size.
    """
    parallel = {'num_parallel_calls': tf.data.AUTOTUNE, 'deterministic': True}
    careful = functools.partial(decode_with_pil, source, canvas_size, channels, centre=centre)

    def add(sample: Sample, image: tf.Tensor, original_size: tf.Tensor, weight) -> Sample:
        if centre is None:
            image = shrink(image, canvas_size)
        size = tf.shape(image)[:2]
        sample = {key: x for key, x in sample.items() if key != 'small'}
        return sample | {
            'image': image, 'size': size, 'original_size': original_size, 'weight': weight
        }  # fmt: skip

    def slow(sample: Sample) -> Sample:
        image, size, weight = tf.numpy_function(
            careful, [sample['index']], (tf.uint8, tf.int32, tf.float32), stateful=False
        )
        image = tf.ensure_shape(image, (None, None, channels))
        return add(sample, image, tf.ensure_shape(size, (2,)), tf.ensure_shape(weight, ()))

    if isinstance(source, ArraySource):
        whole = source.images.shape[1:3]
        if centre is not None and max(whole) > canvas_size:
            return dataset.map(slow, **parallel)
        images = tf.constant(source.images)

        def look_up(sample: Sample) -> Sample:
            image = convert_channels(tf.gather(images, sample['index']), channels)
            return add(sample, image, tf.constant(whole, tf.int32), np.float32(1))

        return dataset.map(look_up, **parallel)

    read = _reader(source)
    largest = None if centre is None else canvas_size

    def fast(sample: Sample) -> Sample:
        with tf.control_dependencies([tf.debugging.Assert(sample['small'], [False])]):
            encoded = read(tf.identity(sample['index']))
        image, size = decode(encoded, canvas_size, largest)
        return add(sample, convert_channels(image, channels), size, np.float32(1))

    def either(sample: Sample) -> tf.data.Dataset:
        # A graph has no try. An element whose fast decoding fails is left out, and the first of
        # what remains is then the slow one's.
        one = tf.data.Dataset.from_tensors(sample)
        return one.map(fast).ignore_errors().concatenate(one.map(slow)).take(1)

    def mark(samples: Sample) -> Sample:
        small = tf.numpy_function(
            functools.partial(_are_small, source), [samples['index']], tf.bool, stateful=False
        )
        return samples | {'small': tf.ensure_shape(small, (None,))}

    # A graph would open a named pipe, and wait for ever. Several files are looked at in one call
    # of Python, which costs as much as a twentieth of decoding one.
    dataset = dataset.batch(16).map(mark, **parallel).unbatch()
    cycle = 2 * (os.cpu_count() or 8)
    return dataset.interleave(either, cycle_length=cycle, block_length=1, **parallel)


def _are_small(source: Source, indices: np.ndarray) -> np.ndarray:
    """bool (N,): which images are files, or parts of them, of at most FAST_BYTES."""

    def is_small(index: int) -> bool:
        try:
            return _count_bytes(source, index) <= FAST_BYTES
        except (OSError, ValueError):  # ValueError: a zero in the path
            return False

    return np.array([is_small(i) for i in indices.tolist()])


def _count_bytes(source: Source, index: int) -> int:
    """How many bytes reading an image takes; 0 where that is not known.

    Raises:
      OSError: it is gone, or no regular file.
    """
    if isinstance(source, FileSource):
        status = os.stat(source.paths[index])  # noqa: PTH116 (a Path costs more than the call)
        if not stat.S_ISREG(status.st_mode):
            raise OSError
        return status.st_size
    return int(source.ranges[index, 2]) if isinstance(source, RangeSource) else 0


def _reader(source: Source) -> Callable[[tf.Tensor], tf.Tensor]:
    """From an image's number to its encoded bytes, in the graph."""
    if isinstance(source, FileSource):
        paths = tf.constant([os.fsencode(path) for path in source.paths], tf.string)
        return lambda index: tf.io.read_file(tf.gather(paths, index))

    def encoded(index: np.integer) -> bytes:
        content = source.read(int(index))
        return content if isinstance(content, bytes) else b''  # pixels are left to PIL

    return lambda index: tf.ensure_shape(
        tf.numpy_function(encoded, [index], tf.string, stateful=False), ()
    )


def decode(
    encoded: tf.Tensor, canvas_size: int, largest: int | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """The pixels (height, width, 3) of a JPEG or a PNG, and its height and width.

    A JPEG much larger than the canvas is decoded at 1/2, 1/4 or 1/8 of its size, as long as its
    longer side still reaches the canvas. Fails, in the graph, for other files, for those that are
    damaged or too large, and for the kinds that PIL reads in its own way: CMYK and 16 bits.

    Args:
      encoded: the file.
      canvas_size: the side of the canvas.
      largest: fail, too, for a longer side than this.
    """
    is_png = tf.strings.substr(encoded, 0, 8) == b'\x89PNG\r\n\x1a\n'
    size, usual = tf.cond(is_png, lambda: _png_header(encoded), lambda: _jpeg_header(encoded))
    longer = tf.reduce_max(size)
    usual &= tf.reduce_prod(tf.cast(size, tf.int64)) <= FAST_PIXELS
    if largest is not None:
        usual &= longer <= largest
    # Nothing else makes a graph look at the size before it decodes.
    with tf.control_dependencies([tf.debugging.Assert(usual, [size])]):
        encoded = tf.identity(encoded)
    halvings = tf.reduce_sum([tf.cast(longer >= n * canvas_size, tf.int32) for n in (2, 4, 8)])

    def at(ratio: int) -> Callable[[], tf.Tensor]:
        return lambda: tf.io.decode_jpeg(  # it decodes PNG, too
            encoded, channels=3, ratio=ratio, dct_method='INTEGER_ACCURATE'
        )

    halvings = tf.where(is_png, 0, halvings)
    image = tf.switch_case(halvings, [at(ratio) for ratio in (1, 2, 4, 8)])
    return tf.ensure_shape(image, (None, None, 3)), size


def _jpeg_header(encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Height and width; whether it has one or three components."""
    # For anything else libjpeg would write a line to stderr, past every log level.
    is_jpeg = tf.debugging.Assert(tf.strings.substr(encoded, 0, 2) == b'\xff\xd8', [False])
    with tf.control_dependencies([is_jpeg]):
        shape = tf.io.extract_jpeg_shape(encoded)
    return shape[:2], shape[2] < 4


def _png_header(encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Height and width; whether it has at most 8 bits a channel. They follow the word IHDR."""
    size = tf.io.decode_raw(tf.strings.substr(encoded, 16, 8), tf.int32, little_endian=False)
    bits = tf.io.decode_raw(tf.strings.substr(encoded, 24, 1), tf.uint8)
    return tf.ensure_shape(size[::-1], (2,)), tf.reduce_all(bits <= 8)


def decode_with_pil(
    source: Source,
    canvas_size: int,
    channels: int,
    index: np.integer,
    *,
    centre: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """An image as `add_pixels` describes it: the pixels, their original size, and the weight."""
    index = int(index)
    try:
        _ignore_pils_warnings()
        if isinstance(source, ArraySource):
            pixels, size = _fit_array(source.read(index), canvas_size, channels, centre)
        else:
            least = canvas_size if centre is None else None
            with _open(source, index, least) as (image, original):
                convert = _converter(image, 'L' if channels == 1 else 'RGB', source, index)
                pixels, size = _fit(image, original, convert, canvas_size, centre)
        pixels = pixels.reshape(*pixels.shape[:2], channels)
        return pixels, np.array(size[::-1], np.int32), np.float32(1)
    except UnreadableError as error:
        _say_once(f'{error}; such images count as unreadable', source, index)
    except Exception:  # decoders fail in many ways, and none of them may stop a run
        pass
    gray = np.full((canvas_size, canvas_size, channels), GRAY, np.uint8)
    return gray, np.full(2, canvas_size, np.int32), np.float32(0)


def is_readable(source: Source, index: int) -> bool:
    """Whether an image counts: it can be read and decoded."""
    return isinstance(source, ArraySource) or decode_with_pil(source, 1, 1, index)[2] > 0


def _fit(
    image: Image.Image,
    original: tuple[int, int],
    convert: Callable[[Image.Image], Image.Image],
    canvas_size: int,
    centre: tuple[int, int] | None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """The pixels that go onto the canvas, and the (width, height) that boxes refer to."""
    size, box = image.size, (0, 0, *image.size)
    longer = max(size)
    if longer > canvas_size and centre is None:
        size = tuple(max(round(side * canvas_size / longer), 1) for side in size)
    elif longer > canvas_size:
        box = _middle(size, *centre)
        size = original = (centre[0], centre[0])
    return np.asarray(_resample(image, convert, size, box)), original


def _fit_array(
    image: np.ndarray, canvas_size: int, channels: int, centre: tuple[int, int] | None
) -> tuple[np.ndarray, tuple[int, int]]:
    """`_fit` of a uint8 (height, width, channels)."""
    if image.shape[-1] in (1, 3):
        picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
        mode = 'L' if channels == 1 else 'RGB'
        return _fit(picture, picture.size, lambda part: part.convert(mode), canvas_size, centre)
    planes = [Image.fromarray(image[..., i]) for i in range(image.shape[-1])]
    found = [_fit(plane, plane.size, lambda part: part, canvas_size, centre) for plane in planes]
    return np.stack([pixels for pixels, _ in found], -1), found[0][1]


@contextlib.contextmanager
def _open(
    source: Source, index: int, least: int | None
) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """An image that is loaded, with room in `MEMORY` for it, and its width and height.

    A JPEG is halved as `decode` halves it for a canvas of side `least`, unless that is None.

    Raises:
      UnreadableError: loading it would take too much.
      Exception: the file cannot be read, or is no image.
    """
    large = _count_bytes(source, index) > FAST_BYTES
    with contextlib.ExitStack() as held:
        if large:  # alone: what it holds shows only when it is read, and two might want more then
            held.enter_context(MEMORY.hold(MEMORY.total))
        content = source.read(index)
        if isinstance(content, Image.Image):
            yield content, content.size
            return
        image = held.enter_context(Image.open(io.BytesIO(content), formats=FORMATS))
        original = image.size
        halved = None
        if least is not None:
            halvings = sum(max(original) >= n * least for n in (2, 4, 8))
            halved = image.draft(None, [max(side >> halvings, 1) for side in original])
        needed = _memory(image, original)
        if math.prod(original) > MAX_PIXELS or needed > MAX_MEMORY:
            raise UnreadableError(
                f'needs too much memory: at most {MAX_PIXELS:,} pixels and {MAX_MEMORY >> 20} MiB '
                'are read'
            )
        if not large:
            held.enter_context(MEMORY.hold(needed))
        image.load()
        yield image, original if halved else image.size  # a TIFF turns while it is loaded


def _memory(image: Image.Image, original: tuple[int, int]) -> int:
    """Bytes that PIL takes to load an image and to resize it; measured, to within a tenth."""
    pixels = math.prod(original)
    loaded = math.prod(image.size) * {'1': 1, 'L': 1, 'P': 1}.get(
        image.mode, 2 if image.mode.startswith('I;16') else 4
    )
    filters = 16 * sum(image.size)  # of a line that becomes a canvas
    match image.format:
        case 'WEBP' | 'AVIF':  # the last picture, the next one, and a copy
            loaded = 16 * pixels
        case 'JPEG' | 'MPO' if image.info.get('progressive'):  # all coefficients
            loaded += 2 * len(image.getbands()) * pixels
        case 'TIFF':  # a strip or a tile
            width, height = image.size
            tags = image.tag_v2
            sides = tags.get(322, width), tags.get(323, min(tags.get(278, height), height))
            bits = tags.get(258, (1,))
            loaded += math.prod(sides) * max(sum(bits), bits[0] * tags.get(277, 1)) // 8
    return loaded + filters


def _middle(size: tuple[int, int], resize: int, crop: int) -> Box:
    """What Resize(resize), CenterCrop(crop) keep of an image, and a frame: resize × resize then.

    The frame lies as the two of them lay the crop in an image of resize × resize.
    """
    short = min(size)
    resized = [resize * side // short for side in size]
    corner = [round((side - crop) / 2) - round((resize - crop) / 2) for side in resized]
    scale = [side / after for side, after in zip(size, resized, strict=True)]
    left, upper = (x * s for x, s in zip(corner, scale, strict=True))
    right, lower = (min((x + resize) * s, n) for x, s, n in zip(corner, scale, size, strict=True))
    return left, upper, right, lower


def _resample(
    image: Image.Image,
    convert: Callable[[Image.Image], Image.Image],
    size: tuple[int, int],
    box: Box,
) -> Image.Image:
    """The box of the converted image, resized as PIL does: antialiased, bilinear.

    PIL's filter goes along the rows first, so bands of rows are converted and made narrow one by
    one: in memory are the image, and what is small.
    """
    whole = (0, 0, *image.size)
    if size == image.size and box == whole:
        return convert(image)
    (left, right), (top, bottom) = (
        _reach(box[axis], box[axis + 2], size[axis], image.size[axis]) for axis in (0, 1)
    )
    rows = max(BAND // (right - left), 1)
    narrow = None
    for first in range(top, bottom, rows):
        band = convert(image.crop((left, first, right, min(first + rows, bottom))))
        part = (box[0] - left, 0, box[2] - left, band.height)
        band = band.resize((size[0], band.height), Image.Resampling.BILINEAR, part)
        if narrow is None:
            narrow = Image.new(band.mode, (size[0], bottom - top))
        narrow.paste(band, (0, first - top))
    part = (0, box[1] - top, size[0], box[3] - top)
    return narrow.resize(size, Image.Resampling.BILINEAR, part)


def _reach(start: float, end: float, size: int, pixels: int) -> tuple[int, int]:
    """The first pixel that the filter needs for `size` pixels between start and end, and the end.

    It reaches one pixel of the result, at least one of its own, beyond the box.
    """
    margin = max((end - start) / size, 1) + 1
    return max(math.floor(start - margin), 0), min(math.ceil(end + margin), pixels)


def _converter(
    image: Image.Image, mode: str, source: Source, index: int
) -> Callable[[Image.Image], Image.Image]:
    """What makes a picture of that mode, RGB or L, of any part of the image.

    PIL clips what has more than 8 bits to 255; here black and white stay what they are.

    Raises:
      UnreadableError: it is not known which number is white.
    """
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        tags = getattr(image, 'tag_v2', {})
        white = 2 ** tags.get(258, (16,))[0] - 1
        _say_once('gray levels of 16 bits are scaled to 8, 65535 to 255', source, index)

        def levels(pixels: np.ndarray) -> np.ndarray:
            return (pixels.astype(np.uint32) * 255 + white // 2) // white
    elif image.mode == 'I':
        raise UnreadableError('has levels of 32 bits, and which is white is not known')
    elif image.mode == 'F':
        low, high = image.getextrema()
        if not 0 <= low <= high <= 1:
            raise UnreadableError('has levels outside of 0 to 1, and which is white is not known')
        _say_once('levels from 0 to 1 are scaled to 0 to 255', source, index)

        def levels(pixels: np.ndarray) -> np.ndarray:
            if not np.isfinite(pixels).all():
                raise UnreadableError('has levels that are not a number')
            return np.rint(255 * pixels)
    elif image.mode == 'LAB':
        raise UnreadableError('has colours in LAB, which PIL does not convert')
    elif 'transparency' in image.info:  # of a palette: else PIL warns
        return lambda part: part.convert('RGBA').convert(mode)
    else:
        return lambda part: part.convert(mode)
    return lambda part: Image.fromarray(levels(np.asarray(part)).astype(np.uint8)).convert(mode)


def _ignore_pils_warnings() -> None:
    """What PIL finds odd in an image's metadata is nobody's concern here, nor an error."""
    ignored = ('ignore', None, Warning, PILS, 0)
    if ignored not in warnings.filters:  # not at import: whoever catches warnings sets filters back
        warnings.filterwarnings('ignore', module=PILS.pattern)


def _say_once(text: str, source: Source, index: int) -> None:
    if text not in _said:
        _said.add(text)
        LOG.warning('%s: %s (said once)', printable(source.name(index)), text)


def convert_channels(image: tf.Tensor, channels: int) -> tf.Tensor:
    """uint8 (H, W, channels): gray becomes RGB and RGB gray, as PIL converts; others stay."""
    have = image.shape[-1]
    if have == 1 and channels == 3:
        return tf.repeat(image, 3, -1)
    if have == 3 and channels == 1:
        # ITU-R 601 luma in PIL's 16-bit fixed point.
        luma = tf.constant([19595, 38470, 7471])
        gray = tf.reduce_sum(tf.cast(image, tf.int32) * luma, -1, keepdims=True)
        return tf.cast((gray + 0x8000) // 0x10000, tf.uint8)
    return image


def shrink(image: tf.Tensor, canvas_size: int) -> tf.Tensor:
    """Scaled down, antialiased, to a longer side of canvas_size if that is larger."""
    shape = tf.shape(image)[:2]
    longer = tf.reduce_max(shape)

    def smaller() -> tf.Tensor:
        size = tf.round(tf.cast(shape, tf.float64) * (canvas_size / longer))
        small = tf.image.resize(image, tf.maximum(tf.cast(size, tf.int32), 1), antialias=True)
        return tf.cast(tf.round(small), tf.uint8)

    return tf.cond(longer > canvas_size, smaller, lambda: image)
