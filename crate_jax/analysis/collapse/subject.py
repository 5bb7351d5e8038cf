"""Collapse measures of a run's encoder, for all layers in one pass over images.

Shapes: L + 1 places (each block, then the representation), B images per batch, q views, N tokens, D width, X = 1 + D.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.analysis.collapse.weights import weight_eigenvalues
from crate_jax.config import parts
from crate_jax.data.evaluation import CHUNK
from crate_jax.data.pixels import normalise
from crate_jax.data.sampling import sample
from crate_jax.data.views import augmented_views
from crate_jax.errors import ConfigError, DataError
from crate_jax.evals import spectra
from crate_jax.models import corruption as corruptions, prefix_tokens, representation
from crate_jax.models.autoencoder import patch_numbers
from crate_jax.parallel import parameters, sharding
from crate_jax.report import Subject

log = logging.getLogger(__name__)

ROWS = ("pooled", "tokens")
VIEWS = ("augmentation", "corruption")
Features = Callable[[Any, jax.Array, corruptions.Corruption], jax.Array]


def places(config: ConfigDict) -> list[str]:
    """Names of the places that are measured: ``block 1`` .. ``block L`` and ``representation``."""
    return [*(f"block {i + 1}" for i in range(config.encoder.depth)), "representation"]


def features(config: ConfigDict, rows: str = "pooled") -> Features:
    """Makes the function from images to rows of features at all places.

    Args:
      config: the run's config.
      rows: "pooled" for one row per image, pooled by ``config.evaluation.pool``; "tokens" for one row per patch token.

    Returns:
      the function (params, images uint8 (B, H, W, 3), corruption) -> float32 (L + 1, B, D), or (L + 1, B * M, D) for M
      patch tokens per image.
    """
    tokens, pooled, prefix = representation.tokens_by_block(config), representation.pool(config), prefix_tokens(config)

    def apply(params: Any, images_uint8: jax.Array, corruption: corruptions.Corruption) -> jax.Array:
        tokens_LBND = tokens(params, normalise(images_uint8, config), corruption).astype(jnp.float32)
        if rows == "tokens":
            return tokens_LBND[:, :, prefix:].reshape(len(tokens_LBND), -1, tokens_LBND.shape[-1])
        return jax.vmap(pooled)(tokens_LBND)

    return apply


def _width(config: ConfigDict, rows: str) -> int:
    return config.encoder.width * (2 if rows == "pooled" and config.evaluation.pool == "cls_mean" else 1)


def _padded(batch: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch filled up to `size` with copies of its last image, and which rows count (bool).

    >>> [x.tolist() for x in _padded(np.array([5, 6]), 3)]
    [[5, 6, 6], [True, True, False]]
    """
    short = size - len(batch)
    kept = np.arange(size) < len(batch)
    return (np.concatenate([batch, np.repeat(batch[-1:], short, axis=0)]) if short else batch), kept


