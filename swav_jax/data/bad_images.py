"""Unreadable images: a list of them beside the run, and a limit above which the run stops."""

import contextlib
import secrets
from pathlib import Path

import numpy as np

from swav_jax import files
from swav_jax.data.images import Source
from swav_jax.data.listing import some
from swav_jax.errors import UserError, printable


class BadImages:
    """Collects the images that came with weight 0, each once.

    Args:
      source: the images.
      path: the list, one name a line, created with the first bad image. Lines from an earlier run
        stay, and are not repeated.
      max_bad_fraction: `config.data.max_bad_fraction`, of all images of the source.
      writes: whether to write the list: all processes collect, one of them writes.
    """

    def __init__(
        self, source: Source, path: str | Path, max_bad_fraction: float, *, writes: bool = True
    ):
        self.source = source
        self.path = Path(path)
        self.max_bad_fraction = max_bad_fraction
        self.writes = writes
        self.names: dict[int, str] = {}  # of the bad images of this run

    def update(self, index: np.ndarray, weight: np.ndarray) -> list[str]:
        """Add the bad images of a batch with these `index` and `weight`, both (B,).

        Returns:
          The names of those that are new.

        Raises:
          UserError: more than the allowed fraction of the images is bad.
        """
        bad = {int(i) for i in index[(weight == 0) & (index >= 0)]}
        new = {i: printable(self.source.name(i)) for i in sorted(bad - self.names.keys())}
        if not new:
            return []
        self.names |= new
        if self.writes:
            self._write()
        count, whole = len(self.names), len(self.source)
        if count > self.max_bad_fraction * whole:
            raise UserError(
                f'{count} of {whole} images cannot be read, more than config.data.max_bad_fraction='
                f'{self.max_bad_fraction} allows: {some(self.names.values(), count, shown=5)}; '
                f'fix or remove the images listed in {self.path}'
            )
        return list(new.values())

    def _write(self) -> None:
        before: list[str] = []
        if self.path.is_dir():  # whatever was done to the list, it stops no run
            self.path.replace(self.path.with_name(f'{self.path.name}.{secrets.token_hex(4)}'))
        with contextlib.suppress(OSError):
            before = self.path.read_text('utf-8', 'backslashreplace').splitlines()
        lines = dict.fromkeys([*map(printable, before), *self.names.values()])  # in their order
        with files.replacing(self.path) as temporary:
            temporary.write_text(''.join(f'{line}\n' for line in lines), 'utf-8')
