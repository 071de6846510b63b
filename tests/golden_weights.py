"""Weights of the golden data, by the rule in golden/README.md."""

import zlib
from collections.abc import Mapping

import numpy as np


def state_dict(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Float64 values for PyTorch state-dict entries of the given names and shapes."""
    return {name: _value(name, tuple(shape), seed) for name, shape in shapes.items()}


def _value(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith('num_batches_tracked'):
        return np.zeros(shape, np.int64)
    if name.endswith('running_var'):
        return 1 + 0.2 * rng.random(shape)
    if name.endswith(('running_mean', 'bias')):
        return 0.1 * rng.standard_normal(shape)
    if len(shape) == 1:
        return 1 + 0.1 * rng.standard_normal(shape)
    return rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
