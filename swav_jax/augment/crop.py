"""Cut a box out of an image and resize it, as two small matrix products."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

# TPUs and GPUs round the operands of float32 products by default; HIGH keeps a crop within a
# quarter of a gray level.
PRECISION = lax.Precision.HIGH


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
