"""Folders of images, numbered like torchvision's ImageFolder."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from swav_jax.data.images import FileSource
from swav_jax.data.listing import OTHER_FORMATS, Remarks, Stamps, remembered, some, stamp
from swav_jax.data.names import EXTENSIONS, absolute, is_hidden, is_image, is_other_picture
from swav_jax.errors import UserError, printable

# A run's folder holds most of these files. A folder of data has no reason to hold three.
RUN_FILES = frozenset(('lock', 'config.json', 'metrics.jsonl', 'events.jsonl', 'summary.json'))
# Reasons for remarks.
HIDDEN = 'left out hidden folders, which torchvision would take for classes or search'
HIDDEN_FILES = 'left out hidden files that are named as images'
RUNS = 'left out folders of runs with their pictures'
PREVIEWS = 'left out pictures that swav_jax.commands.preview drew'
NO_FILES = 'left out what is named as an image but is not a file (a pipe, a device, a broken link)'
BESIDE = (
    'left out images beside the class folders, like torchvision; move them into one to use them'
)


def open_folder(path: str, workdir: str | None) -> FileSource:
    """A folder of class folders (searched at any depth), or else a flat folder of images.

    Classes and images have the numbers of torchvision's ImageFolder; a class folder without images
    keeps its number. Left out, and reported in `notes`, are

    - hidden files and folders (`.git`, `._x.jpg`, `.ipynb_checkpoints`, `@eaDir`, `__MACOSX`, …);
    - folders of runs, `workdir` and others, with everything in them;
    - what has an image's name but is not a file, and pictures of formats that are not read;
    - images beside two or more class folders, which torchvision ignores, too.

    Images beside a single folder of images are no class structure: all are used, unlabelled, those
    of the folder itself first.

    Args:
      path: of the folder.
      workdir: the run's folder, which keeps the listing; None for none.

    Raises:
      UserError: there is no such folder, a part of it cannot be listed, it is the folder of a run,
        or it holds no image.
    """
    root = absolute(path)
    try:
        if not stat.S_ISDIR(root.stat().st_mode):
            raise UserError(f'there is no folder {root}: it is a file')
        found = remembered(f'folder:{root}', lambda: _list(str(root), workdir), workdir)
    except FileNotFoundError as error:
        raise UserError(f'there is no folder {error.filename}') from error
    except OSError as error:
        raise UserError(f'{error.filename or root} cannot be listed ({error.strerror})') from error
    if not found['files']:
        holds = f'; other files: {found["others"]}' if found['others'] else ''
        raise UserError(
            f'no images in {root} or below (looked for {" ".join(EXTENSIONS)}){holds}; name a '
            f'folder of images, or of class folders{"".join(f"; {x}" for x in found["notes"])}'
        )
    prefix = os.path.join(root, '')  # noqa: PTH118
    paths = [prefix + name for name in found['files']]
    notes = [printable(note) for note in found['notes']]
    classes = found['classes']
    if classes is None:
        return FileSource(paths, notes=notes, root=prefix)
    labels = np.repeat(np.arange(len(classes)), list(classes.values()))
    return FileSource(paths, labels, list(classes), notes, root=prefix)


def _list(root: str, workdir: str | None) -> tuple[dict[str, Any], Stamps]:
    """The listing of `root`, and the stamps of its folders.

    The listing has `files` below root, `classes` (the number of images of each, in the order of the
    files) or None, `notes`, and `others`: names of files that are no images.
    """
    scan = _Scan(root, workdir)
    top_files, folders = scan.entries(root)
    classes: dict[str, list[str]] = {}
    for name in folders:
        runs = scan.remarks.counts[RUNS]
        files = [
            f'{scan.inside(folder)}{os.sep}{image}'
            for folder, images in sorted(scan.below(scan.prefix + name))
            for image in images
        ]
        if files or scan.remarks.counts[RUNS] == runs:  # a folder of runs only is not a class
            classes[name] = files
    filled = [name for name, files in classes.items() if files]
    files = [file for name in classes for file in classes[name]]
    labelled = len(filled) > 1 or (filled and not top_files)
    notes = []
    if labelled:
        for name in top_files:
            scan.remarks.add(BESIDE, name)
        if empty := [name for name in classes if not classes[name]]:
            notes.append(
                f'{root}: classes without an image, which keep their numbers ({len(empty):,}: '
                f'{some(empty, len(empty))})'
            )
    elif filled:
        notes.append(
            f'{root}: no classes, because {len(top_files):,} images lie in the folder itself '
            f'and {len(files):,} in the only folder of images, {filled[0]}: all are used'
        )
    return {
        'files': files if labelled else top_files + files,
        'classes': {name: len(classes[name]) for name in classes} if labelled else None,
        'notes': [*notes, *scan.remarks.lines(root)],
        'others': scan.others.names(''),
    }, scan.stamps


class _Scan:
    """Lists folders below `root`, and counts what it leaves out.

    Attributes:
      remarks: on what was left out.
      others: files that are no pictures, reported if there are no images.
      stamps: of each folder that was listed, taken before.
    """

    def __init__(self, root: str, workdir: str | None):
        self.root = root
        self.prefix = root if root.endswith(os.sep) else root + os.sep
        self.remarks, self.others = Remarks(), Remarks()
        self.stamps: Stamps = {}
        try:
            self.run = None if workdir is None else _identity(workdir)
        except OSError:  # it does not exist yet
            self.run = None

    def inside(self, path: str) -> str:
        return path.removeprefix(self.prefix)

    def below(self, folder: str) -> Iterator[tuple[str, list[str]]]:
        """This folder and all below it, each with the names of its images.

        Links are followed, but not into a folder that contains them.
        """
        waiting: list[tuple[str, frozenset]] = [(folder, frozenset())]
        while waiting:
            here, above = waiting.pop()
            identity = _identity(here)
            if identity in above:
                continue
            images, folders = self.entries(here)
            yield here, images
            waiting += [(f'{here}{os.sep}{name}', above | {identity}) for name in folders]

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        """The sorted names of the images and folders in a folder; none of a run's.

        Raises:
          OSError: it cannot be listed.
          UserError: `root` is the folder of a run.
        """
        before = stamp(folder)
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        marks = [x for x in entries if x.name in RUN_FILES and _is(x, os.DirEntry.is_file)]
        if _identity(folder) == self.run or len(marks) >= 3:
            if folder == self.root:
                raise UserError(
                    f'{folder} is the folder of a run, which writes pictures of its own there: '
                    'name another --workdir, or move the images to a folder of their own'
                )
            self.remarks.add(RUNS, self.inside(folder))
            return [], []
        self.stamps[folder] = before
        images, folders = [], []
        for entry in entries:
            is_folder = _is(entry, os.DirEntry.is_dir)
            if reason := self._reason(entry, is_folder):
                self.remarks.add(reason, self.inside(entry.path))
            elif is_folder:
                folders.append(entry.name)
            elif is_image(entry.name):
                images.append(entry.name)
            elif not is_hidden(entry.name):
                self.others.add('', self.inside(entry.path))
        return images, folders

    def _reason(self, entry: os.DirEntry, is_folder: bool) -> str | None:
        """Why an entry is left out; None if it is a folder or an image, or not worth a remark."""
        hidden = is_hidden(entry.name)
        if is_folder:
            return HIDDEN if hidden else None
        if is_other_picture(entry.name) and not hidden:
            return OTHER_FORMATS
        if not is_image(entry.name):
            return None
        if hidden:
            return HIDDEN_FILES
        if not _is(entry, os.DirEntry.is_file):
            return NO_FILES
        if entry.name == 'preview.png' and _is_drawn(entry.path):
            return PREVIEWS
        return None


def _identity(folder: str) -> tuple[int, int]:
    status = Path(folder).stat()
    return status.st_dev, status.st_ino


def _is(entry: os.DirEntry, kind) -> bool:
    """Whether an entry is of a kind, links followed; a link to itself is of none."""
    try:
        return kind(entry)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _is_drawn(path: str) -> bool:
    """Whether matplotlib wrote a PNG, according to its beginning."""
    try:
        with Path(path).open('rb') as file:
            return b'Software\0Matplotlib' in file.read(512)
    except OSError:  # like any other unreadable image
        return False
