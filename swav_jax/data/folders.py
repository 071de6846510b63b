"""Images that are files: folders as torchvision's ImageFolder reads them, and lists of files."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from swav_jax.data.images import FileSource
from swav_jax.data.listing import remembered
from swav_jax.errors import UserError

EXTENSIONS = (
    '.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp', '.ppm', '.pgm', '.tif', '.tiff',
)  # fmt: skip


def is_image(name: str) -> bool:
    """Whether a file's name ends like an image's, in any case."""
    return name.lower().endswith(EXTENSIONS)


def open_folder(path: str, cache_dir: str | None) -> FileSource:
    """A folder of class folders (searched at any depth), or else a flat folder of images.

    Classes and images are numbered as torchvision's ImageFolder numbers them; a class folder
    without images keeps its number.

    Raises:
      UserError: there is no such folder, or no image in it.
    """
    root = Path(path).expanduser().absolute()
    if not root.is_dir():
        raise UserError(f'there is no folder {root}')
    try:
        listing = remembered(f'folder:{root}', lambda: list_folder(root), cache_dir)
    except OSError as error:
        raise UserError(f'{error.filename or root} cannot be listed ({error.strerror})') from error
    paths = [f'{root}{os.sep}{name}' for name in listing['files']]
    if not paths:
        raise UserError(
            f'no images in {root} or below (looked for {" ".join(EXTENSIONS)}); name a folder of '
            'images, or of class folders'
        )
    if listing['counts'] is None:
        return FileSource(paths)
    labels = np.repeat(np.arange(len(listing['counts'])), listing['counts'])
    return FileSource(paths, labels, listing['class_names'])


def list_folder(root: Path) -> tuple[dict, list[str]]:
    """Class names, the number of images of each, all files below `root`; and the folders seen."""
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    class_names = [entry.name for entry in entries if entry.is_dir()]
    files, counts, seen = [], [], [str(root)]
    for name in class_names:
        before = len(files)
        for folder, found in sorted(walk(str(root / name))):
            seen.append(folder)
            inside = os.path.relpath(folder, root)
            files += [f'{inside}{os.sep}{file}' for file in sorted(found) if is_image(file)]
        counts.append(len(files) - before)
    if not files:
        files = [entry.name for entry in entries if is_image(entry.name) and entry.is_file()]
        class_names = counts = None
    return {'class_names': class_names, 'counts': counts, 'files': files}, seen


def walk(folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """This folder and all below it, each with the names of its files.

    Links are followed, but not into a folder that they lie in themselves.
    """
    status = Path(folder).stat()
    here = status.st_dev, status.st_ino
    if here in above:
        return
    with os.scandir(folder) as found:
        entries = list(found)
    yield folder, [entry.name for entry in entries if not entry.is_dir()]
    for entry in entries:
        if entry.is_dir():
            yield from walk(entry.path, (*above, here))


LIST_OPTIONS = ('labels', 'remove_img_path_prefix', 'new_img_path_prefix')


def open_filelist(spec: str) -> FileSource:
    """A list of image files, as text or as VISSL's .npy.

    The text has one path a line, or a path and a whole number, its label. Relative paths begin
    where the list lies and stay below it. After a `?` and joined by `&` may follow
    `labels=FILE.npy`, and VISSL's `remove_img_path_prefix=/old/` and `new_img_path_prefix=/new/`
    where the images have moved.

    Raises:
      UserError: the list cannot be read, is empty or is not a list of paths.
    """
    path, options = split_options(spec, LIST_OPTIONS)
    file = Path(path).expanduser().absolute()
    if file.suffix == '.npy':
        paths, labels = [str(name) for name in load_npy(file, 'U').tolist()], None
    else:
        paths, labels = _read_text(file)
    if 'labels' in options:
        labels = load_npy(Path(options['labels']).expanduser(), 'iu')
    if not paths:
        raise UserError(f'{file} lists no images; it should hold one path a line')
    if labels is not None and len(labels) != len(paths):
        raise UserError(f'{len(paths)} images, but {len(labels)} labels: they must be as many')
    old, new = (options.get(name, '') for name in LIST_OPTIONS[1:])
    if old and not any(name.startswith(old) for name in paths):
        raise UserError(
            f'no path begins with remove_img_path_prefix={old}; {paths[0]} is the first'
        )
    names = [name.removeprefix(old) for name in paths]
    for name in names:
        if '..' in name and (new or not name.startswith('/')) and _climbs(name):
            raise UserError(
                f'{file} lists {name}, which lies outside of {new or file.parent}: list the whole '
                'path of an image that is elsewhere'
            )
    paths = [new + name for name in names]
    return FileSource([os.path.join(file.parent, name) for name in paths], labels)  # noqa: PTH118


def _climbs(name: str) -> bool:
    """Whether a path below a folder leaves it through its parent."""
    return f'{os.path.normpath(name.lstrip(os.sep))}{os.sep}'.startswith(f'..{os.sep}')


def split_options(spec: str, allowed: Sequence[str]) -> tuple[str, dict[str, str]]:
    """('path', {'key': 'value'}) of 'path?key=value&…'.

    Raises:
      UserError: a key that is not allowed.
    """
    path, _, query = spec.partition('?')
    options = dict(item.partition('=')[::2] for item in query.split('&') if item)
    for key in options:
        if key not in allowed:
            raise UserError(f'{key!r} is not known after the ?; use {", ".join(allowed)}')
    return path, options


def load_npy(file: Path, kinds: str) -> np.ndarray:
    """A one-dimensional array of a .npy file whose dtype is one of `kinds`.

    Arrays of Python objects are refused: loading them could run code.

    Raises:
      UserError: the file is missing or holds something else.
    """
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, 'strerror', None) or 'not a .npy array, or one of Python objects'
        raise UserError(
            f'{file} cannot be read ({reason}); save a list as numpy.save(file, numpy.array(list))'
        ) from error
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise UserError(f'{file} holds {array.dtype} {array.shape}, not a list of the right kind')
    return array


def _read_text(file: Path) -> tuple[list[str], np.ndarray | None]:
    try:
        lines = file.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not UTF-8 text'
        raise UserError(f'{file} cannot be read ({reason})') from error
    lines = [line.strip() for line in lines if line.strip()]
    ends = [line.rsplit(maxsplit=1) for line in lines]
    if not all(len(end) == 2 and end[1].isdecimal() for end in ends):
        return lines, None
    return [end[0] for end in ends], np.array([int(end[1]) for end in ends], np.int32)
