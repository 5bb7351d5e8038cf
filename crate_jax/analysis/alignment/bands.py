"""Which principal components of the images hold the labels, and which a model has learned.

A band is a range of principal components in the order of their variance. The first ones hold most of the pixels'
variance, and reconstruction learns them first (Balestriero & LeCun, ICML 2024).

Shapes: N images, D numbers per (shrunk) image, K components, L bands.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crate_jax.analysis.alignment.closed_form import principal_components
from crate_jax.data.pixels import normalise
from crate_jax.evals.knn import knn_top1
from crate_jax.evals.probe import probe_top1
from crate_jax.methods.reconstruction import predict, silent
from crate_jax.models import autoencoder, corruption as corruptions
from crate_jax.models.patches import patchify, unpatchify

log = logging.getLogger(__name__)


# Of the largest variance. Along directions that no image has (grey images in three channels, fewer images than numbers)
# the rounding of float32 pixels leaves up to 1e-14 of it; that of pixels to 256 levels is 1e-9 or more.
LEAST_VARIANCE = 1e-12


@dataclasses.dataclass(frozen=True)
class Components:
    """Principal components of normalised images that :func:`shrink` has made at most `side` pixels a side.

    Attributes:
      mean_D: the mean image.
      vectors_DK: one component per column, in the order of falling variance.
      variances_K: the variance along each component.
      side: the argument `side` of :func:`shrink`.
    """

    mean_D: np.ndarray
    vectors_DK: np.ndarray
    variances_K: np.ndarray
    side: int


def shrink(images_BHWC: jax.Array, side: int) -> jax.Array:
    """Images (B, H, W, C) averaged over square boxes, so that at most `side` pixels a side are left.

    >>> shrink(jnp.zeros((2, 32, 48, 3)), 16).shape
    (2, 8, 12, 3)
    """
    B, H, W, C = images_BHWC.shape
    box = box_of((H, W), side)
    return images_BHWC.reshape(B, H // box, box, W // box, box, C).mean(axis=(2, 4))


def box_of(size: tuple[int, int], side: int) -> int:
    """The side of the boxes of :func:`shrink`: the smallest that divides both sides of the image and is large enough.

    >>> box_of((32, 48), 16), box_of((32, 32), 64)
    (4, 1)
    """
    divisors = [f for f in range(1, min(size) + 1) if size[0] % f == 0 and size[1] % f == 0]
    return next((f for f in divisors if max(size) <= f * side), divisors[-1])


def rows_of(config: ConfigDict, images_uint8: np.ndarray, side: int, chunk: int = 1024) -> np.ndarray:
    """Images uint8 (N, H, W, 3), normalised and shrunk, as rows float32 (N, D); `chunk` images at a time."""
    apply = jax.jit(lambda x: shrink(normalise(x, config), side).reshape(len(x), -1))
    parts = [np.asarray(apply(images_uint8[i : i + chunk])) for i in range(0, len(images_uint8), chunk)]
    return np.concatenate(parts)


def components_of(rows_ND: np.ndarray, side: int) -> Components:
    """The principal components of rows (N, D) that :func:`rows_of` made with the same `side`, all with a variance.

    What is left out are the directions along which all rows are the same up to rounding.
    """
    rows = rows_ND.astype(np.float64)
    mean_D = rows.mean(axis=0)
    rows -= mean_D
    variances, vectors = principal_components(rows.T @ rows / len(rows), rows.shape[1])
    K = max(1, int(np.sum(variances > LEAST_VARIANCE * variances[0])))
    return Components(mean_D, vectors[:, :K], np.maximum(variances[:K], 0), side)


def reconstruction_by_band(
    config: ConfigDict,
    params: dict,
    images_uint8: np.ndarray,
    components: Components,
    edges: Sequence[int],
    errors: Callable[..., jax.Array] | None = None,
) -> np.ndarray:
    """The share of what the corruption removed from each band that the model fails to restore.

    It is the sum over images of the squares of c^T (I - P)(x^ - x), divided by that of c^T (I - P)(x - mean). c are the
    components of a band, and P is the run's own corruption, with fixed draws. 0 is perfect; a prediction of the mean
    image has 1. A run with loss.target=patch_normalised is given the mean of each patch; there these means take the
    mean image's place.

    Args:
      config: the run's config.
      params: the parameters ``encoder`` and ``decoder``.
      images_uint8: images (N, H, W, 3) of the run's image size.
      components: the principal components of such images.
      edges: band l holds the components edges[l] .. edges[l + 1] - 1.
      errors: the function that :func:`errors_of` makes from the config and the components' side. A caller that has
        many parameters makes it once, so that it is compiled once.

    Returns:
      float64 (L,); NaN for a band from which the corruption removed nothing.
    """
    errors = errors or errors_of(config, components.side)
    totals = totals_along(config, params, images_uint8, components.mean_D, components.vectors_DK, errors)
    bands = np.add.reduceat(totals[:, : edges[-1]], edges[:-1], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return bands[0] / bands[1]


def totals_along(
    config: ConfigDict,
    params: dict,
    images_uint8: np.ndarray,
    mean_D: np.ndarray,
    vectors_DK: np.ndarray,
    errors: Callable[..., jax.Array],
) -> np.ndarray:
    """The sums of squares that :func:`reconstruction_by_band` divides, along each of K directions of unit length.

    Args:
      config: the run's config.
      params: the parameters ``encoder`` and ``decoder``.
      images_uint8: images (N, H, W, 3) of the run's image size.
      mean_D: the mean image.
      vectors_DK: one direction per column.
      errors: the function that :func:`errors_of` makes.

    Returns:
      float64 (2, K): of the error and of the reference.
    """
    batch_size = config.evaluation.batch_size
    mean, vectors = jnp.asarray(mean_D, jnp.float32), jnp.asarray(vectors_DK, jnp.float32)
    totals = np.zeros((2, vectors_DK.shape[1]))
    for start in range(0, len(images_uint8), batch_size):
        batch = images_uint8[start : start + batch_size]
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(config.seed), i))(start + jnp.arange(len(batch)))
        totals += np.asarray(errors(params, batch, keys, mean, vectors), np.float64)
    return totals


def errors_of(config: ConfigDict, side: int) -> Callable[..., jax.Array]:
    """Makes the function from one batch to the sums of squares that :func:`reconstruction_by_band` divides.

    Args:
      config: the run's config.
      side: the argument `side` of :func:`shrink`.

    Returns:
      the compiled function (params, images uint8 (B, H, W, 3), keys (B,), mean (D,), vectors (D, K)) -> (2, K): along
      each direction, the squares of the error and of the reference, summed over the images.
    """
    apply: Callable[..., jax.Array] = autoencoder.build(config).apply  # type: ignore[assignment]  # never mutable
    sample = corruptions.sampler(config, *autoencoder.patch_numbers(config))
    size, patch = tuple(config.data.image_size), config.encoder.patch_size

    @jax.jit
    def errors(
        params: dict, images: jax.Array, keys_B: jax.Array, mean_D: jax.Array, vectors_DK: jax.Array
    ) -> jax.Array:
        corruption = sample(keys_B)
        x_BNP, predicted_BNP = predict(config, apply, corruption, params, normalise(images, config))
        mean_BHWC = _enlarge(mean_D, size, side)

        def along(patches_BNP: jax.Array) -> jax.Array:
            image = shrink(unpatchify(corruption.complement(patches_BNP), size, patch), side)
            rows_BD = image.reshape(len(image), -1)
            return jnp.sum(jnp.square(jnp.matmul(rows_BD, vectors_DK, precision=jax.lax.Precision.HIGHEST)), axis=0)

        normalised = config.loss.target == "patch_normalised"
        known_BNP = silent(config, x_BNP) if normalised else patchify(mean_BHWC, patch)
        return jnp.stack([along(predicted_BNP - x_BNP), along(x_BNP - known_BNP)])

    return errors


def _enlarge(mean_D: jax.Array, size: tuple[int, int], side: int) -> jax.Array:
    """Turns a row of a shrunk image into an image (1, H, W, 3) of the full size, constant over each box."""
    box = box_of(size, side)
    small = mean_D.reshape(size[0] // box, size[1] // box, 3)
    return jnp.repeat(jnp.repeat(small, box, axis=0), box, axis=1)[None]


@dataclasses.dataclass(frozen=True)
class SubspaceAccuracy:
    """Accuracies (shares) on the test images from one subspace of the pixels.

    Attributes:
      place: "top" (the first components) or "bottom" (the last ones).
      dimensions: the number of components.
      variance: the components' share of the pixels' variance.
      probe: the accuracy of logistic regression on the coordinates, each scaled to unit variance.
      knn: the accuracy of nearest neighbours by cosine between the projected images.
    """

    place: str
    dimensions: int
    variance: float
    probe: float
    knn: float


def accuracy_by_subspace(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: int,
    components: Components,
    shares: Sequence[float],
    evaluation: ConfigDict,
) -> list[SubspaceAccuracy]:
    """Accuracy from the first components that hold a share of the variance, and from the other components.

    It repeats the paper's experiment on TinyImageNet with a linear probe and nearest neighbours in place of networks.

    Args:
      train: rows (N, D) from :func:`rows_of`, and labels (N,), of the training images.
      test: rows and labels of the evaluation images.
      classes: C.
      components: the principal components of the training rows.
      shares: shares of the variance, in (0, 1).
      evaluation: config.evaluation, with knn_k, knn_temperature and probe_c.

    Returns:
      two results (top, bottom) for each share; none if there is just one component.
    """
    if len(components.variances_K) < 2:
        return []
    coordinates = [((x - components.mean_D) @ components.vectors_DK).astype(np.float32) for x in (train[0], test[0])]
    cumulated = np.cumsum(components.variances_K) / components.variances_K.sum()
    out = []
    for share in shares:
        cut = min(int(np.searchsorted(cumulated, share)) + 1, len(cumulated) - 1)
        for place, part in (("top", slice(0, cut)), ("bottom", slice(cut, None))):
            start = time.monotonic()
            a, b = (x[:, part] for x in coordinates)
            variance = float(components.variances_K[part].sum() / components.variances_K.sum())
            probe = probe_top1(a, train[1], b, test[1], classes, evaluation.probe_c)
            knn = knn_top1(a, train[1], b, test[1], classes, evaluation.knn_k, evaluation.knn_temperature)
            out.append(SubspaceAccuracy(place, a.shape[1], variance, probe, knn))
            count, seconds = 2 * len(shares), time.monotonic() - start
            log.info("%d of %d: accuracy from %d %s components (%.1f s)", len(out), count, a.shape[1], place, seconds)
    return out
