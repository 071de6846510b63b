"""The description of a checkpoint: its arrays and its run, with a checksum."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from swav_jax.runs import digest


def describe(step: int, state: Any, metadata: dict) -> dict[str, Any]:
    """The description of a state's arrays, by their paths, with the run's own metadata."""
    digests = digest.digests(state)
    arrays = {
        name: {'dtype': x.dtype.name, 'shape': list(x.shape), 'digest': digests[name]}
        for name, x in digest.named(state).items()
    }
    content = {'step': step, 'arrays': arrays, 'metadata': metadata}
    return content | {'sha256': _sha256(content)}


def check(content: Any, step: int) -> dict[str, Any]:
    """The description of the checkpoint of `step`, as it was read from disk.

    Raises:
      ValueError, AttributeError: it is not what was written.
    """
    sealed = content.pop('sha256', None) == _sha256(content)
    if not sealed or not _is_well_formed(content):
        raise ValueError('its metadata is not what was written')
    if content.get('step', step) != step:
        raise ValueError(f'it is that of step {content["step"]}')
    return content


def shapes(tree: Any) -> dict[str, str]:
    """Each array of a pytree by its path, as 'float32[2, 3]'."""
    return {name: f'{x.dtype.name}{list(x.shape)}' for name, x in digest.named(tree).items()}


def described_shapes(content: dict[str, Any]) -> dict[str, str]:
    """The same of the arrays in a description."""
    return {name: f'{x["dtype"]}{x["shape"]}' for name, x in content['arrays'].items()}


def nested(arrays: dict[str, dict], sharding: jax.sharding.Sharding) -> dict[str, Any]:
    """Described arrays as nested dicts of `jax.ShapeDtypeStruct`, which a reader can ask for."""
    found = {
        name: jax.ShapeDtypeStruct(x['shape'], jnp.dtype(x['dtype']), sharding=sharding)
        for name, x in arrays.items()
    }
    return unflatten_dict(found, sep='/')


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_well_formed(content: dict) -> bool:
    arrays, metadata = content.get('arrays'), content.get('metadata')
    return (
        isinstance(metadata, dict)
        and isinstance(arrays, dict)
        and all(
            isinstance(array, dict)
            and isinstance(array.get('dtype'), str)
            and isinstance(array.get('digest'), str)
            and isinstance(array.get('shape'), list)
            and all(type(length) is int and 0 <= length < 2**40 for length in array['shape'])
            for array in arrays.values()
        )
    )
