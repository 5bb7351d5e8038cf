"""Corruptions: projectors over the token axis, drawn on the device inside the step.

Masking and random orthogonal projection (ROP) are the same object, a projector P over the token
axis: the encoder sees P X, the loss sees (I - P)(X - X^). Masking is the axis-aligned case, ROP
(arXiv 2310.18737, section 3.2) the rotated one. Additive noise changes the input, and the loss
stays whole. No encoder, decoder or loss knows which corruption it was given: all four classes have
the methods of :class:`Corruption`.

A sampler draws one corruption per image from one key per image, so that a batch cut into
micro-batches sees the same draws as the whole batch. Each class is a pytree whose arrays have a
leading batch axis; its maths is deterministic, so tests and reference numbers can build it by hand.

Shapes: B batch, N patch tokens, M tokens that reach the encoder, D width, P patch pixels,
K' buckets (the rank of the projector).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from crate_jax.parallel import target

__all__ = ["Corruption", "Masking", "Noise", "Projection", "sampler"]


class Corruption:
    """The methods that encoders, decoders and losses call. The defaults change nothing."""

    @property
    def fills_encoder(self) -> bool:
        """Whether :meth:`corrupt_tokens` needs a learned token: the encoder then has a parameter for it."""
        return False

    @property
    def fills_decoder(self) -> bool:
        """Whether :meth:`restore` needs a learned token: the decoder then has a parameter for it."""
        return False

    def corrupt_pixels(self, patches_BNP: jax.Array) -> jax.Array:
        """Clean patches -> the patches that the patch embedding receives, (B, N, P) -> (B, N, P)."""
        return patches_BNP

    def corrupt_tokens(self, tokens_BND: jax.Array, fill_D: jax.Array | None) -> jax.Array:
        """P X on embedded tokens, (B, N, D) -> (B, M, D); `fill_D` replaces removed tokens."""
        return tokens_BND

    def select(self, table_ND: jax.Array) -> jax.Array:
        """The rows of a position table for the tokens of :meth:`corrupt_tokens`, (N, D) -> (N, D) or (B, M, D)."""
        return table_ND

    def select_pairs(self, bias_HNN: jax.Array) -> jax.Array:
        """The entries of a pairwise bias with class token, (H, 1 + N, 1 + N) -> (B or 1, H, 1 + M, 1 + M)."""
        return bias_HNN[None]

    def restore(self, tokens_BMD: jax.Array, fill_D: jax.Array | None) -> jax.Array:
        """Puts all N tokens back in their places, (B, M, D) -> (B, N, D); `fill_D` replaces dropped tokens."""
        return tokens_BMD

    def complement(self, error_BNP: jax.Array) -> jax.Array:
        """(I - P) E of an error over patches, (B, N, P) -> (B, N, P)."""
        return error_BNP

    def complement_share(self) -> float:
        """The share of the N patches over which the loss is a mean, in [0, 1]."""
        return 1.0

    def view(self, patches_BNP: jax.Array) -> jax.Array:
        """P X on pixels, for pictures of the encoder's input, (B, N, P) -> (B, N, P)."""
        return patches_BNP - self.complement(patches_BNP)


@struct.dataclass
class Identity(Corruption):
    """No corruption: plain auto-encoding."""

    def view(self, patches_BNP: jax.Array) -> jax.Array:
        """The patches as they are."""
        return patches_BNP


CLEAN = Identity()  # the default of calls without a corruption


@struct.dataclass
class Noise(Corruption):
    """Additive noise on the patches; the loss stays whole (denoising auto-encoder)."""

    noise_BNP: jax.Array

    def corrupt_pixels(self, patches_BNP: jax.Array) -> jax.Array:
        """X + noise."""
        return patches_BNP + self.noise_BNP.astype(patches_BNP.dtype)

    def view(self, patches_BNP: jax.Array) -> jax.Array:
        """X + noise."""
        return self.corrupt_pixels(patches_BNP)


