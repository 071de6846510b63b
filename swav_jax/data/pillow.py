"""Reading an image with Pillow, whatever the file holds, within a bound of memory.

What cannot be read, or would take a gigabyte, becomes a gray canvas of weight 0; no image stops a
run. As many images are decoded at once as `MEMORY` has room for.
"""

import contextlib
import io
import logging
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, features

from swav_jax.data.images import ArraySource, Source
from swav_jax.data.resize import Converter, fit
from swav_jax.errors import printable

GRAY = 128  # level of the canvas in place of an unreadable image
MAX_PIXELS = 89_478_485  # Pillow's limit, above which an image may be a decompression bomb
MAX_MEMORY = 2**30  # bytes that decoding one image may take
LARGE_BYTES = 2**24  # of a file: larger ones are read here, one at a time
FORMATS = ['JPEG', 'PNG', 'BMP', 'GIF', 'WEBP', 'PPM', 'TIFF']  # not those that run programs
if features.check('avif'):
    FORMATS.append('AVIF')
PILLOW = re.compile(r'PIL\.')  # the modules whose warnings are ignored
LOG = logging.getLogger(__name__)
_reported: set[str] = set()


class UnreadableError(Exception):
    """A sound image that is refused; the text is the reason."""


class Budget:
    """Lets threads run at the same time while they take at most `total` together."""

    def __init__(self, total: int):
        self.total = self._free = total
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Wait until there is room for `amount`, or for all if that is more."""
        amount = min(amount, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()


MEMORY = Budget(max(2**29, (os.cpu_count() or 8) * 2**26))  # bytes


def decode_with_pil(
    source: Source,
    canvas_size: int,
    channels: int,
    index: np.integer,
    *,
    centre: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """The pixels of an image, their original size, and the weight; see `decode.add_pixels`."""
    index = int(index)
    try:
        _ignore_warnings()
        if isinstance(source, ArraySource):
            pixels, size = _fit_array(source.read(index), canvas_size, channels, centre)
        else:
            least = canvas_size if centre is None else None
            with _open(source, index, least) as (image, original):
                convert = _converter(image, 'L' if channels == 1 else 'RGB', source, index)
                pixels, size = fit(image, original, convert, canvas_size, centre)
        pixels = pixels.reshape(*pixels.shape[:2], channels)
        return pixels, np.array(size[::-1], np.int32), np.float32(1)
    except UnreadableError as error:
        _report_once(f'{error}; such images count as unreadable', source, index)
    except Exception:  # decoders fail in many ways, and none of them may stop a run
        pass
    gray = np.full((canvas_size, canvas_size, channels), GRAY, np.uint8)
    return gray, np.full(2, canvas_size, np.int32), np.float32(0)


def is_readable(source: Source, index: int) -> bool:
    """Whether an image can be read and decoded."""
    return isinstance(source, ArraySource) or decode_with_pil(source, 1, 1, index)[2] > 0


def _ignore_warnings() -> None:
    """Pillow warns of odd metadata, which does not matter here."""
    ignored = ('ignore', None, Warning, PILLOW, 0)
    if ignored not in warnings.filters:  # not at import: whoever catches warnings resets filters
        warnings.filterwarnings('ignore', module=PILLOW.pattern)


def _report_once(text: str, source: Source, index: int) -> None:
    if text not in _reported:
        _reported.add(text)
        LOG.warning('%s: %s (reported once)', printable(source.name(index)), text)


def _fit_array(
    image: np.ndarray, canvas_size: int, channels: int, centre: tuple[int, int] | None
) -> tuple[np.ndarray, tuple[int, int]]:
    """`fit` of a uint8 (height, width, channels)."""
    if image.shape[-1] in (1, 3):
        picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
        mode = 'L' if channels == 1 else 'RGB'
        return fit(picture, picture.size, lambda part: part.convert(mode), canvas_size, centre)
    planes = [Image.fromarray(image[..., i]) for i in range(image.shape[-1])]
    found = [fit(plane, plane.size, lambda part: part, canvas_size, centre) for plane in planes]
    return np.stack([pixels for pixels, _ in found], -1), found[0][1]


@contextlib.contextmanager
def _open(
    source: Source, index: int, least: int | None
) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """An image that is loaded, with room in `MEMORY` for it, and its width and height.

    A JPEG is halved while its longer side reaches `least`, unless that is None.

    Raises:
      UnreadableError: loading it would take too much memory.
      Exception: the file cannot be read, or is not an image.
    """
    extent = source.extent(index)
    large = extent is not None and extent[2] > LARGE_BYTES
    with contextlib.ExitStack() as held:
        if large:  # alone: its size in memory is known after reading, when two might want more
            held.enter_context(MEMORY.hold(MEMORY.total))
        content = source.read(index)
        if isinstance(content, Image.Image):
            yield content, content.size
            return
        image = held.enter_context(Image.open(io.BytesIO(content), formats=FORMATS))
        original = image.size
        halved = None
        if least is not None:
            least = [max(side * least // max(original), 1) for side in original]
            halved = image.draft(None, least)
        needed = _memory(image, original)
        if math.prod(original) > MAX_PIXELS or needed > MAX_MEMORY:
            raise UnreadableError(
                f'needs too much memory: at most {MAX_PIXELS:,} pixels and {MAX_MEMORY >> 20} MiB '
                'are read'
            )
        if not large:
            held.enter_context(MEMORY.hold(needed))
        image.load()
        yield image, original if halved else image.size  # loading turns some TIFFs


def _memory(image: Image.Image, original: tuple[int, int]) -> int:
    """Bytes that Pillow takes to load an image and to resize it; measured, to within a tenth."""
    pixels = math.prod(original)
    loaded = math.prod(image.size) * {'1': 1, 'L': 1, 'P': 1}.get(
        image.mode, 2 if image.mode.startswith('I;16') else 4
    )
    filters = 16 * sum(image.size)  # of a line that becomes a canvas
    match image.format:
        case 'WEBP' | 'AVIF':  # the last picture, the next one, and a copy
            loaded = 16 * pixels
        case 'JPEG' | 'MPO' if image.info.get('progressive'):  # all coefficients
            loaded += 2 * len(image.getbands()) * pixels
        case 'TIFF':  # a strip or a tile
            width, height = image.size
            tags = image.tag_v2
            sides = tags.get(322, width), tags.get(323, min(tags.get(278, height), height))
            bits = tags.get(258, (1,))
            loaded += math.prod(sides) * max(sum(bits), bits[0] * tags.get(277, 1)) // 8
    return loaded + filters


def _converter(image: Image.Image, mode: str, source: Source, index: int) -> Converter:
    """What converts any part of the image to a mode, RGB or L.

    Pillow clips levels of more than 8 bits to 255; here black and white stay black and white.

    Raises:
      UnreadableError: it is not known which number is white.
    """
    scale = _scale_levels(image, source, index)
    if scale:
        return lambda part: Image.fromarray(scale(np.asarray(part)).astype(np.uint8)).convert(mode)
    if 'transparency' in image.info:  # of a palette: otherwise Pillow warns
        return lambda part: part.convert('RGBA').convert(mode)
    return lambda part: part.convert(mode)


def _scale_levels(
    image: Image.Image, source: Source, index: int
) -> Callable[[np.ndarray], np.ndarray] | None:
    """What scales the levels of an image to 0 … 255; None if they are that already."""
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        white = 2 ** getattr(image, 'tag_v2', {}).get(258, (16,))[0] - 1
        _report_once('gray levels of 16 bits are scaled to 8, 65535 to 255', source, index)
        return lambda levels: (levels.astype(np.uint32) * 255 + white // 2) // white
    if image.mode == 'I':
        raise UnreadableError('has levels of 32 bits, and which is white is not known')
    if image.mode == 'LAB':
        raise UnreadableError('has colours in LAB, which PIL does not convert')
    if image.mode != 'F':
        return None
    low, high = image.getextrema()
    if not 0 <= low <= high <= 1:
        raise UnreadableError('has levels outside of 0 to 1, and which is white is not known')
    _report_once('levels from 0 to 1 are scaled to 0 to 255', source, index)

    def scale(levels: np.ndarray) -> np.ndarray:
        if not np.isfinite(levels).all():
            raise UnreadableError('has levels that are not a number')
        return np.rint(255 * levels)

    return scale
