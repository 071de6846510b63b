"""From a source to batches: read, decode once onto a uint8 canvas, sample the crops' boxes.

The accelerator cuts the crops (`augment`), so the host only reads and decodes. A batch is a pure
function of (seed, step, global batch size): the order is a permutation that is computed, not
stored, and every random number comes from (seed, epoch, position in the epoch). A run can hence
start at any step without reading what came before, on any number of processes.
"""

import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image

from swav_jax.data.sources import ArraySource, FileSource, Source
from swav_jax.errors import UserError

tf.config.set_visible_devices([], 'GPU')  # they are the training's

Batch = dict[str, np.ndarray]
GRAY = 128  # level of the canvas that stands for an unreadable image
TRIES = 10  # RandomResizedCrop draws so many boxes before it takes the centre
RATIO = (3 / 4, 4 / 3)


def train_batches(
    source: Source,
    data: ConfigDict,
    *,
    seed: int,
    global_batch: int,
    first_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This process's rows of the global batches of steps first_step, first_step + 1, … for ever.

    Step s of epoch e holds positions s·G … s·G + G - 1 of the epoch's permutation; what is left
    at the end of an epoch is dropped.

    Args:
      source: the images.
      data: `config.data`.
      seed: of the order and of the boxes.
      global_batch: G, over all processes.
      first_step: counted from the start of the run.
      process_index: which rows: process p of P supplies rows [p·G/P, (p+1)·G/P).
      process_count: P.

    Yields:
      image uint8 (B, canvas, canvas, channels), the picture in the top-left corner, 0 elsewhere;
      size int32 (B, 2), the picture's height and width; boxes float32 (B, crops, 4) of y0, x0,
      height, width in canvas pixels, the crops of group 0 first; weight float32 (B,), 0 for an
      unreadable image; epoch, position, index int32 (B,).

    Raises:
      UserError: if the source holds fewer images than a batch.
    """
    if len(source) < global_batch:
        raise UserError(
            f'{len(source)} images are fewer than the global batch of {global_batch}: lower '
            'config.data.batchsize_per_replica or add images'
        )
    if global_batch % process_count:
        raise UserError(
            f'a global batch of {global_batch} does not divide among {process_count} processes'
        )
    rows = global_batch // process_count
    steps_per_epoch = len(source) // global_batch

    def samples(step: tf.Tensor) -> tf.data.Dataset:
        epoch = step // steps_per_epoch
        first = (step % steps_per_epoch) * global_batch + process_index * rows
        position = first + tf.range(rows, dtype=tf.int64)
        index = tf.random.experimental.index_shuffle(
            position, tf.stack([tf.constant(seed, tf.int64), epoch]), np.int64(len(source) - 1)
        )
        return tf.data.Dataset.from_tensor_slices(
            {'epoch': tf.repeat(epoch, rows), 'position': position, 'index': index}
        )

    def draw(sample: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        key = tf.stack([(seed << 32) | sample['epoch'], sample['position']])
        shape = (sum(data.num_crops), TRIES, 4)
        return sample | {'draws': tf.random.stateless_uniform(shape, key, dtype=tf.float64)}

    scales = np.repeat(np.array(data.crop_scales, np.float64), data.num_crops, axis=0)

    def finish(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        boxes = sample_boxes(batch.pop('draws'), batch['original_size'], scales)
        return _to_batch(batch, boxes)

    dataset = tf.data.Dataset.range(first_step, np.iinfo(np.int64).max).flat_map(samples)
    dataset = _load(dataset, source, data.canvas_size, data.channels)
    dataset = dataset.map(draw, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    dataset = dataset.batch(rows, drop_remainder=True).map(finish).prefetch(2)
    return dataset.with_options(_options()).as_numpy_iterator()


def eval_batches(
    source: Source, *, canvas_size: int, channels: int, resize: int, size: int, batch_size: int
) -> Iterator[Batch]:
    """Every image once, in order, with one box: torchvision's Resize(resize), CenterCrop(size).

    The batches are `train_batches`', with one box an image and epoch 0. The last one is filled up
    to `batch_size` with gray canvases of weight 0 and index -1.

    Raises:
      UserError: if `size` is larger than `resize`: the crop would reach outside of the image.
    """
    if size > resize:
        raise UserError(f'config.evaluate.size={size} must be at most resize={resize}')

    def finish(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return _to_batch(batch, center_boxes(batch['original_size'], resize, size))

    index = tf.data.Dataset.range(len(source))
    dataset = index.map(lambda i: {'epoch': tf.zeros_like(i), 'position': i, 'index': i})
    dataset = _load(dataset, source, canvas_size, channels)
    dataset = dataset.batch(batch_size).map(finish).prefetch(2).with_options(_options())
    return (_fill(batch, batch_size) for batch in dataset.as_numpy_iterator())


def _fill(batch: Batch, rows: int) -> Batch:
    """A batch of `rows` rows: repeats the last row with weight 0 and index -1."""
    missing = rows - len(batch['index'])
    if missing == 0:
        return batch
    batch = {name: np.concatenate([x, x[-1:].repeat(missing, 0)]) for name, x in batch.items()}
    batch['image'][-missing:] = GRAY
    batch['weight'][-missing:] = 0
    batch['index'][-missing:] = -1
    return batch


def _options() -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = True
    return options


def _to_batch(batch: dict[str, tf.Tensor], boxes: tf.Tensor) -> dict[str, tf.Tensor]:
    """Moves boxes from the original's pixels to the canvas's, and settles the types."""
    scale = tf.cast(batch['size'], tf.float64) / tf.cast(batch['original_size'], tf.float64)
    boxes = boxes * tf.tile(scale, [1, 2])[:, None]
    numbers = {name: tf.cast(batch[name], tf.int32) for name in ('epoch', 'position', 'index')}
    return numbers | {
        'image': batch['image'],
        'size': batch['size'],
        'boxes': tf.cast(boxes, tf.float32),
        'weight': batch['weight'],
    }


# Boxes, in pixels of the original image.


def sample_boxes(draws: tf.Tensor, sizes: tf.Tensor, scales: np.ndarray) -> tf.Tensor:
    """torchvision's RandomResizedCrop.get_params: the first of ten tries that fits, or the centre.

    Args:
      draws: float64 (B, V, tries, 4), uniform in [0, 1): of the area, the ratio, y and x.
      sizes: int32 (B, 2), height and width of the images.
      scales: (V, 2), smallest and largest share of the image's area.

    Returns:
      float64 (B, V, 4): y0, x0, height, width, whole numbers.
    """
    sizes = tf.cast(sizes, tf.float64)[:, None, None]  # (B, 1, 1, 2)
    low, high = scales[:, None, 0], scales[:, None, 1]
    area = tf.reduce_prod(sizes, -1) * (low + (high - low) * draws[..., 0])
    log_low, log_high = np.log(RATIO)
    ratio = tf.exp(log_low + (log_high - log_low) * draws[..., 1])
    box = tf.round(tf.stack([tf.sqrt(area / ratio), tf.sqrt(area * ratio)], -1))
    fits = tf.reduce_all((box > 0) & (box <= sizes), -1)
    corner = tf.floor(draws[..., 2:] * (sizes - box + 1))
    tries = tf.concat([corner, box], -1)  # (B, V, tries, 4)
    first = tf.argmax(tf.cast(fits, tf.int32), -1)  # of equals, argmax takes the first
    chosen = tf.gather(tries, first, batch_dims=2)
    centre = _fallback_boxes(sizes[:, 0])  # (B, 1, 4)
    return tf.where(tf.reduce_any(fits, -1, keepdims=True), chosen, centre)


def _fallback_boxes(sizes: tf.Tensor) -> tf.Tensor:
    """The largest centred box (…, 4) in images of `sizes` (…, 2) whose ratio is allowed."""
    height, width = tf.unstack(sizes, axis=-1)
    box = tf.stack(
        [
            tf.minimum(height, tf.round(width / RATIO[0])),
            tf.minimum(width, tf.round(height * RATIO[1])),
        ],
        -1,
    )
    return tf.concat([tf.floor((sizes - box) / 2), box], -1)


def center_boxes(sizes: tf.Tensor, resize: int, size: int) -> tf.Tensor:
    """(B, 1, 4): what Resize(resize) and CenterCrop(size) keep of images of `sizes` (B, 2)."""
    sizes = tf.cast(sizes, tf.float64)
    short = tf.reduce_min(sizes, -1, keepdims=True)
    resized = tf.floor(resize * sizes / short)
    corner = tf.round((resized - size) / 2)
    box = tf.concat([corner, tf.fill(tf.shape(corner), np.float64(size))], -1)
    return (box * tf.tile(sizes / resized, [1, 2]))[:, None]


# Decoding.


def _load(
    dataset: tf.data.Dataset, source: Source, canvas_size: int, channels: int
) -> tf.data.Dataset:
    """Adds image, size, original_size and weight to samples that have an index."""

    def place(sample: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return sample | to_canvas(sample.pop('decoded'), canvas_size, channels)

    if isinstance(source, ArraySource):
        images = tf.constant(source.images)

        def take(sample: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            image = convert_channels(tf.gather(images, sample['index']), channels)
            return sample | {
                'decoded': image,
                'original_size': tf.shape(image)[:2],
                'weight': tf.constant(1.0),
            }

        return dataset.map(
            lambda sample: place(take(sample)),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )

    fetch = _fetcher(source)
    careful = functools.partial(_read_with_pil, source, channels)

    def fast(sample: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        image, size = decode_jpeg(fetch(sample['index']), canvas_size, channels)
        return sample | {'decoded': image, 'original_size': size, 'weight': tf.constant(1.0)}

    def slow(sample: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        image, weight = tf.numpy_function(
            careful, [sample['index']], (tf.uint8, tf.float32), stateful=False
        )
        image = tf.ensure_shape(image, (None, None, channels))
        weight = tf.ensure_shape(weight, ())
        return sample | {'decoded': image, 'original_size': tf.shape(image)[:2], 'weight': weight}

    def one(sample: dict[str, tf.Tensor]) -> tf.data.Dataset:
        # A graph has no try: an element whose fast reading failed is dropped, and the first of
        # what remains is then the careful reading.
        alone = tf.data.Dataset.from_tensors(sample)
        return alone.map(fast).ignore_errors().concatenate(alone.map(slow)).take(1)

    dataset = dataset.interleave(
        one, cycle_length=16, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    return dataset.map(place, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _fetcher(source: Source) -> Callable[[tf.Tensor], tf.Tensor]:
    """A function from an image's number to its encoded bytes, in the graph."""
    if isinstance(source, FileSource):
        paths = tf.constant(source.paths)
        return lambda index: tf.io.read_file(tf.gather(paths, index))
    return lambda index: tf.numpy_function(source.read, [index], tf.string, stateful=False)


def convert_channels(image: tf.Tensor, channels: int) -> tf.Tensor:
    """uint8 (H, W, channels) of an image with that many, one or three channels, as PIL converts."""
    have = image.shape[-1]
    if have == channels:
        return image
    if have == 1 and channels == 3:
        return tf.repeat(image, 3, -1)
    if have == 3 and channels == 1:
        # ITU-R 601 luma in PIL's 16-bit fixed point.
        luma = tf.constant([19595, 38470, 7471])
        gray = tf.reduce_sum(tf.cast(image, tf.int32) * luma, -1, keepdims=True)
        return tf.cast((gray + 0x8000) // 0x10000, tf.uint8)
    raise UserError(f'config.data.channels={channels}, but the images have {have} channels')


def decode_jpeg(encoded: tf.Tensor, canvas_size: int, channels: int) -> tuple[tf.Tensor, tf.Tensor]:
    """A JPEG's pixels as PIL decodes them, and its height and width.

    A picture much larger than the canvas is decoded at 1/2, 1/4 or 1/8 of its size, as long as
    its longer side still reaches the canvas. Fails, inside the graph, for what is no JPEG of one
    or three components.
    """
    height, width, components = tf.unstack(tf.io.extract_jpeg_shape(encoded))
    tf.debugging.Assert(components < 4, [components])
    longer = tf.maximum(height, width)
    step = tf.reduce_sum([tf.cast(longer >= r * canvas_size, tf.int32) for r in (2, 4, 8)])

    def decoder(ratio: int) -> Callable[[], tf.Tensor]:
        return lambda: tf.io.decode_jpeg(
            encoded, channels=3, ratio=ratio, dct_method='INTEGER_ACCURATE'
        )

    image = tf.switch_case(step, [decoder(ratio) for ratio in (1, 2, 4, 8)])
    image.set_shape((None, None, 3))
    return convert_channels(image, channels), tf.stack([height, width])


def _read_with_pil(source: Source, channels: int, index: int) -> tuple[np.ndarray, np.float32]:
    """Pixels and weight 1, or a gray pixel and weight 0 if the image cannot be read."""
    try:
        with Image.open(io.BytesIO(source.read(int(index)))) as image:
            pixels = np.asarray(image.convert({1: 'L', 3: 'RGB'}[channels]))
        return pixels.reshape(*pixels.shape[:2], channels), np.float32(1)
    except Exception:  # decoders fail in many ways, and none may stop a run
        return np.full((1, 1, channels), GRAY, np.uint8), np.float32(0)


def to_canvas(image: tf.Tensor, canvas_size: int, channels: int) -> dict[str, Any]:
    """The image in the corner of a square canvas, scaled down (antialiased) if it is larger."""
    shape = tf.shape(image)[:2]
    longer = tf.reduce_max(shape)

    def shrink() -> tf.Tensor:
        size = tf.round(tf.cast(shape, tf.float32) * (canvas_size / tf.cast(longer, tf.float32)))
        small = tf.image.resize(image, tf.maximum(tf.cast(size, tf.int32), 1), antialias=True)
        return tf.cast(tf.round(small), tf.uint8)

    image = tf.cond(longer > canvas_size, shrink, lambda: image)
    size = tf.shape(image)[:2]
    rest = canvas_size - size
    pad = [[0, rest[0]], [0, rest[1]], [0, 0]]
    canvas = tf.ensure_shape(tf.pad(image, pad), (canvas_size, canvas_size, channels))
    return {'image': canvas, 'size': size}
