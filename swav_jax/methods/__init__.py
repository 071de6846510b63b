"""Methods: what is learned, one per file, behind the interface `method.Method`."""

from typing import Any

from swav_jax.methods.deepcluster_v2 import DeepClusterV2
from swav_jax.methods.method import Method
from swav_jax.methods.swav import SwAV
from swav_jax.methods.swav_momentum import SwAVMomentum

METHODS = {'swav': SwAV, 'swav_momentum': SwAVMomentum, 'deepcluster_v2': DeepClusterV2}


def make(config: Any) -> Method:
    """Return the method of a run, `config.method`; runs of earlier versions have SwAV."""
    return METHODS[config.get('method', 'swav')](config)
