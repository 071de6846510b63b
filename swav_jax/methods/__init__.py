"""What is learned: a method a file, behind the interface of `method.Method`."""

from typing import Any

from swav_jax.methods.method import Method
from swav_jax.methods.swav import SwAV

METHODS = {'swav': SwAV}


def make(config: Any) -> Method:
    """The method of a run. There is one so far; with the next comes a setting that chooses."""
    return METHODS['swav'](config)
