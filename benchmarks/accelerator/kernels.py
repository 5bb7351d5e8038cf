"""Our kernels against float64, beside the plain version: results and gradients, on random numbers and awkward shapes.

Errors of an array are the root mean square and the largest of its differences, over the largest number of the exact
one. A kernel is right if the first is at most TOLERANCE and the second at most LARGEST: a rounding to bfloat16 may
cost 2e-3 of a large number, in the plain version, too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator import exact
from benchmarks.accelerator.parts import Cases, Row, Settings
from crate_jax.models import crate, gpu_attention, gpu_norm, layers, tpu_attention

TOLERANCE = 1e-3
LARGEST = 1e-2
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Attention:
    """A case of attention: MSSA has one part, ViTs three."""

    images: int
    tokens: int
    heads: int
    width: int  # of a head
    parts: int = 1
    biased: bool = False
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """The case's name."""
        kind = "MSSA" if self.parts == 1 else "ViT, bias" if self.biased else "ViT"
        return f"{kind}, {self.images} x {self.tokens} tokens, {self.heads} heads of {self.width}, {self.dtype}"

    def draw(self) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """Tokens (B, N, P * H * K), a bias (H, N, N) or None, and a gradient (B, N, H * K)."""
        rng, dtype, E = np.random.default_rng(self.tokens), jnp.dtype(self.dtype), self.heads * self.width
        x, g = (rng.normal(size=(self.images, self.tokens, n)).astype(dtype) for n in (self.parts * E, E))
        bias = rng.normal(size=(self.heads, self.tokens, self.tokens)).astype(np.float32) if self.biased else None
        return jnp.asarray(x), None if bias is None else jnp.asarray(bias), jnp.asarray(g)


@dataclasses.dataclass(frozen=True)
class Norm:
    """A case of layer normalisation."""

    images: int
    tokens: int
    width: int
    skip: bool
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """The case's name."""
        skip = " and skip" if self.skip else ""
        return f"norm{skip}, {self.images} x {self.tokens} tokens of {self.width}, {self.dtype}"


KINDS = ({"parts": 1}, {"parts": 3}, {"parts": 3, "biased": True})
FIRST = ((2, 197, 3, 64), (1, 5, 3, 32), (1, 577, 2, 80))  # images, tokens, heads, head width
MORE = ((1, 197, 4, 32), (2, 197, 3, 80), (3, 577, 2, 64), (1, 577, 4, 32), (1, 5, 2, 80), (3, 5, 2, 64))
TPU_FIRST = ((8, 197, 12, 64), (16, 5, 4, 32), (8, 577, 2, 64))  # blocks of 8 images, and of 128 lanes
TPU_MORE = ((24, 197, 4, 32), (16, 577, 4, 32), (8, 5, 2, 64))
DEBUG = ((1, 70, 1, 20),)


def cases(name: str, settings: Settings) -> Cases:
    """The cases of the parts parity and parity_more."""
    more, tpu = name == "parity_more", settings.platform == "tpu"
    if tpu:
        attention = [Attention(*shape, **kind) for shape in (TPU_MORE if more else TPU_FIRST) for kind in KINDS]
        norms = []
    elif settings.debug:
        attention = [] if more else [Attention(*shape, **kind) for shape in DEBUG for kind in KINDS]
        norms = [Norm(3, 7, 20, True)] if more else []
    else:
        attention = [Attention(*shape, **kind) for shape in (MORE if more else FIRST) for kind in KINDS]
        norms = [Norm(1, 5, 192, False, "float32"), Norm(2, 577, 1280, True)] if more else [Norm(3, 197, 768, True)]
    if not more and (tpu or settings.debug):  # GPUs have no kernel for attention in float32
        attention.append(dataclasses.replace(attention[0], dtype="float32"))
    interpret = settings.platform not in ("gpu", "tpu")
    ours = tpu_attention.attend if tpu else gpu_attention.attend
    return {c.name: functools.partial(compare_attention, c, ours, interpret) for c in attention} | {
        c.name: functools.partial(compare_norm, c, interpret) for c in norms
    }


