"""Checksums of arrays, computed on the devices that hold the arrays.

Orbax and TensorStore do not notice a flipped byte in array data, so checkpoints hold these checksums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksums(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Returns 16 hexadecimal digits per array.

    A bijection mixes each 32-bit word with its position, and the results are summed modulo 2**32. So a change of one
    word always changes the first sum, and any other change (also swapped or shifted blocks) goes unnoticed with a
    probability of about 2**-64. The order of integer sums does not matter: the checksum depends neither on sharding nor
    on the number and kind of devices, and each device reads only its own part; two words per array are sent to the
    host. The checksum does not cover shapes and dtypes. It protects against accidents, not against forgery.

    Args:
      arrays: arrays of numbers, booleans or typed keys, of any shape, by name; one program is compiled per set of
        shapes.

    >>> sums = checksums({"a": jnp.array([1, 2]), "b": jnp.array([2, 1]), "c": jnp.array([[1, 2]])})
    >>> sums["a"] == sums["b"], sums["a"] == sums["c"]
    (False, True)
    """
    if not arrays:
        return {}
    sums = np.asarray(_sums(list(arrays.values()))).tolist()
    return {name: f"{a:08x}{b:08x}" for name, (a, b) in zip(arrays, sums, strict=True)}


@jax.jit
def _sums(arrays: list[jax.Array]) -> jax.Array:
    """Returns two sums per array, uint32 (len(arrays), 2)."""
    out = []
    for x in arrays:
        words = _words(x)
        # The index is a sum of one iota per axis: to reshape to one axis would gather a sharded array.
        index = jnp.zeros(words.shape, jnp.uint32)
        stride = 1
        for axis in reversed(range(words.ndim)):
            index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
            stride *= words.shape[axis]
        position = _mix(index + np.uint32(0x9E3779B9))
        mixed = _mix(words ^ position)
        out.append(jnp.stack([jnp.sum(s, dtype=jnp.uint32) for s in (mixed, mixed * (position | 1))]))
    return jnp.stack(out)


def _words(x: jax.Array) -> jax.Array:
    """Returns the bits of `x` as uint32: one word per element, or several on a last axis if elements are wider."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = 8 * x.dtype.itemsize
    if bits > 32:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Applies a bijection on uint32: each input bit changes about half of the output bits (MurmurHash3's finaliser)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
