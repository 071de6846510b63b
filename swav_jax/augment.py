"""From canvases and boxes to distorted crops, on the accelerator.

The operations that the official SwAV runs with PIL and torchvision on the host, in the same order:
crop and resize, horizontal flip, colour jitter in a random order, grayscale, Gaussian blur,
normalise. Pixels are float32 in [0, 1]: whole levels after the resize, like in the official code,
and not rounded again. Saturation, hue and grayscale apply to three channels only; images with other
numbers of channels get brightness and contrast.

Every function is written for one crop and vmapped. All random numbers of an image come from (seed,
epoch, position in the epoch), so an image looks the same on any number of devices.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num, UInt8
from ml_collections import ConfigDict

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, like PIL and torchvision
# TPUs and GPUs round the operands of float32 products by default; HIGH keeps a crop within a
# quarter of a gray level.
PRECISION = lax.Precision.HIGH


class Distortion(NamedTuple):
    """The random choices for one crop; `factors` is indexed by the operations' numbers above."""

    flip: Bool[Array, '']
    order: Int[Array, ' ops']
    factors: Float[Array, '4']  # brightness, contrast, saturation: 1 for none; hue: in turns
    gray: Bool[Array, '']
    sigma: Float[Array, '']  # of the blur, in pixels; 0: no blur


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


def draw(key: Array, augment: ConfigDict, channels: int) -> Distortion:
    """The random choices for one crop, from torchvision's distributions."""
    u = jax.random.uniform(key, (9 + 4,), jnp.float32)
    strengths = jnp.float32([augment.brightness, augment.contrast, augment.saturation])
    low = jnp.maximum(1 - strengths, 0)
    scales = low + (1 + strengths - low) * u[:3]
    factors = jnp.append(scales, augment.hue * (2 * u[3] - 1))
    none = jnp.float32([1, 1, 1, 0])
    operations = 4 if channels == 3 else 2
    low, high = augment.blur_radius_min, augment.blur_radius_max
    return Distortion(
        flip=u[4] < augment.flip_p,
        order=jnp.argsort(u[9 : 9 + operations]),
        factors=jnp.where(u[5] < augment.color_jitter_p, factors, none),
        gray=u[6] < augment.grayscale_p,
        sigma=jnp.where(u[7] < augment.blur_p, low + (high - low) * u[8], 0.0),
    )


def distort(
    image: Float[Array, 'size size channels'], choice: Distortion, *, max_sigma: float
) -> Float[Array, 'size size channels']:
    """Flip, jitter, grayscale, blur. `max_sigma` bounds `choice.sigma`, which is traced."""
    image = jnp.where(choice.flip, image[:, ::-1], image)
    image = jitter(image, choice.order, choice.factors)
    if image.shape[-1] == 3:
        image = jnp.where(choice.gray, luma(image), image)
    return blur(image, choice.sigma, max_sigma=max_sigma) if max_sigma > 0 else image


def normalize(
    images: Float[Array, '*batch channels'], data: ConfigDict
) -> Float[Array, '*batch channels']:
    """Subtract `data.mean` and divide by `data.std`, one number per channel."""
    return (images - jnp.float32(data.mean)) / jnp.float32(data.std)


# Crop and resize.


def cut(
    image: UInt8[Array, 'height width channels'] | Float[Array, 'height width channels'],
    box: Float[Array, '4'],
    size: int,
    bounds: Float[Array, '4'] | None = None,
) -> Float[Array, 'size size channels']:
    """Crop `box` and resize it to size × size like PIL's antialiased bilinear filter.

    Args:
      image: levels 0 … 255.
      box: y0, x0, height, width in pixels; may be fractional.
      size: side of the result.
      bounds: a box of the pixels that may be read; by default the box itself, as in cropping first
        and resizing then.

    Returns:
      Multiples of 1/255 in [0, 1]: PIL's levels, give or take 1 where the exact value lies between
      two.
    """
    bounds = box if bounds is None else bounds
    rows = resize_weights(box[0], box[2], bounds[0], bounds[2], image.shape[0], size)
    columns = resize_weights(box[1], box[3], bounds[1], bounds[3], image.shape[1], size)
    image = image.astype(rows.dtype)
    # PIL filters along the rows first and rounds to whole levels after each direction.
    narrow = jnp.einsum('hwc,tw->htc', image, columns, precision=PRECISION)
    narrow = jnp.floor(narrow + 0.5)
    crop = jnp.einsum('sh,htc->stc', rows, narrow, precision=PRECISION)
    return jnp.floor(crop + 0.5) / 255


