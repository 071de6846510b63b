"""Boxes of the crops: torchvision's distributions, for a batch at once.

A box is y0, x0, height, width in pixels of the original image.
"""

import numpy as np
import tensorflow as tf

TRIES = 10  # boxes that RandomResizedCrop draws before it takes the centre
RATIO = (3 / 4, 4 / 3)  # width over height


def draw(seed: int, epoch: int, positions: np.ndarray, crops: int) -> np.ndarray:
    """Random numbers for the boxes of images at some positions of an epoch, int64 (B,).

    Try t of crop c at position p is block number (p·crops + c)·TRIES + t of the counter-based
    generator Philox4x64 with the key (seed, epoch), so any part of an epoch can be drawn alone.

    Returns:
      float64 (B, crops, TRIES, 4), uniform in [0, 1).
    """
    drawn = []
    for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1):
        bits = np.random.Philox(key=(seed, epoch), counter=int(run[0]) * crops * TRIES)
        drawn.append(np.random.Generator(bits).random((len(run), crops, TRIES, 4)))
    return np.concatenate(drawn)


def random_resized(draws: tf.Tensor, sizes: tf.Tensor, scales: np.ndarray) -> tf.Tensor:
    """torchvision's RandomResizedCrop.get_params: the first of ten tries that fits, or the centre.

    Args:
      draws: float64 (B, V, TRIES, 4), of the area, the ratio, y and x.
      sizes: int32 (B, 2), height and width of the images.
      scales: (V, 2), smallest and largest share of the image's area.

    Returns:
      float64 (B, V, 4), whole numbers.
    """
    sizes = tf.cast(sizes, tf.float64)[:, None, None]  # (B, 1, 1, 2)
    low, high = scales[:, None, 0], scales[:, None, 1]
    area = tf.reduce_prod(sizes, -1) * (low + (high - low) * draws[..., 0])
    log_low, log_high = np.log(RATIO)
    ratio = tf.exp(log_low + (log_high - log_low) * draws[..., 1])
    box = tf.round(tf.stack([tf.sqrt(area / ratio), tf.sqrt(area * ratio)], -1))
    fits = tf.reduce_all((box > 0) & (box <= sizes), -1)
    corner = tf.floor(draws[..., 2:] * (sizes - box + 1))
    first = tf.argmax(tf.cast(fits, tf.int32), -1)  # argmax takes the first of equals
    chosen = tf.gather(tf.concat([corner, box], -1), first, batch_dims=2)
    fallback = largest_centred(sizes[:, 0])  # (B, 1, 4)
    return tf.where(tf.reduce_any(fits, -1, keepdims=True), chosen, fallback)


def largest_centred(sizes: tf.Tensor) -> tf.Tensor:
    """(…, 4): the largest centred box of an allowed ratio in images of `sizes` (…, 2)."""
    height, width = tf.unstack(sizes, axis=-1)
    tallest, widest = tf.round(width / RATIO[0]), tf.round(height * RATIO[1])
    box = tf.stack([tf.minimum(height, tallest), tf.minimum(width, widest)], -1)
    return tf.concat([(sizes - box) // 2, box], -1)


def centre(sizes: tf.Tensor, resize: int, size: int) -> tf.Tensor:
    """(B, 1, 4): what Resize(resize) and CenterCrop(size) keep of images of `sizes` (B, 2)."""
    sizes = tf.cast(sizes, tf.float64)
    short = tf.reduce_min(sizes, -1, keepdims=True)
    resized = tf.floor(resize * sizes / short)
    corner = tf.round((resized - size) / 2)
    box = tf.concat([corner, tf.fill(tf.shape(corner), np.float64(size))], -1)
    return (box * tf.tile(sizes / resized, [1, 2]))[:, None]


def to_canvas(boxes: tf.Tensor, original: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """float32 (B, V, 4): boxes after images were resized from `original` to `size`, (B, 2)."""
    scale = tf.cast(size, tf.float64) / tf.cast(original, tf.float64)
    return tf.cast(boxes * tf.tile(scale, [1, 2])[:, None], tf.float32)
