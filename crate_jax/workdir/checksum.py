"""Checksums of arrays, computed where the arrays are.

Orbax and TensorStore do not notice a flipped byte in array data, so checkpoints carry these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksums(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Returns 16 hexadecimal digits per array.

    Each 32-bit word is mixed with its position by a bijection before it is summed modulo 2**32. So any change of one
    word changes the first sum for certain, and any other change, swapped or shifted blocks included, goes unseen with
    a probability of about 2**-64. Integer sums have no order: neither sharding, nor the number of devices, nor their
    kind matters, and each device reads only what it holds; two words per array reach the host. Shapes and dtypes are
    not part of it. A guard against accidents, not against forgery.

    Args:
      arrays: arrays of numbers, booleans or typed keys, of any shape; one program is compiled per set of shapes.
    """
    if not arrays:
        return {}
    sums = np.asarray(_sums(list(arrays.values()))).tolist()
    return {name: f"{a:08x}{b:08x}" for name, (a, b) in zip(arrays, sums, strict=True)}


@jax.jit
def _sums(arrays: list[jax.Array]) -> jax.Array:
    """Two sums per array, [len(arrays), 2] uint32."""
    out = []
    for x in arrays:
        words = _words(x)
        # Summed from one iota per axis: reshaping to one axis would gather a sharded array.
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
    """The bits of `x` as uint32: one word per element, or several on a last axis where elements are wider."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = 8 * x.dtype.itemsize
    if bits > 32:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection on uint32 in which each input bit moves about half of the output bits (MurmurHash3's finaliser)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
