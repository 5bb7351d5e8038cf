"""Collapse measures of a run's encoder, for all layers in one pass over images.

Shapes: L + 2 places (the input of the first layer, each layer's output, the representation), B images per batch, q
views, N tokens, D width, X = 1 + D. The input is a group of l = 1 places; other neighbouring places of one shape are a
group of l places (:func:`representation.tokens_by_layer`): a transformer has one, a ResNet four or five.
"""

from __future__ import annotations

import itertools
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
from crate_jax.errors import DataError
from crate_jax.evals import lidar, spectra
from crate_jax.models import ENCODERS, prefix_tokens, representation, widths
from crate_jax.models.corruption import CLEAN
from crate_jax.parallel import parameters, sharding
from crate_jax.report import Subject

log = logging.getLogger(__name__)

INPUT = "input"
Features = Callable[[Any, jax.Array], tuple[jax.Array, ...]]


def places(config: ConfigDict) -> list[str]:
    """Names of the places: ``input``, ``block 1`` (or ``stage 1``) .. ``block L`` and ``representation``."""
    layer = ENCODERS[config.encoder.name].layer
    return [INPUT, *(f"{layer} {i + 1}" for i in range(len(widths(config)))), "representation"]


def features(config: ConfigDict) -> Features:
    """Makes the function from images without corruption to their features at all places.

    Returns:
      the function (params, images uint8 (B, H, W, 3)) -> for each group of places, float32 (l, B, D), pooled by
      ``config.evaluation.pool``; at the input, where the class token is the same for all images, the mean of the patch
      tokens.
    """
    tokens, pooled, prefix = representation.tokens_by_layer(config), representation.pool(config), prefix_tokens(config)

    def of_group(tokens_lBND: jax.Array, is_input: bool) -> jax.Array:
        tokens_lBND = tokens_lBND.astype(jnp.float32)
        return jnp.mean(tokens_lBND[:, :, prefix:], axis=2) if is_input else jax.vmap(pooled)(tokens_lBND)

    def apply(params: Any, images_uint8: jax.Array) -> tuple[jax.Array, ...]:
        groups = tokens(params, normalise(images_uint8, config), CLEAN)
        return tuple(of_group(tokens_lBND, is_input=i == 0) for i, tokens_lBND in enumerate(groups))

    return apply


