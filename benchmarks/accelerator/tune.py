"""How the kernels are best cut: each kernel of attention with other tiles, the others as `tiles_for` cuts them; norms.

Kernels run one after the other, so the best tiles of each are the best for all.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator.clock import timed
from benchmarks.accelerator.kernels import Attention, with_gradients
from benchmarks.accelerator.parts import Cases, Row, Settings
from benchmarks.accelerator.table import DIFFERS
from crate_jax.flags import one_line
from crate_jax.models import gpu_attention, gpu_norm
from crate_jax.models.gpu_attention import Tile, Tiles
from crate_jax.models.gpu_norm import Cut

KERNELS = ("forward", "first", "second", "bias")  # the fields of Tiles
TILES = (
    Tile(32, 32, 2, 3), Tile(32, 32, 4, 3), Tile(32, 64, 4, 3), Tile(64, 16, 4, 3), Tile(64, 32, 4, 2),
    Tile(64, 32, 4, 3), Tile(64, 32, 4, 4), Tile(64, 32, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3),
    Tile(128, 32, 4, 2), Tile(128, 32, 4, 3), Tile(128, 32, 8, 3), Tile(128, 64, 8, 3),
)  # fmt: skip
SUMS = (2, 4, 16)
CUTS = (
    Cut(1, 1, 2112), Cut(1, 2, 1056), Cut(1, 2, 1584), Cut(1, 4, 792), Cut(1, 4, 1056), Cut(2, 2, 1056), Cut(2, 4, 528),
    Cut(2, 4, 1056), Cut(4, 4, 528), Cut(4, 4, 792), Cut(4, 4, 1056), Cut(4, 8, 528),
)  # fmt: skip
COMPILERS = 16  # programs compiled at the same time


def cases(name: str, settings: Settings) -> Cases:
    """The kernels of each shape, the most useful shapes first; there are no such kernels for TPUs."""
    if settings.platform == "tpu":
        return {}
    B = settings.batch
    shapes = {
        "ROPIM ViT-B, bias": Attention(B, 197, 12, 64, 3, True),
        "MSSA, CRATE-B": Attention(B, 197, 12, 64),
        "ViT-MAE-B, decoder": Attention(B, 197, 16, 32, 3),
        "ViT-MAE-B, encoder": Attention(B, 50, 12, 64, 3),
    }
    tiles, sums = TILES, SUMS
    if settings.debug:
        shapes, tiles, sums = {"ViT, bias": Attention(2, 5, 1, 16, 3, True)}, TILES[:1], (1,)
    size, cuts = ((B, 197, 768), CUTS) if not settings.debug else ((2, 7, 20), CUTS[:1])
    norms: Cases = {f"norm of {size[-1]}: backward": functools.partial(measure_norm, size, cuts, settings.platform)}
    return {
        f"{what}: {kernel}": functools.partial(measure, shape, kernel, tiles, sums, settings.platform)
        for what, shape in shapes.items()
        for kernel in KERNELS
        if shape.biased or kernel != "bias"
        if kernel == "bias" or not settings.debug
    } | norms


def choices(default: Tiles, kernel: str, tiles: Sequence[Tile], sums: Sequence[int]) -> list[Tiles]:
    """The default, then tiles that differ from the default in one kernel."""
    found = [default, *(dataclasses.replace(default, **{kernel: tile}) for tile in tiles)]
    if kernel == "bias":
        found += [dataclasses.replace(default, sums=n) for n in sums]
    return list(dict.fromkeys(found))


def measure(case: Attention, kernel: str, tiles: Sequence[Tile], sums: Sequence[int], platform: str) -> Row:
    """Times the forward pass, or for kernels of the backward pass both, with each choice."""
    x, bias, g = case.draw()
    interpret = platform not in ("gpu", "tpu")

    def program(tiles: Tiles) -> Callable[[], dict[str, jax.Array]]:
        if kernel != "forward":
            whole = with_gradients(gpu_attention.attend, case.heads, case.parts, interpret, tiles)
            return functools.partial(whole, x, bias, g)
        forward = jax.jit(lambda x, b: {"y": gpu_attention.attend(x, b, case.heads, case.parts, interpret, tiles)})
        return functools.partial(forward, x, bias)

    default = gpu_attention.tiles_for(case.width, case.parts)
    tried = trials({describe(t, kernel): program(t) for t in choices(default, kernel, tiles, sums)})
    return {"shape": dataclasses.asdict(case), "kernel": kernel, "default": describe(default, kernel), **tried}


def measure_norm(shape: tuple[int, int, int], cuts: Sequence[Cut], platform: str) -> Row:
    """Times the backward pass of the norm with a skip connection."""
    x, g, skip = (jax.random.normal(jax.random.key(k), shape, jnp.bfloat16) for k in range(3))
    scale = jax.random.normal(jax.random.key(3), shape[-1:], jnp.float32)

    def program(cut: Cut) -> Callable[[], dict[str, jax.Array]]:
        def run(x: jax.Array, scale: jax.Array, g: jax.Array, skip: jax.Array) -> dict[str, jax.Array]:
            found = gpu_norm.backward(x, scale, (g,), skip, 1e-6, platform != "gpu", cut)
            return dict(zip(("dx", "dscale", "dbias"), found, strict=True))

        return functools.partial(jax.jit(run), x, scale, g, skip)

    default = gpu_norm.cut_for(shape[-1])
    programs = {str(cut): program(cut) for cut in dict.fromkeys([default, *cuts])}
    return {"shape": list(shape), "kernel": "norm", "default": str(default), **trials(programs)}


def describe(tiles: Tiles, kernel: str) -> str:
    """What is varied, as a line of a table.

    >>> describe(gpu_attention.tiles_for(64, 1), "second")
    '128 x 32, 4 warps, 2 stages'
    """
    tile = getattr(tiles, kernel)
    sums = f", {tiles.sums} sums" if kernel == "bias" else ""
    return f"{tile.rows} x {tile.columns}, {tile.warps} warps, {tile.stages} stages{sums}"


def trials(programs: dict[str, Callable[[], dict[str, jax.Array]]]) -> Row:
    """Times programs that must have the results of the first; one that fails costs only itself.

    Returns:
      "tried": for each program its "ms" and by how much it "differs_by", or why it is "refused"; and the "best".
    """
    tried: dict[str, Row] = {}
    expected: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:  # the first call compiles, which is most of the time
        first = {name: pool.submit(program) for name, program in programs.items()}
    for name, program in programs.items():
        try:
            found = jax.block_until_ready(first[name].result())
            expected = expected or found
            apart = max(map(_apart, found.values(), expected.values()))
            tried[name] = {"ms": timed(program, seconds=0.02, windows=5)["ms"], "differs_by": apart}
        except Exception as e:
            tried[name] = {"refused": f"{type(e).__name__}: {one_line(e)}"[:200]}
    right = {name: row["ms"] for name, row in tried.items() if row.get("differs_by", 2 * DIFFERS) <= DIFFERS}
    if not right:
        raise RuntimeError(f"no tile runs: {next(iter(tried.values()))['refused']}")
    return {"tried": tried, "best": min(right, key=lambda name: right[name])}


def _apart(a: jax.Array, b: jax.Array) -> float:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())
