"""From an image's number to its pixels in a tf.data graph: the same pixels that PIL gives.

Small JPEG and PNG files are decoded in TensorFlow, without Python. The rest goes through `pillow`:
files that TensorFlow cannot read or reads differently, and large ones.
"""

import functools
import os
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from swav_jax.data.images import ArraySource, FileSource, Source
from swav_jax.data.pillow import LARGE_BYTES, decode_with_pil

Sample = dict[str, tf.Tensor]
FAST_PIXELS = 2**22  # larger images go through Pillow


def add_pixels(
    dataset: tf.data.Dataset,
    source: Source,
    canvas_size: int,
    channels: int,
    centre: tuple[int, int] | None = None,
) -> tf.data.Dataset:
    """Add the images to samples that have an `index`, in the same order.

    Args:
      dataset: the samples.
      source: the images.
      canvas_size: larger images are scaled down to it.
      channels: of the result.
      centre: (resize, size), if only torchvision's Resize(resize), CenterCrop(size) will be used.
        Larger images then become what these keep, in a frame that makes it resize × resize, with
        that as their original size: the same box cuts the crop out of them as out of other images.
        `resize` must be at most canvas_size.

    Returns:
      The samples with image uint8 (height, width, channels), at most canvas_size high and wide;
      size int32 (2,) of it; original_size int32 (2,) before it was scaled down; weight float32, 0
      for an unreadable image.
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
        # A graph has no try: if fast decoding fails, its element is dropped, and the slow one is
        # the first that remains.
        one = tf.data.Dataset.from_tensors(sample)
        return one.map(fast).ignore_errors().concatenate(one.map(slow)).take(1)

    def mark(samples: Sample) -> Sample:
        small = tf.numpy_function(
            functools.partial(_are_small, source), [samples['index']], tf.bool, stateful=False
        )
        return samples | {'small': tf.ensure_shape(small, (None,))}

    # A graph would open a named pipe, and wait for ever. Several files are checked in one call of
    # Python, because a call takes a twentieth of the time of decoding one.
    dataset = dataset.batch(16).map(mark, **parallel).unbatch()
    cycle = 2 * (os.cpu_count() or 8)
    return dataset.interleave(either, cycle_length=cycle, block_length=1, **parallel)


def _are_small(source: Source, indices: np.ndarray) -> np.ndarray:
    """bool (N,): which images are regular files, or parts of them, that are not large."""

    def is_small(index: int) -> bool:
        try:
            extent = source.extent(index)
        except (OSError, ValueError):  # ValueError: a zero in the path
            return False
        return extent is None or extent[2] <= LARGE_BYTES

    return np.array([is_small(i) for i in indices.tolist()])


def _reader(source: Source) -> Callable[[tf.Tensor], tf.Tensor]:
    """From an image's number to its encoded bytes, in the graph."""
    if isinstance(source, FileSource):
        paths = tf.constant([os.fsencode(path) for path in source.paths], tf.string)
        return lambda index: tf.io.read_file(tf.gather(paths, index))

    def encoded(index: np.integer) -> bytes:
        content = source.read(int(index))
        return content if isinstance(content, bytes) else b''  # pixels are left to Pillow

    return lambda index: tf.ensure_shape(
        tf.numpy_function(encoded, [index], tf.string, stateful=False), ()
    )


def decode(
    encoded: tf.Tensor, canvas_size: int, largest: int | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """The pixels (height, width, 3) of a JPEG or a PNG, and its height and width.

    A JPEG much larger than the canvas is decoded at 1/2, 1/4 or 1/8 of its size, as long as its
    longer side still reaches the canvas. Fails in the graph for other files, for damaged or large
    ones, and for the kinds that PIL reads differently: CMYK and 16 bits.

    Args:
      encoded: the file.
      canvas_size: the side of the canvas.
      largest: fail for a longer side than this, too.
    """
    is_png = tf.strings.substr(encoded, 0, 8) == b'\x89PNG\r\n\x1a\n'
    size, usual = tf.cond(is_png, lambda: _png_header(encoded), lambda: _jpeg_header(encoded))
    longer = tf.reduce_max(size)
    usual &= tf.reduce_prod(tf.cast(size, tf.int64)) <= FAST_PIXELS
    if largest is not None:
        usual &= longer <= largest
    # Only a control dependency makes a graph check the size before it decodes.
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
    # For anything else libjpeg would print a line to stderr, at any log level.
    is_jpeg = tf.debugging.Assert(tf.strings.substr(encoded, 0, 2) == b'\xff\xd8', [False])
    with tf.control_dependencies([is_jpeg]):
        shape = tf.io.extract_jpeg_shape(encoded)
    return shape[:2], shape[2] < 4


def _png_header(encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Height and width; whether it has at most 8 bits a channel. They follow `IHDR`."""
    size = tf.io.decode_raw(tf.strings.substr(encoded, 16, 8), tf.int32, little_endian=False)
    bits = tf.io.decode_raw(tf.strings.substr(encoded, 24, 1), tf.uint8)
    return tf.ensure_shape(size[::-1], (2,)), tf.reduce_all(bits <= 8)


def convert_channels(image: tf.Tensor, channels: int) -> tf.Tensor:
    """uint8 (H, W, channels): gray becomes RGB and RGB gray like in PIL; others stay."""
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
    """Scale a longer side than canvas_size down to it, antialiased."""
    shape = tf.shape(image)[:2]
    longer = tf.reduce_max(shape)

    def smaller() -> tf.Tensor:
        size = tf.round(tf.cast(shape, tf.float64) * (canvas_size / longer))
        small = tf.image.resize(image, tf.maximum(tf.cast(size, tf.int32), 1), antialias=True)
        return tf.cast(tf.round(small), tf.uint8)

    return tf.cond(longer > canvas_size, smaller, lambda: image)
