"""From an image's number to its pixels, the same ones that PIL gives, whatever the file holds.

JPEG and PNG are decoded in TensorFlow, without Python. What that cannot read, or reads otherwise
than PIL, PIL reads; what PIL cannot read becomes a gray canvas of weight 0. No image stops a run.
"""

import functools
import io
import os
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from PIL import Image

from swav_jax.data.images import ArraySource, FileSource, Source

Sample = dict[str, tf.Tensor]
GRAY = 128  # level of what stands for an unreadable image
MAX_PIXELS = 89_478_485  # PIL's limit: more in one image is taken for a decompression bomb
FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'WEBP', 'PPM', 'TIFF')  # not those that run programs


def add_pixels(
    dataset: tf.data.Dataset, source: Source, canvas_size: int, channels: int
) -> tf.data.Dataset:
    """Adds to samples that have an `index`, in the same order:

    image uint8 (height, width, channels), at most canvas_size high and wide; size int32 (2,) of it;
    original_size int32 (2,) before it was scaled down; weight float32, 0 for an unreadable one.
    """
    parallel = {'num_parallel_calls': tf.data.AUTOTUNE, 'deterministic': True}

    def add(sample: Sample, image: tf.Tensor, original_size: tf.Tensor, weight) -> Sample:
        image = shrink(image, canvas_size)
        size = tf.shape(image)[:2]
        return sample | {
            'image': image, 'size': size, 'original_size': original_size, 'weight': weight
        }  # fmt: skip

    if isinstance(source, ArraySource):
        images = tf.constant(source.images)
        whole = tf.constant(source.images.shape[1:3], tf.int32)

        def look_up(sample: Sample) -> Sample:
            image = convert_channels(tf.gather(images, sample['index']), channels)
            return add(sample, image, whole, np.float32(1))

        return dataset.map(look_up, **parallel)

    read = _reader(source)
    careful = functools.partial(decode_with_pil, source, canvas_size, channels)

    def fast(sample: Sample) -> Sample:
        image, size = decode(read(sample['index']), canvas_size)
        return add(sample, convert_channels(image, channels), size, np.float32(1))

    def slow(sample: Sample) -> Sample:
        image, weight = tf.numpy_function(
            careful, [sample['index']], (tf.uint8, tf.float32), stateful=False
        )
        image = tf.ensure_shape(image, (None, None, channels))
        return add(sample, image, tf.shape(image)[:2], tf.ensure_shape(weight, ()))

    def either(sample: Sample) -> tf.data.Dataset:
        # A graph has no try. An element whose fast decoding fails is left out, and the first of
        # what remains is then the slow one's.
        one = tf.data.Dataset.from_tensors(sample)
        return one.map(fast).ignore_errors().concatenate(one.map(slow)).take(1)

    cycle = 2 * (os.cpu_count() or 8)
    return dataset.interleave(either, cycle_length=cycle, block_length=1, **parallel)


def _reader(source: Source) -> Callable[[tf.Tensor], tf.Tensor]:
    """From an image's number to its encoded bytes, in the graph."""
    if isinstance(source, FileSource):
        paths = tf.constant([os.fsencode(path) for path in source.paths], tf.string)
        return lambda index: tf.io.read_file(tf.gather(paths, index))
    return lambda index: tf.ensure_shape(
        tf.numpy_function(source.read, [index], tf.string, stateful=False), ()
    )


def decode(encoded: tf.Tensor, canvas_size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The pixels (height, width, 3) of a JPEG or a PNG, and its height and width.

    A JPEG much larger than the canvas is decoded at 1/2, 1/4 or 1/8 of its size, as long as its
    longer side still reaches the canvas. Fails, in the graph, for other files, for those that are
    damaged or too large, and for the kinds that PIL reads in its own way: CMYK and 16 bits.
    """
    is_png = tf.strings.substr(encoded, 0, 8) == b'\x89PNG\r\n\x1a\n'
    size, usual = tf.cond(is_png, lambda: _png_header(encoded), lambda: _jpeg_header(encoded))
    pixels = tf.reduce_prod(tf.cast(size, tf.int64))
    # Nothing else makes a graph look at the size before it decodes.
    with tf.control_dependencies([tf.debugging.Assert(usual & (pixels <= MAX_PIXELS), [size])]):
        encoded = tf.identity(encoded)
    longer = tf.reduce_max(size)
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
    source: Source, canvas_size: int, channels: int, index: np.integer
) -> tuple[np.ndarray, np.float32]:
    """Pixels (height, width, channels) and weight 1; if PIL cannot read it a gray canvas and 0."""
    try:
        encoded = io.BytesIO(source.read(int(index)))
        with Image.open(encoded, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if 'transparency' in image.info:
                image = image.convert('RGBA')  # of a palette: else PIL warns
            pixels = np.asarray(image.convert('L' if channels == 1 else 'RGB'))
        return pixels.reshape(*pixels.shape[:2], channels), np.float32(1)
    except Exception:  # decoders fail in many ways, and none of them may stop a run
        return np.full((canvas_size, canvas_size, channels), GRAY, np.uint8), np.float32(0)


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
