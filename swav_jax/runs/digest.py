"""Digests of arrays, computed where the arrays are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_AT_ONCE = 2**22  # words of an array in the host's memory, against temporary copies


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their paths, as `params/head/kernel`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def digests(tree: Any) -> dict[str, str]:
    """The `digest` of each array, as 16 hexadecimal digits, by its path."""
    sums = jax.device_get({name: digest(leaf) for name, leaf in named(tree).items()})
    return {name: ''.join(f'{int(word):08x}' for word in pair) for name, pair in sums.items()}


def of_numpy(x: np.ndarray) -> str:
    """The `digest` of an array in the host's memory, as 16 hexadecimal digits."""
    x = np.ascontiguousarray(x)
    x = x.view(np.uint8) if x.dtype == np.bool_ else x
    words = x.reshape(-1).view(f'u{min(x.dtype.itemsize, 4)}')
    sums = [np.uint32(0), np.uint32(0)]
    for start in range(0, len(words), _AT_ONCE):
        part = words[start : start + _AT_ONCE].astype(np.uint32)
        place = np.arange(start, start + len(part)).astype(np.uint32)
        for i, seed in enumerate((1, 2)):
            sums[i] += np.sum(part * _odd_factor(place, seed), dtype=np.uint32)
    return ''.join(f'{int(word):08x}' for word in sums)


@jax.jit
def digest(x: jax.Array) -> jax.Array:
    """Two sums (2,) uint32 over the bits of an array, each word times an odd factor of its place.

    Integer sums wrap around and come out the same in any order, so on any number of devices. A
    change of a single word always changes them (an odd factor has an inverse modulo 2^32); any
    other damage goes unseen once in 2^64.
    """
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    bits = jax.lax.bitcast_convert_type(x, f'uint{8 * min(x.dtype.itemsize, 4)}')
    words = bits.astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, length in enumerate(words.shape):
        place = place * np.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    odd = [_odd_factor(place, seed) for seed in (1, 2)]
    return jnp.stack([jnp.sum(words * factor, dtype=jnp.uint32) for factor in odd])


def _odd_factor(place: Any, seed: int) -> Any:
    """Uint32 hash of a place: multiply, shift, xor, as in integer finalisers."""
    h = place * np.uint32(0x9E3779B1) + np.uint32(seed * 0x7F4A7C15 % 2**32)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x85EBCA77)
    return (h ^ (h >> np.uint32(13))) | np.uint32(1)
