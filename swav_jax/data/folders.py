"""Folders of images, numbered as torchvision's ImageFolder numbers them."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from swav_jax.data.images import FileSource
from swav_jax.data.listing import Stamps, remembered, stamp
from swav_jax.data.names import EXTENSIONS, Remarks, is_hidden, is_image, is_other_picture, some
from swav_jax.data.regular import absolute
from swav_jax.errors import UserError
from swav_jax.terminal import printable

# A run's folder holds most of these files. A folder of data has no reason to hold three.
RUN_FILES = frozenset(('lock', 'config.json', 'metrics.jsonl', 'events.jsonl', 'summary.json'))
HIDDEN = 'left out hidden folders, which torchvision would take for classes or search'
HIDDEN_FILES = 'left out hidden files that are named as images'
RUNS = 'left out folders of runs with their pictures'
PREVIEWS = 'left out pictures that swav_jax.commands.preview drew'
NO_FILES = 'left out what is named as an image but is no file (a pipe, a device, a broken link)'
OTHERS = 'left out pictures of formats that are not read; convert them to JPEG or PNG'
BESIDE = (
    'left out images beside the class folders, as torchvision does; move them into one to use them'
)


def open_folder(path: str, workdir: str | None) -> FileSource:
    """A folder of class folders (searched at any depth), or else a flat folder of images.

    Classes and images are numbered as torchvision's ImageFolder numbers them; a class folder
    without images keeps its number. Left out, and said in `notes`, are

    - hidden files and folders (`.git`, `._x.jpg`, `.ipynb_checkpoints`, `@eaDir`, `__MACOSX`, …);
    - folders of runs, the given one and others, with all that they hold;
    - what has an image's name but is no file, and pictures of formats that are not read;
    - images beside two or more class folders, which torchvision does not see either.

    Images beside a single folder of images are no class structure: all are taken, unlabelled, those
    of the folder itself first.

    Args:
      path: of the folder.
      workdir: of the run, or None; there the listing is kept.

    Raises:
      UserError: there is no such folder, a part of it cannot be listed, it is a run's, or it holds
        no image.
    """
    root = absolute(path)
    try:
        if not stat.S_ISDIR(root.stat().st_mode):
            raise UserError(f'there is no folder {root}: it is a file')
        found = remembered(
            f'folder:{root}', lambda: list_folder(str(root), workdir), workdir, _is_listing
        )
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
    if found['counts'] is None:
        return FileSource(paths, notes=notes, root=prefix)
    labels = np.repeat(np.arange(len(found['counts'])), found['counts'])
    return FileSource(paths, labels, found['class_names'], notes, root=prefix)


def _is_listing(found: Any) -> bool:
    """Whether this is a listing by `list_folder` that names nothing outside of its folder."""
    if type(found['files']) is not list:
        return False
    texts = [*found['files'], *found['notes'], *(found['class_names'] or ())]
    if not all(type(text) is str for text in texts) or type(found['others']) is not str:
        return False
    if b'\0' in b''.join(map(os.fsencode, found['files'])):
        return False
    inside = not any(
        name.startswith('/') or ('..' in name and '..' in Path(name).parts)
        for name in found['files']
    )
    counts = found['counts']
    if counts is None:
        return inside
    return (
        inside
        and len(counts) == len(found['class_names'])
        and all(type(count) is int and count >= 0 for count in counts)
        and sum(counts) == len(found['files'])
    )


def list_folder(root: str, workdir: str | None) -> tuple[dict[str, Any], Stamps]:
    """Lists `root`, the given run's folder left out; returns the listing and the folders' stamps.

    The listing has `files` below root, `class_names` and `counts` (images of each class, in the
    order of the files) or None twice, `notes`, and `others`: a word on files that are no images.
    """
    look = Look(root, workdir)
    top_files, folders = look.at(root)
    classes: dict[str, list[str]] = {}
    for name in folders:
        runs = look.remarks.count(RUNS)
        files = [
            f'{look.inside(folder)}{os.sep}{image}'
            for folder, images in sorted(look.below(look.prefix + name))
            for image in images
        ]
        if files or look.remarks.count(RUNS) == runs:  # what holds runs alone is no class
            classes[name] = files
    filled = [name for name, files in classes.items() if files]
    files = [file for name in classes for file in classes[name]]
    class_names: list[str] | None = list(classes)
    counts: list[int] | None = [len(classes[name]) for name in classes]
    notes = []
    if not filled or (top_files and len(filled) == 1):
        if filled:
            notes.append(
                f'{root}: no classes, as {len(top_files):,} images lie in the folder itself and '
                f'{len(files):,} in the only folder of images, {filled[0]}: all are taken'
            )
        files, class_names, counts = top_files + files, None, None
    else:
        for name in top_files:
            look.remarks.add(BESIDE, name)
        if empty := [name for name in classes if not classes[name]]:
            notes.append(
                f'{root}: classes without an image, which keep their numbers ({len(empty):,}: '
                f'{some(empty, len(empty))})'
            )
    return {
        'files': files,
        'class_names': class_names,
        'counts': counts,
        'notes': [*notes, *look.remarks.lines(root)],
        'others': some(look.others, look.number_of_others) if look.others else '',
    }, look.stamps


class Look:
    """Looks into folders, and notes what is left out.

    Args:
      root: the path in which notes name files.
      workdir: a run's folder or None; others are known by what they hold.

    Attributes:
      remarks: on what was left out.
      stamps: of each folder that was looked into, taken before.
      others: the first names of files that are no pictures, for the case that nothing else is
        found; number_of_others is how many there are.
    """

    def __init__(self, root: str, workdir: str | None):
        self.root = root
        self.prefix = root if root.endswith(os.sep) else root + os.sep
        self.remarks = Remarks()
        self.stamps: Stamps = {}
        self.others: list[str] = []
        self.number_of_others = 0
        try:
            self.run = None if workdir is None else _identity(workdir)
        except OSError:  # not made yet
            self.run = None

    def at(self, folder: str) -> tuple[list[str], list[str]]:
        """The images and the folders in a folder, by name, sorted; a run's holds none.

        Raises:
          OSError: it cannot be listed.
          UserError: it is `root`, and a run's.
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
            self._leave_out(RUNS, folder)
            return [], []
        self.stamps[folder] = before
        images, folders = [], []
        for entry in entries:
            if _is(entry, os.DirEntry.is_dir):
                if is_hidden(entry.name):
                    self._leave_out(HIDDEN, entry.path)
                else:
                    folders.append(entry.name)
            elif self._is_data(entry):
                images.append(entry.name)
        return images, folders

    def inside(self, path: str) -> str:
        """A path below `root`, from there on."""
        return path.removeprefix(self.prefix)

    def below(self, folder: str) -> Iterator[tuple[str, list[str]]]:
        """This folder and all below it, each with the names of its images.

        Links are followed, but not into a folder that they lie in themselves.
        """
        waiting: list[tuple[str, frozenset]] = [(folder, frozenset())]
        while waiting:
            here, above = waiting.pop()
            identity = _identity(here)
            if identity in above:
                continue
            images, folders = self.at(here)
            yield here, images
            inside = above | {identity}
            waiting += [(f'{here}{os.sep}{name}', inside) for name in folders]

    def _is_data(self, entry: os.DirEntry) -> bool:
        """Whether an entry that is no folder is an image to be listed."""
        if not is_image(entry.name):
            if is_other_picture(entry.name) and not is_hidden(entry.name):
                self._leave_out(OTHERS, entry.path)
            elif not is_hidden(entry.name):
                self.number_of_others += 1
                if len(self.others) < 3:
                    self.others.append(self.inside(entry.path))
            return False
        if is_hidden(entry.name):
            self._leave_out(HIDDEN_FILES, entry.path)
        elif not _is(entry, os.DirEntry.is_file):
            self._leave_out(NO_FILES, entry.path)
        elif entry.name == 'preview.png' and _is_drawn(entry.path):
            self._leave_out(PREVIEWS, entry.path)
        else:
            return True
        return False

    def _leave_out(self, reason: str, path: str) -> None:
        self.remarks.add(reason, self.inside(path))


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
    """Whether a PNG says that matplotlib made it, as it does at the file's beginning."""
    try:
        with Path(path).open('rb') as file:
            return b'Software\0Matplotlib' in file.read(512)
    except OSError:  # as unreadable as other images may be
        return False