def _stream(
    subject: Subject,
    encode: Callable[..., jax.Array],
    update: Callable[..., Any],
    state: Any,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    size: int,
) -> tuple[Any, int]:
    """Computes features of all batches; each device updates a state with its rows, and the states are then merged.

    Args:
      subject: the run with the encoder.
      encode: the function (params, images (B, ...), one number per image (B,)) -> features (L + 1, B, ...).
      update: the function (state, features, kept (B,)) -> state. It runs on one device at a time, so that its
        decomposition never waits for another device.
      state: the state before any rows, a tuple of factors.
      batches: images, and one number per image.
      size: images per call, a multiple of the number of devices.

    Returns:
      the merged state and the number of images.

    Raises:
      DataError: there are fewer than two images.
    """
    mesh, place = subject.mesh, sharding.split(subject.mesh)
    encode, update = jax.jit(encode, out_shardings=sharding.split(mesh, axis=1)), jax.jit(update)
    params = jax.device_put({"encoder": subject.params["encoder"]}, sharding.replicated(mesh))
    states = {device: jax.device_put(state, device) for device in mesh.local_devices}

    def put(x: np.ndarray) -> jax.Array:  # every process holds the whole batch
        return jax.make_array_from_callback(x.shape, place, lambda rows: x[rows])

    count = 0
    with spectra.one_lapack_thread():
        for images, numbers in batches:
            padded, kept = _padded(images, size)
            image, number, mask = (put(x) for x in (padded, _padded(numbers, size)[0], kept))
            rows = encode(params, image, number)
            masks = {shard.device: shard.data for shard in mask.addressable_shards}
            for shard in rows.addressable_shards:
                states[shard.device] = update(states[shard.device], shard.data, masks[shard.device])
            count += len(images)
        if count < 2:
            raise DataError(f"{subject.name}: {count} images can be decoded, but spectra need at least 2")
        local = jax.tree.map(lambda *factors: np.stack(factors), *jax.device_get(list(states.values())))
        if jax.process_count() > 1:
            local = multihost_utils.process_allgather(local, tiled=True)
        return jax.tree.map(lambda factors: jax.block_until_ready(spectra.merge(jnp.asarray(factors))), local), count


def _source(subject: Subject) -> data.Source:
    source = subject.train if subject.train is not None else subject.test
    if source is None:
        raise DataError(f"{subject.name}: there are no images to compute features from")
    return source


