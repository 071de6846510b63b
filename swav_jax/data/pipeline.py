"""From a source to batches: read, decode once onto a uint8 canvas, sample the crops' boxes.

The accelerator cuts the crops (`augment`), so the host only reads and decodes. A batch is a pure
function of (seed, step, global batch size): seed and epoch determine the permutation of an epoch,
and (seed, epoch, position in the epoch) every random number. A run can therefore start at any step
without reading what came before, on any number of processes.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from swav_jax.data import boxes
from swav_jax.data.decode import Sample, add_pixels
from swav_jax.data.images import ArraySource, Source
from swav_jax.data.pillow import GRAY
from swav_jax.errors import UserError

Batch = dict[str, np.ndarray]


def train_batches(source: Source, data: ConfigDict, **kwargs) -> Iterator[Batch]:
    """The batches of `train_dataset`, with its arguments, as numpy arrays."""
    return train_dataset(source, data, **kwargs).as_numpy_iterator()


def train_dataset(
    source: Source,
    data: ConfigDict,
    *,
    seed: int,
    global_batch: int,
    first_step: int,
    rows: np.ndarray | None = None,
) -> tf.data.Dataset:
    """This process's rows of the global batches of steps first_step, first_step + 1, … for ever.

    Step s of epoch e holds positions s·G … s·G + G - 1 of the epoch's permutation; the rest of an
    epoch is dropped.

    Args:
      source: the images.
      data: `config.data`.
      seed: of the order and of the boxes.
      global_batch: G, over all processes.
      first_step: counted from the start of the run.
      rows: int64 (B,), which rows of a global batch this process supplies; None: all.

    Returns:
      A dataset of batches of B rows: image uint8 (B, canvas, canvas, channels), the picture
      in the top-left corner, 0 elsewhere; size int32 (B, 2), the picture's height and width; boxes
      float32 (B, crops, 4) of y0, x0, height, width in canvas pixels, the crops of group 0 first;
      weight float32 (B,), 0 for an unreadable image; epoch, position, index int32 (B,).

    Raises:
      UserError: the source holds fewer images than a batch.
    """
    if len(source) < global_batch:
        raise UserError(
            f'{len(source)} images are fewer than the global batch of {global_batch}: lower '
            'config.data.batchsize_per_replica or add images'
        )
    rows = np.arange(global_batch) if rows is None else rows
    steps_per_epoch = len(source) // global_batch
    scales = np.repeat(np.array(data.crop_scales, np.float64), data.num_crops, axis=0)
    draw = functools.partial(boxes.draw, seed, crops=len(scales))

    _make_devices()

    def order(epoch: np.integer, positions: np.ndarray) -> np.ndarray:
        return permutation(len(source), seed, int(epoch))[positions]

    def samples(step: tf.Tensor) -> tf.data.Dataset:
        epoch = step // steps_per_epoch
        position = (step % steps_per_epoch) * global_batch + tf.constant(rows, tf.int64)
        index = tf.numpy_function(order, [epoch, position], tf.int64, stateful=False)
        return tf.data.Dataset.from_tensor_slices(
            {
                'epoch': tf.repeat(epoch, len(rows)),
                'position': position,
                'index': tf.ensure_shape(index, rows.shape),
            }
        )

    def cut(batch: Sample) -> tf.Tensor:
        places = [batch['epoch'][0], batch['position']]
        draws = tf.numpy_function(draw, places, tf.float64, stateful=False)
        draws = tf.ensure_shape(draws, (len(rows), len(scales), boxes.TRIES, 4))
        return boxes.random_resized(draws, batch['original_size'], scales)

    dataset = tf.data.Dataset.range(first_step, np.iinfo(np.int64).max).flat_map(samples)
    dataset = add_pixels(dataset, source, data.canvas_size, data.channels)
    return _batch(dataset, len(rows), cut, data.canvas_size, data.channels)


def eval_batches(
    source: Source, *, canvas_size: int, channels: int, resize: int, size: int, batch_size: int
) -> Iterator[Batch]:
    """Every image once, in order, with one box: torchvision's Resize(resize), CenterCrop(size).

    Batches are like those of `train_batches`, with one box an image and epoch 0. The last one is
    filled up to `batch_size` with gray canvases of weight 0 and index -1. An image larger than the
    canvas is reduced to what the box reads, at its final size; the canvas of files is therefore at
    least resize × resize.

    Raises:
      UserError: `size` is larger than `resize`: the crop would reach outside of the image.
    """
    if size > resize:
        raise UserError(
            f'config.evaluate.size={size} is larger than config.evaluate.resize={resize}: the crop '
            'would reach outside of the image'
        )
    _make_devices()

    def cut(batch: Sample) -> tf.Tensor:
        return boxes.centre(batch['original_size'], resize, size)

    dataset = tf.data.Dataset.range(len(source)).map(
        lambda i: {'epoch': tf.zeros_like(i), 'position': i, 'index': i}
    )
    if not isinstance(source, ArraySource) or max(source.images.shape[1:3]) > canvas_size:
        canvas_size = max(canvas_size, resize)
    dataset = add_pixels(dataset, source, canvas_size, channels, centre=(resize, size))
    dataset = _batch(dataset, batch_size, cut, canvas_size, channels)
    return (_fill(batch, batch_size) for batch in dataset.as_numpy_iterator())


def _batch(
    dataset: tf.data.Dataset,
    rows: int,
    cut: Callable[[Sample], tf.Tensor],
    canvas_size: int,
    channels: int,
) -> tf.data.Dataset:
    """Batch samples onto canvases, and add the boxes that `cut` returns."""

    def finish(batch: Sample) -> Sample:
        found = boxes.to_canvas(cut(batch), batch.pop('original_size'), batch['size'])
        numbers = {key: tf.cast(batch[key], tf.int32) for key in ('epoch', 'position', 'index')}
        return batch | numbers | {'boxes': found}

    shapes = {key: spec.shape for key, spec in dataset.element_spec.items()}
    shapes['image'] = (canvas_size, canvas_size, channels)
    # Padding while batching writes each pixel once; a separate canvas for each image costs a third
    # of the time of decoding.
    return dataset.padded_batch(rows, shapes).map(finish).prefetch(2)


@functools.cache
def _make_devices() -> None:
    """Initialise TensorFlow's devices, unless they are already, for use beside JAX.

    TensorFlow initialises them once, with its first computation, and would take the whole memory of
    a GPU, which training needs. GPUs are hidden here and not at import, so that a program that has
    used TensorFlow on a GPU before keeps it. The allocator is chosen at the same time: with malloc,
    every batch of 50 MB is new memory that the kernel has to clear, which takes half as long as
    decoding.
    """
    with contextlib.suppress(RuntimeError):  # they are initialised
        tf.config.set_visible_devices([], 'GPU')
    name = 'TF_CPU_ALLOCATOR_USE_BFC'
    given = name in os.environ
    os.environ.setdefault(name, '1')
    tf.config.list_logical_devices()
    if not given:
        del os.environ[name]


def _fill(batch: Batch, rows: int) -> Batch:
    """A batch of `rows` rows, with gray canvases of weight 0 and index -1 at its end."""
    missing = rows - len(batch['index'])
    if missing == 0:
        return batch
    batch = {key: np.concatenate([x, x[-1:].repeat(missing, 0)]) for key, x in batch.items()}
    batch['image'][-missing:] = GRAY
    batch['weight'][-missing:] = 0
    batch['index'][-missing:] = -1
    return batch


@functools.lru_cache(maxsize=2)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: int64 (count,)."""
    return np.random.default_rng((seed, epoch)).permutation(count)
