"""What names of files tell: which are images, which are hidden; and lists of names in one line."""

from collections.abc import Iterable, Sequence

from swav_jax.terminal import printable

EXTENSIONS = (
    '.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.bmp', '.gif', '.webp', '.ppm', '.pgm', '.pbm',
    '.pnm', '.tif', '.tiff',
)  # fmt: skip
# Pictures, but of formats that are not read.
OTHER_PICTURES = (
    '.avif', '.heic', '.heif', '.jxl', '.jp2', '.j2k', '.jpx', '.svg', '.psd', '.tga', '.ico',
    '.exr', '.hdr', '.dng', '.cr2', '.cr3', '.nef', '.arw', '.orf', '.rw2', '.raf', '.dcm',
)  # fmt: skip
# What file managers, archivers, editors and network storage put beside the files of their users;
# what begins with a dot is hidden, too.
HIDDEN = frozenset((
    '@eadir', '@recycle', '@recently-snapshot', '@sharebin', '@tmp', '@__thumb', '#recycle',
    '#snapshot', '~snapshot', '$recycle.bin', 'recycler', 'system volume information',
    'network trash folder', 'temporary items', 'lost+found', '__macosx', '__pycache__',
))  # fmt: skip


def is_image(name: str) -> bool:
    """Whether a file's name ends like that of an image that can be read, in any case."""
    return name.lower().endswith(EXTENSIONS)


def is_other_picture(name: str) -> bool:
    """Whether a file's name ends like that of an image of a format that is not read."""
    return name.lower().endswith(OTHER_PICTURES)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name, without its path, is not meant to be seen."""
    return name.startswith('.') or name.lower() in HIDDEN


def some(names: Iterable[str], count: int, shown: int = 3) -> str:
    """The first names of `count`, in one line: "a, b, c and 12 more"."""
    first = [printable(name) for name, _ in zip(names, range(shown), strict=False)]
    more = f' and {count - len(first)} more' if count > len(first) else ''
    return ', '.join(first) + more


class Remarks:
    """What a listing has to say: how many names of each kind there are, and the first of them."""

    shown = 3

    def __init__(self):
        self.found: dict[str, tuple[int, list[str]]] = {}

    def add(self, kind: str, name: str) -> None:
        """Count a name; kinds are said in the order in which they first come up."""
        count, names = self.found.get(kind, (0, []))
        self.found[kind] = count + 1, [*names, name] if count < self.shown else names

    def count(self, kind: str) -> int:
        """How many names of a kind there are."""
        return self.found.get(kind, (0,))[0]

    def lines(self, root: str) -> Sequence[str]:
        """For each kind "ROOT: KIND (12: a, b, c and 9 more)"."""
        return [
            f'{printable(root)}: {kind} ({count:,}: {some(names, count, self.shown)})'
            for kind, (count, names) in self.found.items()
        ]
