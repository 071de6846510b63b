"""Runs that learn nothing: recognised, and what the authors advise."""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from swav_jax.errors import RunFailedError

NEAR_LN_K = 0.01  # share of ln K by which the loss may differ from it
NEAR_CONSTANT = 0.01  # share of 1/√D, the standard deviation of embeddings that spread


class Collapse:
    """Looks at the rows of metrics.jsonl as they are made.

    A loss of ln K says that all images look alike to the prototypes; a standard deviation of 0 that
    all embeddings are equal. Both are usual while the prototypes are frozen, and for a while after.
    """

    def __init__(self, config: ConfigDict):
        self._config = config
        self._frozen = max((n for _, n in config.model.temp_frozen_params_iter_map), default=0)
        self._least_std = NEAR_CONSTANT / math.sqrt(config.model.head.dims[-1])
        self._since: int | None = None
        self._said = False

    def look(self, row: Mapping[str, Any] | None) -> str | None:
        """A row, or None; returns a warning once it has looked collapsed for long.

        Raises:
          RunFailedError: it has, and `config.train.on_collapse` is 'stop'.
        """
        if row is None:
            return None
        sign = self._sign(row) if row['step'] > self._frozen else None
        if sign is None:
            self._since, self._said = None, False
            return None
        self._since = row['step'] if self._since is None else self._since
        if self._said or row['step'] - self._since < self._config.train.collapse_patience:
            return None
        self._said = True
        text = (
            f'collapsed: {sign} from step {self._since} to {row["step"]}. Lower '
            f'config.loss.epsilon={self._config.loss.epsilon} (as 0.03), freeze the prototypes for '
            'longer (config.model.temp_frozen_params_iter_map), lower the learning rate '
            '(config.optimizer.param_schedulers.lr)'
        )
        if self._config.train.on_collapse == 'stop':
            raise RunFailedError(text)
        return text

    def _sign(self, row: Mapping[str, Any]) -> str | None:
        if abs(row['loss_over_ln_k'] - 1) < NEAR_LN_K:
            return 'the loss stayed within 1% of ln K'
        if row['embedding_std'] < self._least_std:
            return 'all embeddings stayed the same'
        return None
