"""What each layer does to its tokens: coding rates, sparsity, subspaces, inversion (arXiv 2404.02446).

Pure functions of arrays, and :func:`build`, which applies them to the named points of all layers of a model. The
encoder gets clean images, as in the paper's Figure 5. The decoder gets what it is trained on, the encoder's tokens of
images under the run's own corruption. Every measure is one number per layer and image, so that means and deviations
over images can be computed during training or over a whole data set.

Shapes: B images, N tokens, D width, H heads, K head width, E = H * K, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crate_jax.errors import UserError
from crate_jax.models import autoencoder, corruption as corruptions, prefix_tokens, representation
from crate_jax.models.corruption import Corruption
from crate_jax.models.layers import BLOCK_EPS, block_points, layer_norm

__all__ = ["coding_rate", "incoherence", "subspace_rate"]

# The squared precision eps^2 of all rates. The paper does not state it; the released measure divides by 0.01.
PRECISION = 0.01
MEASURES = ("paper", "released")
OF_A_TRANSFORMER = ("after_attention", "after_mlp", "mlp_hidden")  # the points that are measured there
BLOCK = 32  # rows that are made orthogonal together
# The default of accelerators, TF32 or bfloat16, is too coarse: 1 is added to the entries of Gram matrices.
EXACT = jax.lax.Precision.HIGHEST

Layers = dict[str, jax.Array]  # measure -> (L, B)


def log_det(x_XNM: jax.Array) -> jax.Array:
    """Logarithm of det(I + X X^T), (..., N, M) -> (...), float32.

    The rows of (X, I) are made orthogonal (modified Gram-Schmidt, in blocks of rows); the determinant is the product of
    their squared lengths, none of which is below 1. X X^T itself is never formed: its entries are the squares of those
    of X, and from about 1e7 on I vanishes beside them in float32. A NaN in X gives NaN.

    >>> round(float(log_det(jnp.diag(jnp.array([1.0, 3.0])))), 4)  # log 2 + log 10
    2.9957
    """
    # jnp.linalg.qr is not used: on a CPU with few threads, several LAPACK calls at once in one program wait for each
    # other for ever (jaxlib 0.10), and a measurement must not stop a run.
    N = x_XNM.shape[-2]
    width = min(BLOCK, N)
    blocks = -(-N // width)
    side = blocks * width
    pad = [(0, 0)] * (x_XNM.ndim - 2) + [(0, side - N), (0, 0)]
    rows, in_block = jnp.arange(side), jnp.arange(width)
    one_XNN = jnp.broadcast_to(jnp.eye(side, dtype=x_XNM.dtype), (*x_XNM.shape[:-2], side, side))

    def eliminate(block: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rest_XNW, total_X = carry
        first = block * width

        def row(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            panel_XbW, total_X = carry
            row_XW = jax.lax.dynamic_index_in_dim(panel_XbW, j, axis=-2, keepdims=False)
            # The rows before are unit vectors by now. What rounding left along them is taken out once more.
            again_Xb = jnp.einsum("...bw,...w->...b", panel_XbW, row_XW, precision=EXACT)
            again_Xb = jnp.where(in_block < j, again_Xb, 0.0)
            row_XW = row_XW - jnp.einsum("...b,...bw->...w", again_Xb, panel_XbW, precision=EXACT)
            length_X = jnp.maximum(jnp.linalg.norm(row_XW, axis=-1), 1.0)
            unit_XW = row_XW / length_X[..., None]
            along_Xb = jnp.einsum("...bw,...w->...b", panel_XbW, unit_XW, precision=EXACT)
            along_Xb = jnp.where(in_block > j, along_Xb, 0.0)
            panel_XbW = panel_XbW - along_Xb[..., None] * unit_XW[..., None, :]
            return jax.lax.dynamic_update_index_in_dim(panel_XbW, unit_XW, j, axis=-2), total_X + jnp.log(length_X)

        panel_XbW = jax.lax.dynamic_slice_in_dim(rest_XNW, first, width, axis=-2)
        panel_XbW, total_X = jax.lax.fori_loop(0, width, row, (panel_XbW, total_X))
        along_XNb = jnp.einsum("...nw,...bw->...nb", rest_XNW, panel_XbW, precision=EXACT)
        along_XNb = jnp.where((rows >= first + width)[:, None], along_XNb, 0.0)
        return rest_XNW - jnp.einsum("...nb,...bw->...nw", along_XNb, panel_XbW, precision=EXACT), total_X

    start = (jnp.concatenate([jnp.pad(x_XNM, pad), one_XNN], axis=-1), jnp.zeros(x_XNM.shape[:-2]))
    return 2.0 * jax.lax.fori_loop(0, blocks, eliminate, start)[1]


def gaussian_rate(x_XND: jax.Array, precision: float = PRECISION) -> jax.Array:
    """1/2 log det(I + D / (N eps^2) X^T X) of N tokens of width D, in nats, (..., N, D) -> (...) float32.

    This is the number of nats that a Gaussian code book needs for the tokens up to an error of eps. X^T X and X X^T
    have the same non-zero eigenvalues; the smaller of the two decides.

    Args:
      x_XND: the tokens.
      precision: eps^2.

    >>> float(gaussian_rate(jnp.zeros((3, 5))))
    0.0
    """
    N, D = x_XND.shape[-2:]
    x_XND = x_XND.astype(jnp.float32)
    x_XND = x_XND * math.sqrt(D / (N * precision))
    return 0.5 * log_det(x_XND if N <= D else jnp.swapaxes(x_XND, -1, -2))


def in_subspaces(x_BND: jax.Array, subspaces_DE: jax.Array, heads: int) -> jax.Array:
    """U_k^T z of every token and head: tokens (B, N, D) and bases (D, E) -> (B, H, N, K) float32."""
    w_BNE = jnp.matmul(x_BND.astype(jnp.float32), subspaces_DE, precision=EXACT)
    B, N, E = w_BNE.shape
    return w_BNE.reshape(B, N, heads, E // heads).transpose(0, 2, 1, 3)


def coding_rate(z_BND: jax.Array, precision: float = PRECISION) -> jax.Array:
    """R(Z), eq. 2.4 of arXiv 2404.02446: the coding rate of the tokens (B, N, D) of each image, (B,) in nats."""
    return gaussian_rate(z_BND, precision)


def subspace_rate(z_BND: jax.Array, subspaces_DE: jax.Array, heads: int, precision: float = PRECISION) -> jax.Array:
    """R^c(Z | U_1..U_H), eq. 2.5 of arXiv 2404.02446, (B,) in nats.

    It is the sum of the coding rates that the tokens (B, N, D) have in the subspaces.
    """
    return jnp.sum(gaussian_rate(in_subspaces(z_BND, subspaces_DE, heads), precision), axis=-1)


def released_rate(
    normed_BND: jax.Array, subspaces_DE: jax.Array, heads: int, precision: float = PRECISION
) -> jax.Array:
    """R^c as the released code of CRATE computes it, (B,) in nats.

    It is the rate of U_k^T LN(Z^l), before the attention, with each token scaled to unit length in each head;
    `normed_BND` is LN(Z^l) with the class token. It does not depend on the length of tokens, only on their directions.
    """
    w_BHNK = in_subspaces(normed_BND, subspaces_DE, heads)
    length_BHN1 = jnp.linalg.norm(w_BHNK, axis=-1, keepdims=True)  # 0 of a token that ISTA made 0
    return jnp.sum(gaussian_rate(w_BHNK / jnp.maximum(length_BHN1, 1e-12), precision), axis=-1)


def nonzero(x_BND: jax.Array) -> jax.Array:
    """|Z|_0 / (d N): the share of the entries of (B, N, D) that are not exactly zero, (B,).

    >>> nonzero(jnp.array([[[1.0, 0.0], [0.0, 0.0]]])).tolist()
    [0.25]
    """
    return jnp.mean((x_BND != 0).astype(jnp.float32), axis=(1, 2))


def inversion_error(z_BND: jax.Array, y_BND: jax.Array, corruption: Corruption) -> tuple[jax.Array, jax.Array]:
    """How far decoder features Y are from the encoder features Z that they should restore.

    Both are compared after I - P: under a mask, only at the removed patches, where Y had nothing to copy.

    Args:
      z_BND: the input of the encoder layer, patch tokens of the clean image.
      y_BND: the output of the decoder layer, patch tokens.
      corruption: the corruption of the images that the decoder restores.

    Returns:
      |Z - Y| / |Z|, and the smallest |Z - c Y| / |Z| over numbers c for each image (at most 1); each (B,). Of an
      image whose Z is 0 they are |Y| and 0.
    """
    z_BND = corruption.complement(z_BND.astype(jnp.float32))
    y_BND = corruption.complement(y_BND.astype(jnp.float32))

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b, axis=(1, 2))

    zz, yy, zy = dot(z_BND, z_BND), dot(y_BND, y_BND), dot(z_BND, y_BND)
    unexplained = jnp.where(zz > 0, 1.0 - jnp.square(zy) / jnp.maximum(zz * yy, 1e-30), 0.0)
    size = jnp.where(zz > 0, zz, 1.0)
    return jnp.sqrt(dot(z_BND - y_BND, z_BND - y_BND) / size), jnp.sqrt(jnp.maximum(unexplained, 0.0))


def incoherence(subspaces_DE: jax.Array, heads: int) -> dict[str, jax.Array]:
    """How near the bases U_1..U_H, (D, E), are to the theory's U_i^T U_j = [i = j] I (Assumption 2).

    Returns:
      scalars. ``coherence_max`` and ``coherence_mean`` are the maximum and mean of |cos| between columns of different
      subspaces; for random directions the mean is about sqrt(2 / (pi D)). ``orthonormality_error`` is
      |U_k^T U_k - I|_F / sqrt(K), averaged over the subspaces.

    >>> {name: float(x) for name, x in incoherence(jnp.eye(4), heads=2).items()}
    {'coherence_max': 0.0, 'coherence_mean': 0.0, 'orthonormality_error': 0.0}
    """
    D, E = subspaces_DE.shape
    K = E // heads
    unit_DE = subspaces_DE / jnp.linalg.norm(subspaces_DE, axis=0, keepdims=True)
    cosines_EE = jnp.abs(jnp.matmul(unit_DE.T, unit_DE, precision=EXACT))
    subspace_E = jnp.arange(E) // K
    apart_EE = subspace_E[:, None] != subspace_E[None, :]
    bases_HDK = subspaces_DE.reshape(D, heads, K).transpose(1, 0, 2)
    grams_HKK = jnp.einsum("hdk,hdl->hkl", bases_HDK, bases_HDK, precision=EXACT)
    errors_H = jnp.linalg.norm(grams_HKK - jnp.eye(K), axis=(1, 2)) / jnp.sqrt(K)
    return {
        "coherence_max": jnp.max(jnp.where(apart_EE, cosines_EE, 0.0)),
        "coherence_mean": jnp.sum(jnp.where(apart_EE, cosines_EE, 0.0)) / jnp.maximum(jnp.sum(apart_EE), 1),
        "orthonormality_error": jnp.mean(errors_H),
    }


def encoder_layer(points: dict, block: dict, heads: int, prefix: int, measures: Sequence[str] = MEASURES) -> Layers:
    """The measures of one encoder layer, each (B,).

    Args:
      points: the layer's named points, (B, prefix + N, D) each.
      block: the layer's parameters.
      heads: H.
      prefix: the number of tokens before the patch tokens (the class token).
      measures: ``paper`` measures R^c of Z^{l+1/2} on the patch tokens; ``released`` measures as the authors' script
        does, with the class token.

    Returns:
      for any encoder, ``rate``: R after the attention step. For CRATE, ``subspace_rate`` and ``subspace_rate_before``:
      R^c of Z^{l+1/2} and of Z^l; and ``nonzero`` of the ISTA output (of the code, where the dictionary is
      over-complete). `released` adds ``released_rate`` and ``released_nonzero``. For a ViT, ``nonzero`` of the tokens
      after the MLP; and ``active``, the share of the MLP's hidden units that are positive, since GELU has no exact
      zeros.
    """
    if "mssa" not in block:
        return {
            "rate": coding_rate(points["after_attention"][:, prefix:]),
            "nonzero": nonzero(points["after_mlp"][:, prefix:]),
            "active": jnp.mean((points["mlp_hidden"][:, prefix:] > 0).astype(jnp.float32), axis=(1, 2)),
        }
    subspaces_DE, code = block["mssa"]["subspaces"]["kernel"], points.get("code", points["after_ista"])
    out = {"rate": coding_rate(points["after_mssa"][:, prefix:])}
    if "paper" in measures:
        out["subspace_rate"] = subspace_rate(points["after_mssa"][:, prefix:], subspaces_DE, heads)
        out["subspace_rate_before"] = subspace_rate(points["input"][:, prefix:], subspaces_DE, heads)
        out["nonzero"] = nonzero(code[:, prefix:])
    if "released" in measures:
        norm = block["mssa_norm"]
        normed_BND = layer_norm(points["input"].astype(jnp.float32), norm["scale"], norm["bias"], BLOCK_EPS)
        out["released_rate"] = released_rate(normed_BND, subspaces_DE, heads)
        out["released_nonzero"] = nonzero(code)
    return out


def decoder_layer(points: dict, block: dict, heads: int, prefix: int) -> Layers:
    """The measures of one decoder layer, each (B,); the arguments are those of :func:`encoder_layer`.

    Returns:
      ``rate`` of the layer's output. For CRATE, ``subspace_rate_before`` and ``subspace_rate``: R^c of Y^{l+1/2} and of
      Y^{l+1} in the subspaces V^l (eq. 2.16), which should rise. For a transformer, ``active`` as in encoders.
    """
    if "mssa" not in block:
        return {
            "rate": coding_rate(points["after_mlp"][:, prefix:]),
            "active": jnp.mean((points["mlp_hidden"][:, prefix:] > 0).astype(jnp.float32), axis=(1, 2)),
        }
    subspaces_DE = block["mssa"]["subspaces"]["kernel"]
    return {
        "rate": coding_rate(points["after_mssa"][:, prefix:]),
        "subspace_rate": subspace_rate(points["after_mssa"][:, prefix:], subspaces_DE, heads),
        "subspace_rate_before": subspace_rate(points["before_mssa"][:, prefix:], subspaces_DE, heads),
    }


def build(config: ConfigDict, measures: Sequence[str] = MEASURES) -> Callable[..., dict[str, Layers]]:
    """Makes the function (params, images (B, H, W, 3), keys (B,)) -> {part: {measure: (L, B)}} of a valid config.

    The images are normalised; the keys draw the corruption. The parts are ``encoder`` and, if the parameters hold a
    decoder with layers, ``decoder``. A decoder as wide as the encoder also has ``inversion_error`` and
    ``inversion_error_scaled`` (:func:`inversion_error`): they compare its layer j with the input of the encoder's layer
    L - 1 - j, both counted from 0, for as many layers as both have.

    The function raises UserError where it is traced, if the encoder is not a CRATE and lacks the points of a ViT.
    """
    features, prefix = _features(config), prefix_tokens(config)

    def measure(params: dict[str, Any], images_BHWC: jax.Array, keys_B: jax.Array) -> dict[str, Layers]:
        points, decoded, corruption = features(params, images_BHWC, keys_B)
        lacking = [] if "mssa" in params["encoder"]["blocks"] else sorted(set(OF_A_TRANSFORMER) - points.keys())
        if lacking:
            raise UserError(
                f"config.encoder.name={config.encoder.name!r}: its blocks do not name the points {', '.join(lacking)} "
                "(flax's sow), so their layers cannot be measured; set config.whitebox.every=0, or add the points"
            )
        # Layer by layer, so that memory holds the Gram matrices of one layer only.
        out = {
            "encoder": jax.lax.map(
                lambda x: encoder_layer(x[0], x[1], config.encoder.heads, prefix, measures),
                (points, params["encoder"]["blocks"]),
            )
        }
        if decoded is None:
            return out
        out["decoder"] = jax.lax.map(
            lambda x: decoder_layer(x[0], x[1], config.decoder.heads, prefix), (decoded, params["decoder"]["blocks"])
        )
        pairs = _pairs(points, decoded, prefix)
        if pairs is not None:
            errors = jax.lax.map(lambda x: inversion_error(x[0], x[1], corruption), pairs)
            out["decoder"] |= dict(zip(("inversion_error", "inversion_error_scaled"), errors, strict=True))
        return out

    return measure


Points = dict[str, jax.Array]  # named point -> (L, B, prefix + N, D)


def _features(config: ConfigDict) -> Callable[..., tuple[Points, Points | None, Corruption]]:
    """Makes the function (params, images, keys) -> (encoder's points, decoder's points or None, corruption).

    The encoder gets clean images; the decoder gets the tokens of corrupted images.
    """
    points_of = representation.points(config)
    whole = autoencoder.build(config)
    sample = corruptions.sampler(config, *autoencoder.patch_numbers(config))

    def features(
        params: dict[str, Any], images_BHWC: jax.Array, keys_B: jax.Array
    ) -> tuple[Points, Points | None, Corruption]:
        points, corruption = points_of(params, images_BHWC)[1], sample(keys_B)
        if "blocks" not in params.get("decoder", {}):
            return points, None, corruption
        trained = {"params": {name: params[name] for name in ("encoder", "decoder")}}
        _, state = whole.apply(trained, images_BHWC, corruption, mutable=["intermediates"])
        return points, block_points(state["intermediates"]["decoder"]), corruption

    return features


def _pairs(points: Points, decoded: Points, prefix: int) -> tuple[jax.Array, jax.Array] | None:
    """Inputs of encoder layers L - 1, L - 2, .. and outputs of decoder layers 0, 1, .., patch tokens only."""
    made = decoded["after_mssa" if "after_mssa" in decoded else "after_mlp"]
    given = points["input"][::-1]
    if given.shape[-1] != made.shape[-1]:
        return None
    count = min(len(given), len(made))
    return given[:count, :, prefix:], made[:count, :, prefix:]


def of_weights(params: dict[str, Any], config: ConfigDict) -> dict[str, dict[str, jax.Array]]:
    """:func:`incoherence` of every layer, {part: {measure: (L,)}}; a part without subspaces is left out."""
    out = {}
    for part in ("encoder", "decoder"):
        block = params.get(part, {}).get("blocks", {})
        if "mssa" in block:
            heads = config[part].heads
            kernels_LDE = jnp.asarray(block["mssa"]["subspaces"]["kernel"])
            out[part] = jax.lax.map(lambda kernel_DE, heads=heads: incoherence(kernel_DE, heads), kernels_LDE)
    return out


def telemetry(config: ConfigDict) -> Callable[..., dict[str, jax.Array]]:
    """Makes the function (params, images (B, H, W, 3), keys (B,)) -> {name: scalar} that training logs.

    Each scalar is a mean over images for one layer, named ``whitebox/PART/MEASURE/LAYER``, with layers counted from 1.
    config.whitebox.measure chooses the measures.
    """
    measures = MEASURES if config.whitebox.measure == "both" else (config.whitebox.measure,)
    measure = build(config, measures)

    def scalars(params: dict[str, Any], images_BHWC: jax.Array, keys_B: jax.Array) -> dict[str, jax.Array]:
        means = jax.tree.map(lambda x_LB: jnp.mean(x_LB, axis=1), measure(params, images_BHWC, keys_B))
        weights = of_weights(params, config)
        return {
            f"whitebox/{part}/{name}/{layer + 1:02d}": values_L[layer]
            for part, layers in means.items()
            for name, values_L in (layers | weights.get(part, {})).items()
            for layer in range(len(values_L))
        }

    return scalars


class Spread:
    """Mean and standard deviation over images, computed batch by batch."""

    def __init__(self) -> None:
        self.images = 0
        self._mean: dict[str, dict[str, np.ndarray]] = {}
        self._squares: dict[str, dict[str, np.ndarray]] = {}  # sums of squared distances from the mean

    def add(self, measured: dict[str, Layers]) -> None:
        """Adds the results of :func:`build` for one batch, (L, B) each."""
        for part, layers in measured.items():
            for name, values in layers.items():
                x_LB = np.asarray(values, np.float64)
                count = x_LB.shape[1]
                old = self._mean.setdefault(part, {}).get(name, np.zeros(len(x_LB)))
                squares = self._squares.setdefault(part, {}).get(name, np.zeros(len(x_LB)))
                new, total = x_LB.mean(axis=1), self.images + count
                between = np.square(new - old) * self.images * count / total
                self._mean[part][name] = old + (new - old) * count / total
                self._squares[part][name] = squares + np.square(x_LB - new[:, None]).sum(axis=1) + between
        self.images += count

    def result(self) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """{part: {measure: (mean (L,), standard deviation (L,))}} in float64; the deviation divides by n - 1."""
        below = max(self.images - 1, 1)
        return {
            part: {name: (mean, np.sqrt(self._squares[part][name] / below)) for name, mean in layers.items()}
            for part, layers in self._mean.items()
        }


def over_images(
    config: ConfigDict, params: dict[str, Any], batches: Iterable[np.ndarray], measures: Sequence[str] = MEASURES
) -> tuple[dict[str, dict[str, tuple[np.ndarray, np.ndarray]]], int]:
    """:func:`build` over any number of images, one batch in memory at a time.

    Args:
      config: a valid config; its seed draws the corruptions.
      params: the parameters ``encoder`` and, if there is a decoder, ``decoder``.
      batches: normalised images (b, H, W, 3); all batches but the last have one size.
      measures: see :func:`encoder_layer`.

    Returns:
      {part: {measure: (mean (L,), standard deviation (L,))}} over images, and the number of images.
    """
    measure = jax.jit(build(config, measures))
    params = jax.device_put(params)
    spread = Spread()
    for i, images_BHWC in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(config.seed), i)
        spread.add(jax.device_get(measure(params, images_BHWC, jax.random.split(key, len(images_BHWC)))))
    return spread.result(), spread.images


def linear_inversion_error(config: ConfigDict, params: dict[str, Any], batches: Iterable[np.ndarray]) -> np.ndarray:
    """The :func:`inversion_error` of each layer that remains after the best affine map of the decoder's features.

    The paper's layers are inverses of each other only up to what they learn (V and E are free), so the decoder may hold
    the features in other coordinates. The mean over each batch is subtracted at each place from both, because position
    alone would explain much. The map is fitted on every second batch and judged on the others.

    Args:
      config: a valid config; its seed draws the corruptions.
      params: the parameters ``encoder`` and ``decoder``.
      batches: normalised images (b, H, W, 3), in at least two batches of many images.

    Returns:
      |Z - A Y - c| / |Z - mean| by decoder layer, 1 where Y holds no information; an empty array if encoder and decoder
      differ in width, the decoder has no layers, or there are fewer than two batches of two images: one to fit the map,
      one to judge it.
    """
    features, prefix = _features(config), prefix_tokens(config)

    @jax.jit
    def moments(params: dict[str, Any], images_BHWC: jax.Array, keys_B: jax.Array) -> jax.Array | None:
        points, decoded, corruption = features(params, images_BHWC, keys_B)
        pairs = None if decoded is None else _pairs(points, decoded, prefix)
        if pairs is None:
            return None

        def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            # The column of ones is the map's constant; I - P changes it as it changes the features.
            ones = jnp.ones((*pair[0].shape[:2], 1))
            apart = [x.astype(jnp.float32) - jnp.mean(x.astype(jnp.float32), axis=0) for x in pair]
            seen = [corruption.complement(x) for x in (*apart, ones)]
            both = jnp.concatenate(seen, axis=-1)
            return jnp.einsum("bnd,bne->de", both, both, precision=EXACT)

        return jax.lax.map(one, pairs)

    params, sums = jax.device_put(params), [np.zeros(()), np.zeros(())]
    for i, images_BHWC in enumerate(batches):
        if len(images_BHWC) < 2:
            continue  # it is its own mean: nothing is left of it
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), i), len(images_BHWC))
        part = moments(params, images_BHWC, keys)
        if part is None:
            return np.zeros(0)
        sums[i % 2] = sums[i % 2] + np.asarray(part, np.float64)
    if not all(x.ndim for x in sums):
        return np.zeros(0)
    return np.array([_left_by_map(fit, judge) for fit, judge in zip(*sums, strict=True)])


def _left_by_map(fit: np.ndarray, judge: np.ndarray) -> float:
    """Relative error of the map from (Y, 1) to Z, from second moments of (Z, Y, 1) of a set to fit and a set to judge.

    The ridge is just large enough to solve the equations.
    """
    D = len(fit) // 2

    def solve(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.linalg.solve(inputs + 1e-6 * np.trace(inputs) / len(inputs) * np.eye(len(inputs)), targets)

    def left(columns: slice) -> float:
        weights = solve(fit[columns, columns], fit[columns, :D])
        explained = 2 * np.sum(weights * judge[columns, :D]) - np.sum(weights * (judge[columns, columns] @ weights))
        return float(np.trace(judge[:D, :D]) - explained)

    return float(np.sqrt(max(left(slice(D, None)), 0.0) / left(slice(2 * D, None))))
