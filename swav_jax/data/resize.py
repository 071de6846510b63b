"""From a whole picture to the pixels on the canvas, with Pillow's antialiased bilinear filter.

Training keeps a picture whole: its longer side is scaled down to the canvas, so the crops of a wide
picture come from few pixels (those of 600×3000 from 102×512, on a canvas of 512).
Evaluation looks at the middle only: of a picture larger than the canvas it gets that part, resized
from the file's own pixels, like torchvision does.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]  # left, upper, right, lower
Converter = Callable[[Image.Image], Image.Image]
BAND = 2**20  # pixels that are converted at once


def fit(
    image: Image.Image,
    original: tuple[int, int],
    convert: Converter,
    canvas_size: int,
    centre: tuple[int, int] | None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Convert an image, and resize it if it is larger than the canvas.

    Args:
      image: the picture, maybe scaled down already.
      original: (width, height) of the picture before that.
      convert: to the mode of the result; called with parts of the image.
      canvas_size: the longest side of the result.
      centre: (resize, size) of evaluation, or None; see `decode.add_pixels`.

    Returns:
      The pixels, and the (width, height) that boxes refer to.
    """
    size, box = image.size, (0, 0, *image.size)
    longer = max(size)
    if longer > canvas_size and centre is None:
        size = tuple(max(round(side * canvas_size / longer), 1) for side in size)
    elif longer > canvas_size:
        box = _middle(size, *centre)
        size = original = (centre[0], centre[0])
    return np.asarray(_resample(image, convert, size, box)), original


def _middle(size: tuple[int, int], resize: int, crop: int) -> Box:
    """The part of an image that Resize(resize), CenterCrop(crop) keep, and a frame around it.

    Resized to resize × resize, it holds the crop where the two place it in an image of that size.
    """
    short = min(size)
    resized = [resize * side // short for side in size]
    corner = [round((side - crop) / 2) - round((resize - crop) / 2) for side in resized]
    scale = [side / after for side, after in zip(size, resized, strict=True)]
    left, upper = (x * s for x, s in zip(corner, scale, strict=True))
    right, lower = (min((x + resize) * s, n) for x, s, n in zip(corner, scale, size, strict=True))
    return left, upper, right, lower


def _resample(
    image: Image.Image, convert: Converter, size: tuple[int, int], box: Box
) -> Image.Image:
    """The box of the converted image, resized.

    Pillow filters along the rows first, so bands of rows are converted and made narrow one by one:
    besides the image, only small ones are in memory.
    """
    if size == image.size and box == (0, 0, *image.size):
        return convert(image)
    (left, right), (top, bottom) = (
        _reach(box[axis], box[axis + 2], size[axis], image.size[axis]) for axis in (0, 1)
    )
    rows = max(BAND // (right - left), 1)
    narrow = None
    for first in range(top, bottom, rows):
        band = convert(image.crop((left, first, right, min(first + rows, bottom))))
        part = (box[0] - left, 0, box[2] - left, band.height)
        band = band.resize((size[0], band.height), Image.Resampling.BILINEAR, part)
        if narrow is None:
            narrow = Image.new(band.mode, (size[0], bottom - top))
        narrow.paste(band, (0, first - top))
    part = (0, box[1] - top, size[0], box[3] - top)
    return narrow.resize(size, Image.Resampling.BILINEAR, part)


def _reach(start: float, end: float, size: int, pixels: int) -> tuple[int, int]:
    """The range of pixels that the filter reads for `size` pixels between start and end.

    It reads one pixel of the result, and at least one of its own, beyond the box.
    """
    margin = max((end - start) / size, 1) + 1
    return max(math.floor(start - margin), 0), min(math.ceil(end + margin), pixels)