def resize_weights(start, extent, first, count, pixels: int, size: int) -> Float[Array, 's p']:
    """(size, pixels): row i averages the pixels around the centre of output pixel i.

    The weights are a triangle of half-width max(extent / size, 1), cut to the pixels in
    [first, first + count); a pixel at its ends counts by the fraction inside.
    """
    scale = extent / size
    centres = start + (jnp.arange(size, dtype=scale.dtype) + 0.5) * scale
    left = jnp.arange(pixels, dtype=centres.dtype)
    inside = jnp.minimum(left + 1, first + count) - jnp.maximum(left, first)
    distance = jnp.abs(left + 0.5 - centres[:, None]) / jnp.maximum(scale, 1)
    weights = jnp.maximum(1 - distance, 0) * jnp.clip(inside, 0, 1)
    return weights / weights.sum(axis=1, keepdims=True)


# Photometric distortions, on values in [0, 1].


def luma(image: Float[Array, 'size size channels']) -> Float[Array, 'size size 1']:
    """The gray image of an RGB one; with other channels, their mean."""
    if image.shape[-1] == 3:
        return (image * jnp.float32(LUMA)).sum(-1, keepdims=True)
    return image.mean(-1, keepdims=True)


def jitter(
    image: Float[Array, 'size size channels'],
    order: Int[Array, ' ops'],
    factors: Float[Array, '4'],
) -> Float[Array, 'size size channels']:
    """torchvision's ColorJitter with given factors, in a given order.

    Brightness, contrast and saturation blend the image with black, with its mean gray level, and
    with its gray image: `factor·image + (1 - factor)·other`, clipped. Because the order is traced,
    each step computes all operations and selects one.
    """
    for operation in order:
        factor = factors[operation]
        gray = luma(image)
        other = jnp.where(operation == SATURATION, gray, gray.mean())
        other = jnp.where(operation == BRIGHTNESS, 0.0, other)
        blended = jnp.clip(factor * image + (1 - factor) * other, 0, 1)
        if image.shape[-1] == 3:
            turned = turn_hue(image, factor)
            blended = jnp.where(operation == HUE, turned, blended)
        image = blended
    return image


def turn_hue(image: Float[Array, 'height width 3'], turn) -> Float[Array, 'height width 3']:
    """Add `turn` (in whole turns of the colour circle) to the hue; saturation and value stay."""
    value = image.max(-1, keepdims=True)
    chroma = value - image.min(-1, keepdims=True)
    red, green, blue = image[..., :1], image[..., 1:2], image[..., 2:]
    divisor = jnp.where(chroma > 0, chroma, 1)
    sector = jnp.where(
        value == red,
        (green - blue) / divisor,
        jnp.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    # Each channel is value - chroma times a trapezoid of the hue; 5, 3 and 1 place the three.
    k = (sector + 6 * turn + jnp.float32([5, 3, 1])) % 6
    return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def blur(
    image: Float[Array, 'size size channels'], sigma: Float[Array, ''], *, max_sigma: float
) -> Float[Array, 'size size channels']:
    """Gaussian blur, cut off at four of the largest sigmas; border pixels are repeated outside."""
    weights = blur_weights(sigma, image.shape[0], reach=math.ceil(4 * max_sigma))
    image = jnp.einsum('sh,hwc->swc', weights, image, precision=PRECISION)
    return jnp.einsum('swc,tw->stc', image, weights, precision=PRECISION)


def blur_weights(sigma, size: int, reach: int) -> Float[Array, 'size size']:
    """(size, size): row i holds the weights of the pixels in output pixel i."""
    offset = jnp.arange(-reach, size + reach) - jnp.arange(size)[:, None]
    weights = jnp.exp(-0.5 * (offset / jnp.maximum(sigma, 1e-3)) ** 2)
    weights = jnp.where(jnp.abs(offset) <= reach, weights, 0)
    before = weights[:, : reach + 1].sum(1, keepdims=True)
    after = weights[:, -reach - 1 :].sum(1, keepdims=True)
    weights = jnp.concatenate([before, weights[:, reach + 1 : -reach - 1], after], axis=1)
    return weights / weights.sum(1, keepdims=True)
