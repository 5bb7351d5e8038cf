"""How the weights of a ViT begin: a row for each code whose models it may follow (``config.encoder.init``)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

XAVIER = nn.initializers.xavier_uniform()
NORMAL = nn.initializers.normal(0.02)
NEAR_ZERO = nn.initializers.normal(1e-6)
# The pre-training code of BEiT, SimMIM and ROPIM cuts at one deviation.
CUT = nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0)


def each_of_three(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Xavier-uniform queries, keys and values, each as a matrix of its own, side by side in `shape` (D, 3 E)."""
    D, width = shape
    parts_3DE = nn.initializers.xavier_uniform(batch_axis=(0,))(key, (3, D, width // 3), dtype)
    return parts_3DE.transpose(1, 0, 2).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """How each kind of weight begins. Biases begin at 0, but for those of torch's layers.

    Attributes:
      kernel: the kernels that no other field names.
      qkv: the joint kernel of queries, keys and values.
      class_token: the class token.
      tokens: the mask token and learned positions.
      rescaled: whether the last kernel of each branch of block l is divided by sqrt(2 l).
      torch_patches: whether the patch projection begins as torch's convolution does, its biases too.
      torch_head: whether a linear decoder does.
    """

    kernel: nn.initializers.Initializer = XAVIER
    qkv: nn.initializers.Initializer = XAVIER
    class_token: nn.initializers.Initializer = NORMAL
    tokens: nn.initializers.Initializer = NORMAL
    rescaled: bool = False
    torch_patches: bool = False
    torch_head: bool = False

    def last(self, number: jax.Array | None) -> nn.initializers.Initializer:
        """How the last kernel of a branch begins in the block of this number, from 1; None: as the other kernels."""
        if number is None:
            return self.kernel
        return lambda *args: self.kernel(*args) / jnp.sqrt(2.0 * number)


BEGINNINGS = {
    "xavier": Beginning(),  # MAE
    "mocov3": Beginning(qkv=each_of_three, class_token=NEAR_ZERO),
    "timm": Beginning(NORMAL, NORMAL, class_token=NEAR_ZERO, torch_patches=True),
    "trunc_normal": Beginning(CUT, CUT, CUT, CUT, rescaled=True, torch_head=True),  # BEiT, SimMIM, ROPIM
}
