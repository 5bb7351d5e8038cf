"""The two ceilings of a device, measured: FLOP/s of matrix products and bytes per second of its memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.accelerator.clock import timed
from benchmarks.accelerator.parts import Cases, Row, Settings


def cases(name: str, settings: Settings) -> Cases:
    """Both ceilings."""
    sides, megabytes = ((128, 256), 4) if settings.debug else ((4096, 8192, 16384), 1024)
    return {"matmul": functools.partial(matmul, sides), "bandwidth": functools.partial(bandwidth, megabytes)}


def matmul(sides: tuple[int, ...]) -> Row:
    """Square products of random bfloat16 numbers on one device; "flops" is the best side's, per second."""
    product = jax.jit(jnp.matmul)
    by_side = {}
    for side in sides:
        a, b = (jax.random.normal(jax.random.key(k), (side, side), jnp.bfloat16) for k in range(2))
        times = timed(functools.partial(product, a, b))
        by_side[str(side)] = {"flops": 2 * side**3 / times["ms"] * 1e3, **times}
    return {"flops": max(row["flops"] for row in by_side.values()), "by_side": by_side}


def bandwidth(megabytes: int) -> Row:
    """Passes over arrays of `megabytes` MiB, far above the caches; "bytes_per_s" read and written, of the best one."""
    count = megabytes * 2**18
    x, y = (jax.random.normal(jax.random.key(k), (count,), jnp.float32) for k in range(2))
    passes = {
        "read": (functools.partial(jax.jit(jnp.sum), y), 1),
        "read and write": (in_place(lambda x: x + 1.0, x), 2),
        "read two and write": (in_place(lambda x, y: x + 0.01 * y, jnp.copy(y), y), 3),
    }
    found = {}
    for name, (run, moved) in passes.items():
        times = timed(run)
        found[name] = {"bytes_per_s": 4 * count * moved / times["ms"] * 1e3, **times}
    return {"bytes_per_s": max(row["bytes_per_s"] for row in found.values()), "passes": found}


def in_place(step: Callable[..., jax.Array], x: jax.Array, *others: jax.Array) -> Callable[[], jax.Array]:
    """The function that applies a step to x again and again, in x's memory, and returns x's first number."""

    def whole(x: jax.Array, *others: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = step(x, *others)
        return new, new[0]

    run, held = jax.jit(whole, donate_argnums=0), [x]

    def call() -> jax.Array:
        held[0], first = run(held[0], *others)
        return first

    return call
