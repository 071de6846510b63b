"""From canvases and boxes to distorted crops, on the accelerator.

The operations that the official SwAV runs with PIL and torchvision on the host, in the same order:
crop and resize (crop.py), then flip, colour jitter in a random order, grayscale, Gaussian blur
(distortion.py), then normalise. Pixels are float32 in [0, 1]: whole levels after the resize, like
in the official code, and not rounded again.

Every function of the two files is written for one crop, and vmapped here. All random numbers of an
image come from (seed, epoch, position in the epoch), so an image looks the same on any number of
devices.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num
from ml_collections import ConfigDict

from swav_jax.augment.crop import cut
from swav_jax.augment.distortion import distort, draw


def multi_crop(
    batch: Mapping[str, Array | np.ndarray],
    *,
    seed: int | Int[Array, ''],
    data: ConfigDict,
    augment: ConfigDict,
    dtype: DTypeLike = jnp.float32,
) -> list[Num[Array, 'rows size size channels']]:
    """All crops of a batch, distorted and normalised.

    Args:
      batch: B rows; see `data.pipeline.train_dataset`.
      seed: `config.seed`.
      data: `config.data`, for the crop groups and the normalisation.
      augment: `config.augment`.
      dtype: of the result; the arithmetic is float32, or float64 for float64.

    Returns:
      For each group g: (num_crops[g]·B, size, size, channels), crop-major: the first crop of all
      images, then the second.
    """
    crops = jnp.arange(sum(data.num_crops))

    def choose(epoch, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), epoch), position)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, crops)
        return jax.vmap(lambda key: draw(key, augment, batch['image'].shape[-1]))(keys)

    def render(image, box, choice, size):
        return distort(cut(image, box, size), choice, max_sigma=augment.blur_radius_max)

    choices = jax.vmap(choose)(batch['epoch'], batch['position'])  # (B, V)
    wide = jnp.promote_types(dtype, jnp.float32)
    factors, sigma, all_boxes = (
        x.astype(wide) for x in (choices.factors, choices.sigma, batch['boxes'])
    )
    choices = choices._replace(factors=factors, sigma=sigma)
    groups, first = [], 0
    for count, size in zip(data.num_crops, data.size_crops, strict=True):
        mine = slice(first, first + count)
        boxes, chosen = jax.tree.map(lambda x, mine=mine: x[:, mine], (all_boxes, choices))
        of_image = jax.vmap(functools.partial(render, size=size), (None, 0, 0))
        rendered = jax.vmap(of_image, out_axes=1)(batch['image'], boxes, chosen)
        rendered = normalize(rendered.reshape(-1, *rendered.shape[2:]), data)
        groups.append(rendered.astype(dtype))
        first += count
    return groups


def center_crop(
    batch: Mapping[str, Array | np.ndarray], *, size: int, data: ConfigDict
) -> Float[Array, 'batch size size channels']:
    """The single box of each image, resized and normalised: the input of evaluation."""

    def render(image, box, valid):
        whole = jnp.concatenate([jnp.zeros(2), valid.astype(jnp.float32)])
        return cut(image, box, size, bounds=whole)

    return normalize(jax.vmap(render)(batch['image'], batch['boxes'][:, 0], batch['size']), data)


def normalize(
    images: Float[Array, '*batch channels'], data: ConfigDict
) -> Float[Array, '*batch channels']:
    """Subtract `data.mean` and divide by `data.std`, one number per channel."""
    return (images - jnp.float32(data.mean)) / jnp.float32(data.std)