def plain(x_BNF: jax.Array, bias_HNN: jax.Array | None, heads: int, parts: int) -> jax.Array:
    """What a model computes without kernels; outside a mesh it takes none."""
    if parts == 1:
        return crate.attend(x_BNF, heads)
    q, k, v = (a.reshape(*a.shape[:2], heads, -1) for a in jnp.split(x_BNF, 3, axis=-1))
    bias = None if bias_HNN is None else bias_HNN[None]
    return layers.attention(q, k, v, bias).reshape(*x_BNF.shape[:2], -1)


def with_gradients(attend: Callable[..., jax.Array], *static: Any) -> Callable[..., dict[str, jax.Array]]:
    """The jitted function from x, bias and g to the result and the gradients, named as in :mod:`exact`."""

    def run(x: jax.Array, bias: jax.Array | None, g: jax.Array) -> dict[str, jax.Array]:
        if bias is None:
            y, pull = jax.vjp(lambda x: attend(x, None, *static), x)
        else:
            y, pull = jax.vjp(lambda x, bias: attend(x, bias, *static), x, bias)
        return dict(zip(("y", "dx", "dbias"), (y, *pull(g)), strict=False))

    return jax.jit(run)


def compare_attention(case: Attention, ours: Callable[..., jax.Array], interpret: bool) -> Row:
    """The errors of a kernel of attention and of the plain version."""
    x, bias, g = case.draw()
    true = exact.attention(
        np.asarray(x), bias if bias is None else np.asarray(bias), np.asarray(g), case.heads, case.parts
    )
    kernel = with_gradients(ours, case.heads, case.parts, interpret)(x, bias, g)
    return judged(true, kernel, with_gradients(plain, case.heads, case.parts)(x, bias, g))


def compare_norm(case: Norm, interpret: bool) -> Row:
    """The errors of the norm's kernels and of the plain version."""
    rng, shape = np.random.default_rng(case.width), (case.images, case.tokens, case.width)
    x, g, skip = (jnp.asarray((at + rng.normal(size=shape)).astype(jnp.dtype(case.dtype))) for at in (3, 0, 0))
    skip = skip if case.skip else None
    scale, bias = (jnp.asarray(rng.normal(size=case.width).astype(np.float32)) for _ in range(2))
    arrays = [None if a is None else np.asarray(a) for a in (x, scale, bias, g, skip)]

    def kernels(
        x: jax.Array, scale: jax.Array, bias: jax.Array, g: jax.Array, skip: jax.Array | None
    ) -> list[jax.Array]:
        y = gpu_norm.forward(x, scale, bias, EPS, interpret)
        return [y, *gpu_norm.backward(x, scale, (g,), skip, EPS, interpret)]

    def by_xla(
        x: jax.Array, scale: jax.Array, bias: jax.Array, g: jax.Array, skip: jax.Array | None
    ) -> list[jax.Array]:
        y, saved = layers.layer_norm_forward(x, scale, bias, EPS)
        return [y, *layers.layer_norm_backward(EPS, saved, g, skip_BND=skip)]

    names = ("y", "dx", "dscale", "dbias")
    found = (dict(zip(names, jax.jit(run)(x, scale, bias, g, skip), strict=True)) for run in (kernels, by_xla))
    return judged(exact.norm(*arrays, EPS), *found)


def judged(true: dict[str, np.ndarray], kernel: dict[str, jax.Array], plain: dict[str, jax.Array]) -> Row:
    """The errors of both, and whether the kernel is right; NaN is not."""

    def errors(found: dict[str, jax.Array], norm: Callable[[np.ndarray], Any]) -> dict[str, float]:
        return {
            name: float(norm(np.asarray(found[name], np.float64) - a) / np.abs(a).max()) for name, a in true.items()
        }

    largest, spread = (lambda d: np.abs(d).max()), (lambda d: np.sqrt(np.mean(np.square(d))))
    ours, means = errors(kernel, largest), errors(kernel, spread)
    return {
        "errors": ours,
        "rms_errors": means,
        "plain_errors": errors(plain, largest),
        "plain_rms_errors": errors(plain, spread),
        "ok": all(means[n] <= TOLERANCE and ours[n] <= LARGEST for n in true),
    }