@struct.dataclass
class Masking(Corruption):
    """Axis-aligned projector: P keeps some tokens and removes the rest.

    Attributes:
      order_BN: token indices, kept ones first (argsort of the noise).
      removed_BN: 1.0 where a token is removed, 0.0 where it is kept.
      kept: number of kept tokens.
      drop: the encoder receives only the kept tokens (ViT-MAE), not all N tokens with fills.
      learned: the fill is a learned token, not zero.
    """

    order_BN: jax.Array
    removed_BN: jax.Array
    kept: int = struct.field(pytree_node=False)
    drop: bool = struct.field(pytree_node=False, default=False)
    learned: bool = struct.field(pytree_node=False, default=True)

    @property
    def fills_encoder(self) -> bool:
        """Whether a learned token replaces each removed token."""
        return self.learned and not self.drop

    @property
    def fills_decoder(self) -> bool:
        """Whether a learned token replaces each dropped token."""
        return self.learned and self.drop

    @classmethod
    def from_noise(cls, noise_BN: jax.Array, kept: int, drop: bool, learned: bool = True) -> Masking:
        """Keeps the `kept` tokens with the smallest noise, like MAE's random_masking.

        >>> Masking.from_noise(jnp.array([[0.3, 0.1, 0.2]]), kept=2, drop=True).removed_BN.tolist()
        [[1.0, 0.0, 0.0]]
        """
        order_BN = jnp.argsort(noise_BN, axis=-1)
        rank_BN = jnp.argsort(order_BN, axis=-1)
        return cls(order_BN, (rank_BN >= kept).astype(jnp.float32), kept, drop, learned)

    def corrupt_tokens(self, tokens_BND: jax.Array, fill_D: jax.Array | None) -> jax.Array:
        """Drops the removed tokens, or replaces them by the fill (zero if `fill_D` is None)."""
        if self.drop:
            return jnp.take_along_axis(tokens_BND, self.order_BN[:, : self.kept, None], axis=1)
        fill = jnp.zeros((), tokens_BND.dtype) if fill_D is None else fill_D.astype(tokens_BND.dtype)
        return jnp.where(self.removed_BN[..., None] > 0, fill, tokens_BND)

    def select(self, table_ND: jax.Array) -> jax.Array:
        """(N, D) -> (B, M, D) if tokens are dropped, else the table itself."""
        return table_ND[self.order_BN[:, : self.kept]] if self.drop else table_ND

    def select_pairs(self, bias_HNN: jax.Array) -> jax.Array:
        """The pairs among the class token (index 0) and the kept tokens."""
        if not self.drop:
            return bias_HNN[None]
        index_BM = jnp.pad(self.order_BN[:, : self.kept] + 1, ((0, 0), (1, 0)))
        return jax.vmap(lambda i: bias_HNN[:, i[:, None], i[None, :]])(index_BM)

    def restore(self, tokens_BMD: jax.Array, fill_D: jax.Array | None) -> jax.Array:
        """Puts the kept tokens back in their places, and the fill everywhere else."""
        if not self.drop:
            return tokens_BMD
        rank_BN = jnp.argsort(self.order_BN, axis=-1)
        source_BN = jnp.minimum(rank_BN, self.kept - 1)
        tokens_BND = jnp.take_along_axis(tokens_BMD, source_BN[..., None], axis=1)
        fill = jnp.zeros((), tokens_BND.dtype) if fill_D is None else fill_D.astype(tokens_BND.dtype)
        return jnp.where(self.removed_BN[..., None] > 0, fill, tokens_BND)

    def complement(self, error_BNP: jax.Array) -> jax.Array:
        """The error on removed patches, zero elsewhere."""
        return error_BNP * self.removed_BN[..., None].astype(error_BNP.dtype)

    def complement_share(self) -> float:
        """Removed / N: the loss is a mean over removed patches (MAE, CRATE-MAE)."""
        return 1.0 - self.kept / self.removed_BN.shape[-1]


@struct.dataclass
class Projection(Corruption):
    """Random orthogonal projection by a count sketch (arXiv 2310.18737, section 3.2).

    P = S^T diag(scale) S with the sketch S_bi = sign_i [bucket_i = b]: tokens of one bucket are
    summed with their signs, the sum is spread back with the same signs. With scale_b = 1 / (tokens
    in b), P is an exact orthogonal projector of rank K'. A signed segment sum applies it: an image
    needs N buckets and N signs, not an N x N matrix.

    Attributes:
      bucket_BN: int32 in [0, K').
      sign_BN: +1.0 or -1.0.
      scale_BK: the factor on each bucket's sum.
    """

    bucket_BN: jax.Array
    sign_BN: jax.Array
    scale_BK: jax.Array

    @classmethod
    def exact(cls, bucket_BN: jax.Array, sign_BN: jax.Array, buckets: int) -> Projection:
        """The orthogonal projector of this sketch; empty buckets lower its rank."""
        counts_BK = jax.vmap(lambda b: jnp.bincount(b, length=buckets))(bucket_BN)
        return cls(bucket_BN, sign_BN, 1.0 / jnp.maximum(counts_BK, 1).astype(jnp.float32))

    def project(self, tokens_BND: jax.Array) -> jax.Array:
        """P X, (B, N, D) -> (B, N, D)."""
        buckets = self.scale_BK.shape[-1]
        if target.is_nvidia() or target.is_tpu():
            # Products: a scatter is slow there, and on a GPU the order of its sums is not fixed.
            chosen_BKN = self.bucket_BN[:, None, :] == jnp.arange(buckets)[:, None]
            sketch_BKN = jnp.where(chosen_BKN, self.sign_BN[:, None, :], 0).astype(tokens_BND.dtype)
            product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
            sums_BKD = product("bkn,bnd->bkd", sketch_BKN, tokens_BND)
            return product("bkn,bkd->bnd", sketch_BKN, sums_BKD * self.scale_BK[..., None].astype(tokens_BND.dtype))

        def one(x_ND: jax.Array, bucket_N: jax.Array, sign_N: jax.Array, scale_K: jax.Array) -> jax.Array:
            signed_ND = x_ND * sign_N[:, None].astype(x_ND.dtype)
            sums_KD = jax.ops.segment_sum(signed_ND, bucket_N, num_segments=buckets)
            return (sums_KD * scale_K[:, None].astype(x_ND.dtype))[bucket_N] * sign_N[:, None].astype(x_ND.dtype)

        return jax.vmap(one)(tokens_BND, self.bucket_BN, self.sign_BN, self.scale_BK)

    def corrupt_tokens(self, tokens_BND: jax.Array, fill_D: jax.Array | None) -> jax.Array:
        """P X."""
        return self.project(tokens_BND)

    def complement(self, error_BNP: jax.Array) -> jax.Array:
        """(I - P) E."""
        return error_BNP - self.project(error_BNP)


