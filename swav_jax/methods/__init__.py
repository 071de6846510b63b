"""Methods: what is learned, one per file, behind the interface `method.Method`."""

from typing import Any

from swav_jax.methods.method import Method
from swav_jax.methods.swav import SwAV

METHODS = {'swav': SwAV}


def make(config: Any) -> Method:
    """Return the method of a run: SwAV, the only one so far."""
    return METHODS['swav'](config)
