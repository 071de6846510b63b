"""What the images of a source are like, for recipes that choose their settings by it."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from ml_collections import ConfigDict

from swav_jax.data import sources
from swav_jax.data.pillow import decode_with_pil
from swav_jax.errors import UserError

SAMPLE = 500  # images that are decoded
SIDE = 64  # of the canvas that they are decoded onto
LEAST_STD = 0.05  # of a channel: images that are nearly constant are not amplified


@dataclasses.dataclass(frozen=True)
class Survey:
    """A source's images.

    Attributes:
      num_images: all of them, or `config.data.limit`.
      side: median of their shorter sides, in pixels.
      sides: the smallest and the largest of these.
      mean, std: of each channel, over pixels in [0, 1].
    """

    num_images: int
    side: int
    sides: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


# What a recipe is shown for, before images are named.
ASSUMED = Survey(10_000, 64, (64, 64), (0.45,), (0.22,))  # mean and std of any channel


def survey(data: ConfigDict) -> Survey:
    """Count the images of `config.data.source` and look at some that are spread over it.

    Args:
      data: a section `config.data`: `source`, `limit` and `channels` count.

    Returns:
      What was found; without a source, `ASSUMED` with the limit.

    Raises:
      UserError: the source cannot be opened, or none of these images can be read.
    """
    if not data.source:
        return dataclasses.replace(
            ASSUMED,
            num_images=data.limit or ASSUMED.num_images,
            mean=ASSUMED.mean * data.channels,
            std=ASSUMED.std * data.channels,
        )
    source = sources.open_source(data.source, limit=data.limit, channels=data.channels)
    count = min(len(source), SAMPLE)
    rows = np.arange(count) * len(source) // count
    with ThreadPoolExecutor() as readers:
        found = readers.map(lambda row: decode_with_pil(source, SIDE, data.channels, row), rows)
        read = [(pixels / 255, size) for pixels, size, weight in found if weight]
    if not read:
        raise UserError(
            f'config.data.source={data.source!r}: none of {count} images that were tried can be '
            'read: look at the files'
        )
    sides = np.array([min(size) for _, size in read])
    # Each image counts alike, whatever its shape.
    mean = np.mean([pixels.mean((0, 1)) for pixels, _ in read], 0)
    square = np.mean([(pixels**2).mean((0, 1)) for pixels, _ in read], 0)
    std = np.maximum(np.sqrt(np.maximum(square - mean**2, 0)), LEAST_STD)
    return Survey(
        num_images=len(source),
        side=int(np.median(sides)),
        sides=(int(sides.min()), int(sides.max())),
        mean=tuple(np.round(mean, 3).tolist()),
        std=tuple(np.round(std, 3).tolist()),
    )