def _groups(config: ConfigDict, apply: Features) -> list[tuple[int, int]]:
    """(places, width) of each group of places."""
    images = jax.ShapeDtypeStruct((1, *config.data.image_size, config.data.channels), np.uint8)
    params = jax.eval_shape(lambda: representation.init_params(config, jax.random.key(0)))
    found = jax.eval_shape(apply, params, images)
    return [(len(x), x.shape[-1]) for x in found]


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
    encode: Callable[..., tuple[jax.Array, ...]],
    update: Callable[..., Any],
    state: Any,
    batches: Iterator[np.ndarray],
    size: int,
) -> tuple[Any, int]:
    """Computes features of all batches; each device updates a state with its rows, and the states are then merged.

    Args:
      subject: the run with the encoder.
      encode: the function (params, images (B, ...)) -> for each group of places, features (l, B, ...).
      update: the function (state, features, kept (B,)) -> state. It runs on one device at a time, so that its
        decomposition never waits for another device.
      state: the state before any rows, a tree of factors.
      batches: the images.
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
        for images in batches:
            image, mask = (put(x) for x in _padded(images, size))
            rows = encode(params, image)
            masks = {shard.device: shard.data for shard in mask.addressable_shards}
            for shards in zip(*(group.addressable_shards for group in rows), strict=True):
                device = shards[0].device
                states[device] = update(states[device], tuple(shard.data for shard in shards), masks[device])
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


def _plain_batches(config: ConfigDict, source: data.Source, indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for chunk in data.eval_batches(config, source, indices, max(size, CHUNK // size * size)):
        for start in range(0, len(chunk["image"]), size):
            yield chunk["image"][start : start + size]


def measure(subject: Subject, images: int = 4096) -> dict[str, spectra.Measures]:
    """Spectra and ranks of the features that enter the first block, after every block and of the representation.

    Args:
      subject: the run. Its training images are used without corruption, or the evaluation split if there are none.
      images: the number of images, drawn with the run's seed; 0: all.

    Returns:
      the measures by name of the place (:func:`places`). If there are not more rows than features, the measures hold a
      warning that the rows limit the ranks.

    Raises:
      DataError: there are fewer than two images.
      NonFiniteError: a feature is NaN or infinite.
    """
    config, source = subject.config, _source(subject)
    apply, names = features(config), places(config)

    def update(state: tuple[jax.Array, ...], features: tuple[jax.Array, ...], kept_B: jax.Array) -> Any:
        return tuple(
            spectra.add_rows(factor_lXX, spectra.with_ones(x_lBD, kept_B))
            for factor_lXX, x_lBD in zip(state, features, strict=True)
        )

    indices = np.sort(sample(len(source), images, config.seed))
    size = _batch_size(subject, len(indices))
    state = tuple(spectra.empty_factor(1 + width, places) for places, width in _groups(config, apply))
    factors, count = _stream(subject, apply, update, state, _plain_batches(config, source, indices, size), size)
    measured = (spectra.measures(x, count) for x in factors)
    found = list(itertools.chain(*measured))
    for warning in found[-1].warnings:
        log.warning("%s: %s", subject.name, warning)
    return dict(zip(names, found, strict=True))


def _view_batches(views: Iterator[tuple[np.ndarray, int]], size: int) -> Iterator[np.ndarray]:
    pending: list[np.ndarray] = []
    for of_image, _ in views:
        pending.append(of_image)
        if len(pending) == size:
            yield np.stack(pending)
            pending = []
    if pending:
        yield np.stack(pending)


def measure_lidar(subject: Subject, images: int = 1024, views: int = 10) -> dict[str, lidar.Lidar]:
    """LiDAR (arXiv 2312.04000) of the pooled features at all places (:func:`places`).

    Args:
      subject: the run; its images are chosen as in :func:`measure`.
      images: the number of images, which are the surrogate classes, drawn with the run's seed; 0: all.
      views: q, the number of views of each image, drawn as the run's training draws them (:func:`augmented_views`, by
        config.views if the run's method reads it), without corruption.

    Returns:
      the results by name of the place (:func:`places`).

    Raises:
      DataError: there are fewer than two images.
      NonFiniteError: a feature is NaN or infinite.
      ValueError: there are too few images or views.
    """
    config, source = subject.config, _source(subject)
    apply, names = features(config), places(config)

    def encode(params: Any, images_uint8: jax.Array) -> tuple[jax.Array, ...]:
        features = apply(params, images_uint8.reshape(-1, *images_uint8.shape[2:]))
        return tuple(x_lnD.reshape(len(x_lnD), -1, views, x_lnD.shape[-1]) for x_lnD in features)

    def update(state: tuple[Any, ...], features: tuple[jax.Array, ...], kept_B: jax.Array) -> tuple[Any, ...]:
        return tuple(
            lidar.add_classes(within_lDD, between_lXX, x_lBqD, kept_B)
            for (within_lDD, between_lXX), x_lBqD in zip(state, features, strict=True)
        )

    indices = np.sort(sample(len(source), images, config.seed))
    size = _batch_size(subject, len(indices), views)
    state = tuple(
        (spectra.empty_factor(width, places), spectra.empty_factor(1 + width, places))
        for places, width in _groups(config, apply)
    )
    recipe = "views" in parts(config, subject.params)
    batches = _view_batches(augmented_views(config, source, indices, views, recipe), size)
    factors, count = _stream(subject, encode, update, state, batches, size)
    measured = (lidar.measures(within, between, count, views) for within, between in factors)
    found = list(itertools.chain(*measured))
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
