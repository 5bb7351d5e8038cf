"""Attention and layer normalisation with their gradients, written out in float64 on the host: what kernels are held to.

Shapes: B images, N tokens, P parts, H heads, K head width, D width.
"""

from __future__ import annotations

import numpy as np


def attention(
    x_BNF: np.ndarray, bias_HNN: np.ndarray | None, g_BNE: np.ndarray, heads: int, parts: int
) -> dict[str, np.ndarray]:
    """softmax(q k^T / sqrt(K) + bias) v per head.

    Args:
      x_BNF: queries, keys and values side by side, (B, N, P * H * K), or with one part w, which is all three.
      bias_HNN: a bias of all images, or None.
      g_BNE: the gradient of the result, (B, N, H * K).
      heads: H.
      parts: P, 3 or 1.

    Returns:
      "y", the gradient "dx", and "dbias" if there is a bias, in float64.
    """
    B, N, _ = x_BNF.shape
    x = x_BNF.astype(np.float64).reshape(B, N, parts, heads, -1).transpose(2, 0, 3, 1, 4)  # (P, B, H, N, K)
    g = g_BNE.astype(np.float64).reshape(B, N, heads, -1).transpose(0, 2, 1, 3)
    q, k, v = (x[min(role, parts - 1)] for role in range(3))
    scale = q.shape[-1] ** -0.5
    logits = q @ k.swapaxes(-1, -2) * scale
    if bias_HNN is not None:
        logits += bias_HNN.astype(np.float64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = g @ v.swapaxes(-1, -2)
    slope = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    dq, dk, dv = slope @ k * scale, slope.swapaxes(-1, -2) @ q * scale, weights.swapaxes(-1, -2) @ g
    dx = np.stack([dq, dk, dv] if parts == 3 else [dq + dk + dv])
    found = {
        "y": (weights @ v).transpose(0, 2, 1, 3).reshape(g_BNE.shape),
        "dx": dx.transpose(1, 3, 0, 2, 4).reshape(x_BNF.shape),
    }
    return found if bias_HNN is None else {**found, "dbias": slope.sum(0)}


def norm(
    x: np.ndarray, scale_D: np.ndarray, bias_D: np.ndarray, g: np.ndarray, skip: np.ndarray | None, eps: float
) -> dict[str, np.ndarray]:
    """Layer normalisation over the last axis, (..., D), with the gradient of a skip connection around it.

    Returns:
      "y", and the gradients "dx", "dscale", "dbias", in float64.
    """
    x, scale_D, bias_D, g = (a.astype(np.float64) for a in (x, scale_D, bias_D, g))
    inverse = 1 / np.sqrt(x.var(-1, keepdims=True) + eps)
    unit = (x - x.mean(-1, keepdims=True)) * inverse
    h = g * scale_D
    dx = (h - h.mean(-1, keepdims=True) - unit * (h * unit).mean(-1, keepdims=True)) * inverse
    rows = tuple(range(x.ndim - 1))
    return {
        "y": unit * scale_D + bias_D,
        "dx": dx if skip is None else dx + skip.astype(np.float64),
        "dscale": (g * unit).sum(rows),
        "dbias": g.sum(rows),
    }
