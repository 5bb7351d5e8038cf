"""Iterative whitening of groups of channels (IterNorm, Huang et al., arXiv 1904.03441).

Shapes: B batch, D width, G groups, C channels of a group, D = G C.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from crate_jax.models import batch_norm

GROUPS = 64  # groups that are aimed at, as in solo-learn
STEPS = 5  # of Newton's method
EPS = 1e-5  # added to the variances
HIGHEST = jax.lax.Precision.HIGHEST


def channels(width: int) -> int:
    """The number of channels of a group: as for GROUPS groups, then halved until it divides the width.

    >>> [channels(width) for width in (192, 2048, 200, 12)]
    [3, 32, 4, 1]
    """
    size = -(-width // GROUPS)
    while width % size:
        size //= 2
    return size


def whitening(centred_GCB: jax.Array) -> jax.Array:
    """Approximates the inverse root of each group's covariance by Newton's method, (G, C, C); alg. 1 of the paper."""
    size, count = centred_GCB.shape[1:]
    eye_CC = jnp.eye(size)
    sigma_GCC = EPS * eye_CC + jnp.einsum("gcb,gdb->gcd", centred_GCB, centred_GCB, precision=HIGHEST) / count
    trace_G11 = jnp.trace(sigma_GCC, axis1=1, axis2=2)[:, None, None]
    scaled_GCC, p_GCC = sigma_GCC / trace_G11, jnp.broadcast_to(eye_CC, sigma_GCC.shape)
    for _ in range(STEPS):
        cube_GCC = jnp.matmul(jnp.matmul(p_GCC, p_GCC, precision=HIGHEST), p_GCC, precision=HIGHEST)
        p_GCC = 1.5 * p_GCC - 0.5 * jnp.matmul(cube_GCC, scaled_GCC, precision=HIGHEST)
    return p_GCC * jax.lax.rsqrt(trace_G11)


class IterNorm(nn.Module):
    """Centres the channels over the batch and makes those of a group uncorrelated with variance 1, then scale and bias.

    In training the statistics are those of the global batch, and the running ones (mean, and the whitening matrix
    itself) move by batch norm's share; otherwise the running ones are used. All is float32.
    """

    @nn.compact
    def __call__(self, x_BD: jax.Array, train: bool) -> jax.Array:
        """(B, D) -> (B, D), float32."""
        width = x_BD.shape[-1]
        size = channels(width)
        groups = width // size
        eye = lambda _, shape: jnp.broadcast_to(jnp.eye(size), shape)  # noqa: E731
        running_mean = self.param("running_mean", nn.initializers.zeros, (groups, size, 1))
        running_whitening = self.param("running_whitening", eye, (groups, size, size))
        x_GCB = x_BD.astype(jnp.float32).T.reshape(groups, size, -1)
        if train:
            mean = jnp.mean(x_GCB, -1, keepdims=True)
            matrix = whitening(x_GCB - mean)
            moved = dict(running_mean=(running_mean, mean), running_whitening=(running_whitening, matrix))
            batch_norm.move(self, **moved)
        else:
            mean, matrix = running_mean, running_whitening
        y_BD = jnp.matmul(matrix, x_GCB - mean, precision=HIGHEST).reshape(width, -1).T
        # Matrices of one row, as in PyTorch, so that optimisers that treat vectors otherwise do not here.
        scale = self.param("scale", nn.initializers.ones, (1, width))
        return y_BD * scale + self.param("bias", nn.initializers.zeros, (1, width))