Sampler = Callable[[jax.Array], Corruption]


def _mask(config: ConfigDict, tokens: int, pixels: int) -> Sampler:
    kept = int(tokens * (1 - config.mask_ratio))

    def sample(keys_B: jax.Array) -> Corruption:
        noise_BN = jax.vmap(lambda k: jax.random.uniform(k, (tokens,)))(keys_B)
        return Masking.from_noise(noise_BN, kept, config.mask_fill == "drop", config.mask_fill != "zero")

    return sample


def bucket_count(tokens: int, ratio: float) -> int:
    """K' = ceil(ratio * N), at least 1.

    >>> bucket_count(196, 0.14)  # as in the released code
    28
    """
    # The tolerance keeps 196 / 7 from becoming 29 through rounding of 1/7.
    return max(1, math.ceil(ratio * tokens - 1e-6))


def balanced_buckets(key: jax.Array, tokens: int, buckets: int) -> jax.Array:
    """The bucket of each token, (N,) int32: one random permutation of 0..K'-1 per run of K' raster tokens.

    Every bucket gets one token of each run, as in the released code. If K' does not divide N, the last
    run is cut short; a random cyclic shift then makes every token equally likely to fall into it, which
    keeps E[P] = (K'/N) I on the diagonal.
    """
    runs = -(-tokens // buckets)
    key, shift_key = jax.random.split(key)
    permutations = jax.vmap(lambda k: jax.random.permutation(k, buckets))(jax.random.split(key, runs))
    bucket_N = permutations.reshape(-1)[:tokens].astype(jnp.int32)
    if tokens % buckets:
        bucket_N = jnp.roll(bucket_N, jax.random.randint(shift_key, (), 0, tokens))
    return bucket_N


def _rop(config: ConfigDict, tokens: int, pixels: int) -> Sampler:
    buckets = bucket_count(tokens, config.rop_ratio)

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        bucket_key, sign_key = jax.random.split(key)
        if config.rop_buckets == "balanced":
            bucket_N = balanced_buckets(bucket_key, tokens, buckets)
        else:
            bucket_N = jax.random.randint(bucket_key, (tokens,), 0, buckets)
        if config.rop_signs == "balanced":
            half = jnp.where(jnp.arange(tokens) < (tokens + 1) // 2, 1.0, -1.0)
            # An odd number of tokens cannot be balanced: the extra sign is drawn.
            flip_key, sign_key = jax.random.split(sign_key)
            half = half * jnp.where(jax.random.bernoulli(flip_key), 1.0, -1.0) if tokens % 2 else half
            sign_N = jax.random.permutation(sign_key, half)
        else:
            sign_N = jax.random.rademacher(sign_key, (tokens,), jnp.float32)
        return bucket_N, sign_N

    def sample(keys_B: jax.Array) -> Corruption:
        bucket_BN, sign_BN = jax.vmap(one)(keys_B)
        if config.paper_scale:
            return Projection(bucket_BN, sign_BN, jnp.full((keys_B.shape[0], buckets), config.paper_scale, jnp.float32))
        return Projection.exact(bucket_BN, sign_BN, buckets)

    return sample


def _noise(config: ConfigDict, tokens: int, pixels: int) -> Sampler:
    def sample(keys_B: jax.Array) -> Corruption:
        return Noise(config.noise_std * jax.vmap(lambda k: jax.random.normal(k, (tokens, pixels)))(keys_B))

    return sample


def _identity(config: ConfigDict, tokens: int, pixels: int) -> Sampler:
    return lambda keys_B: Identity()


CORRUPTIONS: dict[str, Callable[[ConfigDict, int, int], Sampler]] = {
    "mask": _mask,
    "rop": _rop,
    "noise": _noise,
    "none": _identity,
}


def sampler(config: ConfigDict, tokens: int, pixels: int) -> Sampler:
    """Builds `sample(keys_B) -> Corruption` for a whole config.

    Args:
      config: the full config; reads `config.corruption`.
      tokens: N, patches per image.
      pixels: P, numbers per patch.
    """
    return CORRUPTIONS[config.corruption.name](config.corruption, tokens, pixels)
