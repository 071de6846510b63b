"""Flip, colour jitter, grayscale and blur of a crop, on values in [0, 1].

Saturation, hue and grayscale apply to three channels only; images with other numbers of channels
get brightness and contrast.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from swav_jax.augment.crop import PRECISION

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, like PIL and torchvision


class Distortion(NamedTuple):
    """The random choices for one crop; `factors` is indexed by the operations' numbers above."""

    flip: Bool[Array, '']
    order: Int[Array, ' ops']
    factors: Float[Array, '4']  # brightness, contrast, saturation: 1 for none; hue: in turns
    gray: Bool[Array, '']
    sigma: Float[Array, '']  # of the blur, in pixels; 0: no blur


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