def _batch_size(subject: Subject, images: int, per_image: int = 1) -> int:
    """Images per batch: batch_size / views, at most `images`, then rounded up to a multiple of the devices."""
    wanted = min(max(1, subject.config.evaluation.batch_size // per_image), images)
    return -(-wanted // subject.mesh.size) * subject.mesh.size


def _plain_batches(
    config: ConfigDict, source: data.Source, indices: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for chunk in data.eval_batches(config, source, indices, max(size, CHUNK // size * size)):
        for start in range(0, len(chunk["image"]), size):
            yield chunk["image"][start : start + size], chunk["index"][start : start + size]


def measure(subject: Subject, images: int = 4096, rows: str = "pooled") -> dict[str, spectra.Measures]:
    """Spectra and ranks of the features after every block and of the representation.

    Args:
      subject: the run. Its training images are used without corruption, or the evaluation split if there are none.
      images: the number of images, drawn with the run's seed; 0: all.
      rows: see :func:`features`.

    Returns:
      the measures by name of the place (:func:`places`). If there are not more rows than features, the measures hold a
      warning that the rows limit the ranks.

    Raises:
      DataError: there are fewer than two images.
      NonFiniteError: a feature is NaN or infinite.
      ValueError: `rows` is not in ROWS.
    """
    if rows not in ROWS:
        raise ValueError(f"rows={rows!r}: must be one of {', '.join(ROWS)}")
    config, source = subject.config, _source(subject)
    apply, names = features(config, rows), places(config)
    tokens = patch_numbers(config)[0] if rows == "tokens" else 1

    def encode(params: Any, images_uint8: jax.Array, _: jax.Array) -> jax.Array:
        return apply(params, images_uint8, corruptions.Identity())

    def update(factor_LXX: jax.Array, x_LnD: jax.Array, kept_B: jax.Array) -> jax.Array:
        return spectra.add_rows(factor_LXX, spectra.with_ones(x_LnD, jnp.repeat(kept_B, tokens)))

    indices = np.sort(sample(len(source), images, config.seed))
    size = _batch_size(subject, len(indices))
    state = spectra.empty_factor(1 + _width(config, rows), len(names))
    factor_LXX, count = _stream(subject, encode, update, state, _plain_batches(config, source, indices, size), size)
    found = spectra.measures(factor_LXX, count * tokens)
    for warning in found[-1].warnings:
        log.warning("%s: %s", subject.name, warning)
    return dict(zip(names, found, strict=True))


def _view_batches(views: Iterator[tuple[np.ndarray, int]], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    pending: list[tuple[np.ndarray, int]] = []
    for pair in views:
        pending.append(pair)
        if len(pending) == size:
            yield np.stack([v for v, _ in pending]), np.array([i for _, i in pending], np.int32)
            pending = []
    if pending:
        yield np.stack([v for v, _ in pending]), np.array([i for _, i in pending], np.int32)


def measure_lidar(
    subject: Subject, images: int = 1024, views: int = 10, draw: str = "augmentation", delta: float = spectra.DELTA
) -> dict[str, spectra.Lidar]:
    """LiDAR (arXiv 2312.04000) of the pooled features after every block and of the representation.

    Args:
      subject: the run; its images are chosen as in :func:`measure`.
      images: the number of images, which are the surrogate classes, drawn with the run's seed; 0: all.
      views: q, the number of views of each image.
      draw: "augmentation" for views by the training augmentation, without corruption; "corruption" for the evaluation
        crop under q draws of the run's corruption.
      delta: see :func:`crate_jax.evals.spectra.lidar`.

    Returns:
      the results by name of the place (:func:`places`).

    Raises:
      ConfigError: `draw` is "corruption", but the run has no corruption.
      DataError: there are fewer than two images.
      NonFiniteError: a feature is NaN or infinite.
      ValueError: `draw` is not in VIEWS, or there are too few images or views.
    """
    if draw not in VIEWS:
        raise ValueError(f"draw={draw!r}: must be one of {', '.join(VIEWS)}")
    config, source = subject.config, _source(subject)
    has_none = config.corruption.name == "none" or "corruption" not in parts(config, subject.params)
    if draw == "corruption" and has_none:
        raise ConfigError(
            f"{subject.name}: config.corruption.name='none' makes all views of an image the same; LiDAR needs a "
            "corruption, or views by the augmentation"
        )
    apply, names = features(config), places(config)
    sampler = corruptions.sampler(config, *patch_numbers(config))

    def draw_corruption(index_B: jax.Array) -> corruptions.Corruption:
        keys_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(config.seed), i))(index_B)
        return sampler(jax.vmap(lambda key: jax.random.split(key, views))(keys_B).reshape(-1))

    def encode(params: Any, images_uint8: jax.Array, index_B: jax.Array) -> jax.Array:
        if draw == "corruption":
            x_LnD = apply(params, jnp.repeat(images_uint8, views, axis=0), draw_corruption(index_B))
        else:
            x_LnD = apply(params, images_uint8.reshape(-1, *images_uint8.shape[2:]), corruptions.Identity())
        return x_LnD.reshape(len(x_LnD), -1, views, x_LnD.shape[-1])

    def update(state: tuple[jax.Array, jax.Array], x_LBqD: jax.Array, kept_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        return spectra.add_classes(*state, x_LBqD, kept_B)

    indices = np.sort(sample(len(source), images, config.seed))
    size = _batch_size(subject, len(indices), views)
    width = _width(config, "pooled")
    state = spectra.empty_factor(width, len(names)), spectra.empty_factor(1 + width, len(names))
    if draw == "corruption":
        batches = _plain_batches(config, source, indices, size)
    else:
        batches = _view_batches(augmented_views(config, source, indices, views), size)
    (within_LDD, between_LXX), count = _stream(subject, encode, update, state, batches, size)
    found = spectra.lidar(within_LDD, between_LXX, count, views, delta)
    for warning in found[-1].warnings:
        log.warning("%s: %s", subject.name, warning)
    return dict(zip(names, found, strict=True))


def weights(subject: Subject) -> dict[str, np.ndarray]:
    """Eigenvalues (L, n) of each kernel that config.penalty selects, whether the run penalised it or not.

    See :func:`weight_eigenvalues`.

    Raises:
      ConfigError: config.penalty selects a parameter that does not exist or is not a kernel.
    """
    options = subject.config.penalty
    names = parameters.select(subject.params, options.include, options.exclude, "penalty")
    return weight_eigenvalues(subject.params, names)
