"""Names of files: paths that users write, the endings of images, what is hidden."""

from collections.abc import Sequence
from pathlib import Path

from swav_jax.errors import UserError

EXTENSIONS = (
    '.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.bmp', '.gif', '.webp', '.ppm', '.pgm', '.pbm',
    '.pnm', '.tif', '.tiff',
)  # fmt: skip
# Formats of pictures that are not read.
OTHER_PICTURES = (
    '.avif', '.heic', '.heif', '.jxl', '.jp2', '.j2k', '.jpx', '.svg', '.psd', '.tga', '.ico',
    '.exr', '.hdr', '.dng', '.cr2', '.cr3', '.nef', '.arw', '.orf', '.rw2', '.raf', '.dcm',
)  # fmt: skip
# Files that file managers, archivers, editors and network storage add; names that begin with a dot
# are hidden, too.
HIDDEN = frozenset((
    '@eadir', '@recycle', '@recently-snapshot', '@sharebin', '@tmp', '@__thumb', '#recycle',
    '#snapshot', '~snapshot', '$recycle.bin', 'recycler', 'system volume information',
    'network trash folder', 'temporary items', 'lost+found', '__macosx', '__pycache__',
))  # fmt: skip


def is_image(name: str) -> bool:
    """Whether a file's name has the ending of an image that can be read, in any case."""
    return name.lower().endswith(EXTENSIONS)


def is_other_picture(name: str) -> bool:
    """Whether a file's name has the ending of a picture of a format that is not read."""
    return name.lower().endswith(OTHER_PICTURES)


def is_hidden(name: str) -> bool:
    """Whether a file or folder with this name (without its path) is hidden from users."""
    return name.startswith('.') or name.lower() in HIDDEN


def absolute(path: str) -> Path:
    """The absolute path that a user means, ~ expanded.

    Raises:
      UserError: the text is not a path.
    """
    try:
        if '\0' in path:
            raise RuntimeError('it holds a zero byte')
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f'{path!r} is not a path ({error})') from error


def split_options(spec: str, allowed: Sequence[str]) -> tuple[str, dict[str, str]]:
    """('path', {'key': 'value'}) of 'path?key=value&…'.

    Raises:
      UserError: a key is not allowed.
    """
    path, _, query = spec.partition('?')
    options = dict(item.partition('=')[::2] for item in query.split('&') if item)
    for key in options:
        if key not in allowed:
            raise UserError(f'{key!r} is not known after the ?; use {", ".join(allowed)}')
    return path, options
