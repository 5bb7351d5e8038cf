"""The time of our kernels at the models' shapes, beside XLA's plain attention, cuDNN's and JAX's Triton kernel.

cuDNN refuses an odd number of tokens, JAX's kernel one that is not of whole tiles; then they get padded tokens, and the
number of true ones, as a mask. The padding itself is not in their times.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator.clock import timed
from benchmarks.accelerator.kernels import Attention, plain, with_gradients
from benchmarks.accelerator.parts import Cases, Row, Settings
from crate_jax.flags import one_line
from crate_jax.models import gpu_attention, gpu_norm, layers, tpu_attention

EPS = 1e-6
TILE = 128  # tokens of a tile of JAX's kernel


def cases(name: str, settings: Settings) -> Cases:
    """CRATE-B's and ViT-B's attention on all tokens, and ViT-MAE's decoder."""
    if settings.debug:
        shapes = {"MSSA": Attention(2, 70, 1, 16), "ViT, bias": Attention(2, 5, 1, 16, 3, True)}
    else:
        B = settings.batch
        shapes = {
            "MSSA, CRATE-B": Attention(B, 197, 12, 64),
            "ROPIM ViT-B, bias": Attention(B, 197, 12, 64, 3, True),
            "ViT-B": Attention(B, 197, 12, 64, 3),
            "ViT-MAE-B, encoder": Attention(B, 50, 12, 64, 3),
            "ViT-MAE-B, decoder": Attention(B, 197, 16, 32, 3),
            "ViT-B, 384 px": Attention(max(1, B // 4), 577, 12, 64, 3),
            "ViT-B, 512 px": Attention(max(1, B // 8), 1025, 12, 64, 3),
        }
    found: Cases = {what: functools.partial(attention, shape, settings.platform) for what, shape in shapes.items()}
    if settings.platform != "tpu":
        size = (2, 7, 20) if settings.debug else (settings.batch, 197, 768)
        found["norm and skip"] = functools.partial(norm, size, settings.platform)
    return found


def both(
    attend: Callable[..., jax.Array],
    case: Attention,
    arrays: tuple[jax.Array | None, ...],
    expected: jax.Array,
    *static: bool,
) -> Row:
    """Times of the result alone, and with all gradients, in ms, and how far the result is from what is expected.

    Args:
      attend: from x, the bias, heads and parts, and `static`, to the result.
      case: the sizes.
      arrays: x, the bias and the result's gradient; they may have more tokens than the case.
      expected: the result of the plain version.
      *static: more arguments.
    """
    x, bias, g = arrays
    forward = jax.jit(lambda x, bias: attend(x, bias, case.heads, case.parts, *static))
    whole = with_gradients(attend, case.heads, case.parts, *static)
    y, expected = (a[:, : case.tokens].astype(jnp.float32) for a in (forward(x, bias), expected))
    return {
        "forward_ms": timed(functools.partial(forward, x, bias))["ms"],
        "with_gradients_ms": timed(functools.partial(whole, x, bias, g))["ms"],
        "differs_by": float(jnp.abs(y - expected).max() / jnp.abs(expected).max()),
    }


def if_it_runs(*args: Any) -> Row:
    """The times of another library's version, or why it refuses the shape."""
    try:
        return both(*args)
    except Exception as e:
        return {"refused": f"{type(e).__name__}: {one_line(e)}"[:200]}


def attention(case: Attention, platform: str) -> Row:
    """All versions of one case; `flops` are the mathematics' own: 2 products forward, 4 for gradients."""
    arrays = case.draw()
    interpret = platform not in ("gpu", "tpu")
    expected = jax.jit(lambda x, bias: plain(x, bias, case.heads, case.parts))(*arrays[:2])
    kernel = tpu_attention.attend if platform == "tpu" else gpu_attention.attend
    product = 2 * case.images * case.heads * case.tokens**2 * case.width
    row = {
        "shape": dataclasses.asdict(case),
        "forward_flops": 2 * product,
        "with_gradients_flops": 6 * product,
        "ours": both(kernel, case, arrays, expected, interpret),
        "xla": both(plain, case, arrays, expected),
    }
    if platform == "gpu":
        row["cudnn"] = if_it_runs(cudnn, case, arrays, expected)
        if "refused" in row["cudnn"]:
            more = padded(arrays, -case.tokens % 8)
            row["cudnn_padded"] = if_it_runs(functools.partial(cudnn, tokens=case.tokens), case, more, expected)
        more = padded(arrays, -case.tokens % TILE)
        row["triton_padded"] = if_it_runs(functools.partial(triton, tokens=case.tokens), case, more, expected)
    return row


def padded(arrays: tuple[jax.Array | None, ...], number: int) -> tuple[jax.Array | None, ...]:
    """X, the bias and the result's gradient with a `number` of zero tokens more."""
    x, bias, g = (None if a is None else jnp.pad(a, ((0, 0), (0, number), (0, 0))) for a in arrays)
    return x, None if bias is None else jnp.pad(bias, ((0, 0), (0, 0), (0, number))), g


def heads_of(x_BNF: jax.Array, heads: int, parts: int) -> list[jax.Array]:
    """Queries, keys and values, (B, N, H, K) each."""
    split = [a.reshape(*a.shape[:2], heads, -1) for a in jnp.split(x_BNF, parts, axis=-1)]
    return [split[min(role, parts - 1)] for role in range(3)]


def triton(
    x_BNF: jax.Array, bias_HNN: jax.Array | None, heads: int, parts: int, tokens: int, interpret: bool = False
) -> jax.Array:
    """JAX's own Triton kernel in its default tiles; only the first `tokens` count.

    Raises:
      ValueError: there is a bias.
    """
    from jax.experimental.pallas.ops.gpu.attention import mha

    if bias_HNN is not None:
        raise ValueError("it takes no bias")
    B, N = x_BNF.shape[:2]
    ids_BN = jnp.broadcast_to(jnp.arange(N) >= tokens, (B, N)).astype(jnp.int32)
    q, k, v = heads_of(x_BNF, heads, parts)
    return mha(q, k, v, ids_BN, sm_scale=q.shape[-1] ** -0.5, interpret=interpret).reshape(B, N, -1)


def cudnn(x_BNF: jax.Array, bias_HNN: jax.Array | None, heads: int, parts: int, tokens: int | None = None) -> jax.Array:
    """Fused attention of cuDNN; only the first `tokens` count."""
    q, k, v = heads_of(x_BNF, heads, parts)
    lengths = None if tokens is None else jnp.full(len(x_BNF), tokens, jnp.int32)
    bias = None if bias_HNN is None else bias_HNN[None].astype(x_BNF.dtype)
    y = jax.nn.dot_product_attention(
        q, k, v, bias, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return y.reshape(*x_BNF.shape[:2], -1)


def norm(shape: tuple[int, int, int], platform: str) -> Row:
    """The norm's forward and backward kernels, one after the other, beside XLA; "bytes" are the fewest that move."""
    x, g, skip = (jax.random.normal(jax.random.key(k), shape, jnp.bfloat16) for k in range(3))
    scale, bias = (jax.random.normal(jax.random.key(k), shape[-1:], jnp.float32) for k in (3, 4))
    interpret = platform != "gpu"

    def ours(x: jax.Array, g: jax.Array, skip: jax.Array) -> tuple[jax.Array, ...]:
        y = gpu_norm.forward(x, scale, bias, EPS, interpret)
        return y, *gpu_norm.backward(x, scale, (g,), skip, EPS, interpret)

    def by_xla(x: jax.Array, g: jax.Array, skip: jax.Array) -> tuple[jax.Array, ...]:
        y, saved = layers.layer_norm_forward(x, scale, bias, EPS)
        return y, *layers.layer_norm_backward(EPS, saved, g, skip_BND=skip)

    times = {
        name: {"with_gradients_ms": timed(functools.partial(jax.jit(run), x, g, skip))["ms"]}
        for name, run in (("ours", ours), ("xla", by_xla))
    }
    return {"shape": list(shape), "bytes": 6 * x.nbytes, **times}
