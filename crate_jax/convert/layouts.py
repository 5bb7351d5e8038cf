"""Layouts: conversions between one of our arrays and other people's tensors, in both directions.

Torch keeps linear weights as (out, in) and images as NCHW; we keep kernels as (in, out) and patches as (row,
column, channel). Every layout only moves numbers, so a round trip gives the same bits.

Shapes: D width, N tokens, p patch side, P = 3 p^2 numbers per patch, rows R.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Layout:
    """Two functions, each the inverse of the other.

    Attributes:
      to_ours: their tensors -> our array.
      to_theirs: our array -> their tensors.

    >>> kernel = np.ones((4, 3))
    >>> [tensor.shape for tensor in LINEAR.to_theirs(kernel)]
    [(3, 4)]
    >>> LINEAR.to_ours(LINEAR.to_theirs(kernel)).shape
    (4, 3)
    """

    to_ours: Callable[[Sequence[Array]], Array]
    to_theirs: Callable[[Array], Sequence[Array]]


def single(to_ours: Callable[[Array], Array], to_theirs: Callable[[Array], Array]) -> Layout:
    """The layout of an array that corresponds to one tensor."""
    return Layout(lambda tensors: to_ours(tensors[0]), lambda a: (to_theirs(a),))


def _side(numbers: int) -> int:
    return math.isqrt(numbers // 3)


def _from_channels_first(a_PR: Array) -> Array:
    """Reorders the first axis from pixel shuffle's (channel, row, column) to (row, column, channel)."""
    p = _side(len(a_PR))
    return a_PR.reshape(3, p, p, -1).transpose(1, 2, 0, 3).reshape(a_PR.shape)


def _to_channels_first(a_PR: Array) -> Array:
    p = _side(len(a_PR))
    return a_PR.reshape(p, p, 3, -1).transpose(2, 0, 1, 3).reshape(a_PR.shape)


def _conv_of_kernel(a_PD: Array) -> Array:
    p = _side(len(a_PD))
    return a_PD.reshape(p, p, 3, -1).transpose(3, 2, 0, 1)


AS_IS = single(lambda a: a, lambda a: a)
LINEAR = single(lambda a: a.T, lambda a: a.T)  # (out, in) <-> (in, out)
CONV = single(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
PATCH_CONV = single(lambda a: a.transpose(2, 3, 1, 0).reshape(-1, len(a)), _conv_of_kernel)  # (D, 3, p, p) <-> (P, D)
SHUFFLE_CONV = single(  # 1x1 convolution before a pixel shuffle, (P, D, 1, 1) <-> (D, P)
    lambda a: _from_channels_first(a[:, :, 0, 0]).T, lambda a: _to_channels_first(a.T)[:, :, None, None]
)
SHUFFLE_BIAS = single(_from_channels_first, _to_channels_first)  # (P,) <-> (P,)
TABLE = single(lambda a: a[0], lambda a: a[None])  # (1, 1 + N, D) <-> (1 + N, D)
# Three linear maps in one array: queries, keys, values.
QKV_LINEAR = Layout(lambda tensors: np.concatenate(tensors).T, lambda a: np.split(a.T, 3))
QKV_BIAS = Layout(np.concatenate, lambda a: np.split(a, 3))
