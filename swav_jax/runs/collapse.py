"""Runs that learn nothing: counting how long a method's sign of collapse lasts."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from swav_jax import methods
from swav_jax.errors import RunFailedError


class Collapse:
    """Watches the rows of metrics.jsonl for the method's signs of collapse.

    They are usual while the prototypes are frozen, and for a while after.
    """

    def __init__(self, config: ConfigDict):
        self._config = config
        self._frozen = max((n for _, n in config.model.temp_frozen_params_iter_map), default=0)
        self._method = methods.make(config)
        self._since: int | None = None
        self._said = False

    def look(self, row: Mapping[str, Any] | None) -> str | None:
        """Read a row, or None; return a warning, once, when `collapse_patience` steps show a sign.

        Raises:
          RunFailedError: instead of the warning, if `config.train.on_collapse` is 'stop'.
        """
        if row is None:
            return None
        sign = self._method.sign_of_collapse(row) if row['step'] > self._frozen else None
        if sign is None:
            self._since, self._said = None, False
            return None
        self._since = row['step'] if self._since is None else self._since
        if self._said or row['step'] - self._since < self._config.train.collapse_patience:
            return None
        self._said = True
        seen, heading = sign
        text = (
            f'collapsed: {seen} from step {self._since} to {row["step"]}. {self._method.remedy}; '
            f'see "{heading}" in docs/learning.md'
        )
        if self._config.train.on_collapse == 'stop':
            raise RunFailedError(text)
        return text
