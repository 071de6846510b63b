"""Which images could not be read: a list beside the run, and a limit above which it stops."""

import contextlib
import secrets
from pathlib import Path

import numpy as np

from swav_jax import atomic
from swav_jax.data.images import Source
from swav_jax.errors import UserError
from swav_jax.terminal import printable


class BadImages:
    """Collects the images that came with weight 0, each once.

    Args:
      source: the images.
      path: the list, one name a line, begun with the first bad image. What it holds from an
        earlier run stays and is not written again.
      max_bad_fraction: `config.data.max_bad_fraction`, of all images of the source.
      writes: whether to keep the list; of several processes, all of which know it, one does.
    """

    shown = 5  # names in the message that ends a run

    def __init__(
        self, source: Source, path: str | Path, max_bad_fraction: float, *, writes: bool = True
    ):
        self.source = source
        self.path = Path(path)
        self.max_bad_fraction = max_bad_fraction
        self.writes = writes
        self.names: dict[int, str] = {}  # of the bad images that this run has met

    def update(self, index: np.ndarray, weight: np.ndarray) -> list[str]:
        """Looks at a batch's `index` and `weight`, both (B,).

        Returns:
          The names of the bad images that were not met before.

        Raises:
          UserError: more than the allowed share of the images is bad.
        """
        new = {int(i) for i in index[(weight == 0) & (index >= 0)]} - self.names.keys()
        if not new:
            return []
        self.names |= {i: printable(self.source.name(i)) for i in sorted(new)}
        if self.writes:
            self._write()
        bad, whole = len(self.names), len(self.source)
        if bad > self.max_bad_fraction * whole:
            first = ', '.join(list(self.names.values())[: self.shown])
            more = f' and {bad - self.shown} more' if bad > self.shown else ''
            raise UserError(
                f'{bad} of {whole} images cannot be read, more than config.data.max_bad_fraction='
                f'{self.max_bad_fraction} allows: {first}{more}; mend or remove those that '
                f'{self.path} lists'
            )
        return [self.names[i] for i in sorted(new)]

    def _write(self) -> None:
        before: list[str] = []
        if self.path.is_dir():  # whatever was done to the list, it ends no run
            self.path.replace(self.path.with_name(f'{self.path.name}.{secrets.token_hex(4)}'))
        with contextlib.suppress(OSError):
            before = self.path.read_text('utf-8', 'backslashreplace').splitlines()
        lines = dict.fromkeys([*map(printable, before), *self.names.values()])  # keeps their order
        with atomic.replacing(self.path) as temporary:
            temporary.write_text(''.join(f'{line}\n' for line in lines), 'utf-8')
