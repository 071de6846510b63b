"""Digests of arrays, computed where the arrays are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
    return jnp.stack([jnp.sum(words * _odd_factor(place, seed)) for seed in (1, 2)])


def _odd_factor(place: jax.Array, seed: int) -> jax.Array:
    """Uint32 hash of a place: multiply, shift, xor, as in integer finalisers."""
    h = place * jnp.uint32(0x9E3779B1) + jnp.uint32(seed * 0x7F4A7C15 % 2**32)
    h = (h ^ (h >> 15)) * jnp.uint32(0x85EBCA77)
    return (h ^ (h >> 13)) | jnp.uint32(1)
