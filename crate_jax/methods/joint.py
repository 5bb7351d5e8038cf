"""What joint-embedding methods share: two views of an image, a student, a momentum target, an online classifier.

A method says in an :class:`Algorithm` which heads it puts on the encoder, which networks have a slow copy (the target),
and its loss; :func:`method` makes a :class:`~crate_jax.methods.method.Method` of it. As in solo-learn every view runs
through a network by itself, so batch norm has the statistics of one view (over the global batch), unless
config.joint.batch_norm="pooled".

Shapes: B batch, D width of the features, P width of the projections, Q rows of a queue.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.data.pixels import normalise
from crate_jax.data.recipes import LARGE
from crate_jax.errors import ConfigError
from crate_jax.methods import online, whitening
from crate_jax.methods.method import Batch, Carried, Method, Params, Progress, Scalars, Start
from crate_jax.models import ENCODERS, batch_norm, representation
from crate_jax.models.adopt import grid_of, init_encoder
from crate_jax.models.batch_norm import STATISTICS
from crate_jax.parallel.sharding import keep_rows_split
from crate_jax.validation import RECORDED, Key, Section, at_least, one_of, positive, within

TARGET, ONLINE = "target", "online"
Own = dict[str, Any]
Apply = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]
ViewsOf = Callable[[Batch, jax.Array], Sequence[jax.Array]]


class Networks:
    """The networks of the student, or of its target, during one training step.

    Attributes:
      trees: the networks' parameters by name, with the statistics that the calls so far have moved.
    """

    def __init__(self, apply: Mapping[str, Apply], trees: Mapping[str, Any], pooled: bool) -> None:
        self._apply, self._pooled = apply, pooled
        self.trees = dict(trees)

    def __call__(self, name: str, inputs: Sequence[jax.Array], keys: Sequence[Any] | None = None) -> list[jax.Array]:
        """Applies a network to each input in turn, in training mode.

        Args:
          name: the network.
          inputs: for each view (B, ...).
          keys: for each view one key per image, (B,); only some networks need keys.

        Returns:
          for each view (B, ...).
        """
        keys = [None] * len(inputs) if keys is None else keys
        calls = [[i] for i in range(len(inputs))]
        if self._pooled:  # large views together, and small ones
            calls = [list(range(len(inputs))[:LARGE]), list(range(len(inputs))[LARGE:])]
        outputs: list[jax.Array] = []
        for views in filter(None, calls):
            x = jnp.concatenate([inputs[i] for i in views])
            key = None if keys[0] is None else jnp.concatenate([keys[i] for i in views])
            y, self.trees[name] = self._apply[name](self.trees[name], x, key)
            outputs += jnp.split(y, len(views))
        return outputs


@dataclasses.dataclass(frozen=True)
class Step:
    """What a loss reads.

    Attributes:
      student: the networks that gradients train: ``encoder`` and the heads.
      target: their slow copies, those that `Algorithm.target` names.
      features: the student's features of each view (B, D) float32, the two large views first.
      target_features: the target's features of the large views; [] without a target.
      label: the images' classes, int32 (B,); -1: unknown.
      index: the images' places in the training set, int32 (B,).
      own: the method's own entries of `carried`.
      keys: one key per image (B,), for what the loss itself draws.
    """

    student: Networks
    target: Networks
    features: list[jax.Array]
    target_features: list[jax.Array]
    label: jax.Array
    index: jax.Array
    own: Own
    keys: jax.Array


def no_state(key: jax.Array) -> Own:
    """The default of `Algorithm.state`."""
    return {}


def unchanged(params: Params, own: Own, progress: Progress) -> tuple[Params, Own]:
    """The default of `Algorithm.after`."""
    return params, own


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A joint-embedding method.

    Attributes:
      heads: for each network beside the encoder, its name, (module, width of its input). A module is called as
        (x (B, width), train) or, if it is named in `keyed`, as (x, train, keys (B,)).
      loss: (step) -> (scalar, the method's own entries of `carried`, scalars to log).
      target: the networks that have a slow copy, a moving average of the student's weights by config.joint.tau.
      state: (key) -> the method's own entries of `carried` at the start.
      after: (params, own entries, progress) -> (params, own entries), once per update, with the new weights.
      held: (pattern, epochs) of weights that are not updated in the first epochs.
      small_views: whether the loss takes more than two views (multi-crop).
      keyed: the heads that draw random numbers.
    """

    heads: Mapping[str, tuple[nn.Module, Any]]
    loss: Callable[[Step], tuple[jax.Array, Own, Scalars]]
    target: tuple[str, ...] = ()
    state: Callable[[jax.Array], Own] = no_state
    after: Callable[[Params, Own, Progress], tuple[Params, Own]] = unchanged
    held: tuple[tuple[str, float], ...] = ()
    small_views: bool = False
    keyed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The encoder that an algorithm trains.

    Attributes:
      init: key -> its parameters, with statistics.
      apply: (parameters, normalised images (B, H, W, 3), keys (B,)) -> (features (B, D) float32, parameters with moved
        statistics), in training mode.
      width: D.
    """

    init: Callable[[jax.Array], Params]
    apply: Apply
    width: int


def method(
    algorithm: Callable[[ConfigDict, int, data.Source], Algorithm],
) -> Callable[[ConfigDict, data.Source], Method]:
    """Returns the function (validated config, training images) -> Method of a row of METHODS.

    Args:
      algorithm: the function (config, width D of the features, training images) -> Algorithm.
    """

    def build(config: ConfigDict, source: data.Source) -> Method:
        encoder = config_encoder(config)
        built = assemble(config, algorithm(config, encoder.width, source), encoder, data.views_of(config), source)
        columns, pictures = data.pictures_of(config)
        return dataclasses.replace(built, columns=columns, pictures=pictures, pictures_name="views")

    build.__module__ = algorithm.__module__  # the row's function counts as the method's own
    return build


def config_encoder(config: ConfigDict) -> Encoder:
    """The encoder of a validated config, with the pooling of config.evaluation.pool; it is trained at its output."""
    represent = representation.build(config, layer=0)

    def init(key: jax.Array) -> Params:
        return representation.init_params(config, key)["encoder"]

    def apply(tree: Any, images: jax.Array, keys: Any) -> tuple[jax.Array, Any]:
        features_BD, params = represent.train({"encoder": tree}, images, keys)
        return features_BD, params["encoder"]

    return Encoder(init, apply, representation.width(config))


def assemble(
    config: ConfigDict, algorithm: Algorithm, encoder: Encoder, views_of: ViewsOf, source: data.Source | None
) -> Method:
    """Makes a method of an algorithm and an encoder.

    Args:
      config: a validated config.
      algorithm: the method's own part.
      encoder: the encoder.
      views_of: (batch, keys (B,)) -> normalised views (B, H, W, 3), the two large ones first.
      source: the training images; only their class names are read. None: no online classifier.

    Raises:
      ConfigError: config.views.small is above 0 and the algorithm takes two views only.
    """
    small = config.views.small
    if small and not algorithm.small_views:
        raise ConfigError(f"config.views.small={small}: must be 0, since method {config.method!r} takes two views only")
    classes = len(source.class_names) if source is not None and source.class_names is not None else 0
    parts = _Parts(config, algorithm, encoder, views_of, classes if config.online.lr > 0 else 0)
    represent, slow = representation.build(config), "encoder" in algorithm.target

    def features_of(judged: Params, images_uint8: jax.Array) -> jax.Array:
        return represent(judged, normalise(images_uint8, config))

    return Method(
        inputs=("views", *(("small_views",) if small else ()), "label", "index"),
        init=parts.init,
        adopt=functools.partial(init_encoder, ours=grid_of(config)),
        loss=parts.loss,
        features=features_of,
        after=parts.after,
        judged=_with_target_encoder if slow and config.joint.judged == "target" else batch_norm.whole,
        averaged=batch_norm.carried_statistics,
        held=algorithm.held,
        healthy={"z_std": config.joint.out**-0.5},
        mean_over_images=False,  # batch norm, negatives or statistics couple the images
    )


def _with_target_encoder(params: Params, carried: Carried) -> Params:
    return {**batch_norm.whole(params, carried), "encoder": carried[TARGET]["encoder"]}


@dataclasses.dataclass(frozen=True, eq=False)  # its methods are hashed by jax.jit, a config cannot be
class _Parts:
    """The functions of a method, with what they are made of.

    Attributes:
      config, algorithm, encoder, views_of: as in :func:`assemble`.
      classes: the number of classes of the online classifier; 0: there is no classifier.
    """

    config: ConfigDict
    algorithm: Algorithm
    encoder: Encoder
    views_of: ViewsOf
    classes: int

    def init(self, key: jax.Array, start: Start) -> tuple[Params, Carried]:
        """`Method.init`."""
        encoder_key, own_key, *keys = jax.random.split(key, 2 + len(self.algorithm.heads))
        heads = self.algorithm.heads.items()
        drawn = {name: _init_head(module, k, width) for k, (name, (module, width)) in zip(keys, heads, strict=True)}
        whole = start({"encoder": self.encoder.init(encoder_key), **drawn})
        params, statistics = batch_norm.split(whole)
        carried = dict(self.algorithm.state(own_key))
        if statistics:
            carried[STATISTICS] = statistics
        if self.algorithm.target:
            carried[TARGET] = jax.tree.map(jnp.copy, {name: whole[name] for name in self.algorithm.target})
        if self.classes:
            carried[ONLINE] = online.init(self.encoder.width, self.classes)
        return params, carried

    def loss(
        self, params: Params, carried: Carried, batch: Batch, keys_B: jax.Array
    ) -> tuple[jax.Array, tuple[Carried, Scalars]]:
        """`Method.loss`."""
        view_keys_B, path_keys_B, own_keys_B = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(keys_B), 1, 0)
        views = [keep_rows_split(x) for x in self.views_of(batch, view_keys_B)]
        student, target = self._networks(batch_norm.whole(params, carried)), self._networks(carried.get(TARGET, {}))
        path_keys = [jax.vmap(jax.random.fold_in, (0, None))(path_keys_B, v) for v in range(2 * len(views))]
        features = student("encoder", views, path_keys[: len(views)])
        slow = "encoder" in self.algorithm.target
        target_features = target("encoder", views[:LARGE], path_keys[len(views) :][:LARGE]) if slow else []
        step = Step(
            student, target, features, target_features, batch["label"], batch["index"], _own(carried), own_keys_B
        )
        value, own, scalars = self.algorithm.loss(step)
        scalars = {self.config.method: value, **scalars}
        if whitening.is_asked(self.config):
            penalty, logged = whitening.penalty(features[:LARGE], self.config)
            value, scalars = value + penalty, {**scalars, **logged}
        carried = {**carried, **jax.lax.stop_gradient(own)}
        if STATISTICS in carried:
            carried[STATISTICS] = batch_norm.split(student.trees)[1]
        if TARGET in carried:
            carried[TARGET] = target.trees
        if ONLINE in carried:
            carried[ONLINE], probe = online.step(carried[ONLINE], features[:LARGE], batch["label"], self.config)
            scalars = {**scalars, **probe}
        return value, (carried, scalars)

    def after(self, params: Params, carried: Carried, progress: Progress) -> tuple[Params, Carried]:
        """`Method.after`."""
        params, own = self.algorithm.after(params, _own(carried), progress)
        carried = {**carried, **own}
        if TARGET in carried:
            slow, statistics = batch_norm.split(carried[TARGET])
            new = {name: params[name] for name in slow}
            moved = optax.incremental_update(new, slow, 1.0 - tau(self.config, progress))
            carried[TARGET] = batch_norm.merge(moved, statistics)
        if ONLINE in carried:
            carried[ONLINE] = online.after(carried[ONLINE], self.config.online, progress)
        return params, carried

    def _networks(self, trees: Mapping[str, Any]) -> Networks:
        keyed, heads = self.algorithm.keyed, self.algorithm.heads.items()
        apply = {"encoder": self.encoder.apply} | {name: _head(module, name in keyed) for name, (module, _) in heads}
        return Networks(apply, trees, self.config.joint.batch_norm == "pooled")


def _head(module: nn.Module, keyed: bool) -> Apply:
    def apply(tree: Any, x: jax.Array, keys: Any) -> tuple[jax.Array, Any]:
        return batch_norm.train(module, tree, x, True, *((keys,) if keyed else ()))

    return apply


def _init_head(module: nn.Module, key: jax.Array, shape: Any) -> Params:
    shape = shape if isinstance(shape, tuple) else (shape,)
    return module.init(key, jnp.zeros((2, *shape)), False)["params"]


def _own(carried: Carried) -> Own:
    return {name: x for name, x in carried.items() if name not in (STATISTICS, TARGET, ONLINE)}


def tau(config: ConfigDict, progress: Progress) -> jax.Array:
    """The share of the target that an update keeps; it rises from joint.tau to joint.tau_final along a cosine."""
    base, final = config.joint.tau, config.joint.tau_final
    return final - (final - base) * (jnp.cos(jnp.pi * progress.done / progress.total) + 1) / 2


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
    """Vectors of length 1 along an axis, float32; a zero vector stays zero.

    >>> unit(jnp.array([[0.0, -4.0], [0.0, 0.0]])).tolist()
    [[0.0, -1.0], [0.0, 0.0]]
    """
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def cosine(a_BP: jax.Array, b_BP: jax.Array) -> jax.Array:
    """The cosine of the angle between the rows of two arrays (B, P), float32 (B,)."""
    return jnp.sum(unit(a_BP) * unit(b_BP), -1)


def similarities(a_NP: jax.Array, b_MP: jax.Array) -> jax.Array:
    """The inner products of all rows of two arrays (N, P) and (M, P), (N, M), in float32 on every kind of device.

    A small temperature makes the errors of faster products large: 0.004 in bfloat16 is 0.1 after a division by 0.04.
    """
    return jnp.matmul(a_NP, b_MP.T, precision="highest")


def cross_entropy(logits_BC: jax.Array, class_B: jax.Array) -> jax.Array:
    """The mean cross entropy of logits (B, C) and classes (B,), float32 scalar."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BC.astype(jnp.float32), class_B))


def spread(projections: Sequence[jax.Array]) -> jax.Array:
    """The mean deviation of directions over the batch: 1 / sqrt(P) if they are spread evenly, 0 at a collapse.

    Args:
      projections: for each large view (B, P).
    """
    return jnp.mean(jnp.stack([jnp.std(unit(z), axis=0, ddof=1) for z in projections[:LARGE]]))


def push(queue_QP: jax.Array, place: jax.Array, rows_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Writes rows into a queue, from the place on; returns the queue and the next place, which wraps around.

    Args:
      queue_QP: (Q, ...), whose length Q is a multiple of B.
      place: int32 scalar. What is not a multiple of B, after the batch has changed, is rounded down to one: a slice at
        the end would be moved to another place.
      rows_BP: (B, ...).
    """
    size, rows = queue_QP.shape[0], rows_BP.shape[0]
    place = place - place % rows
    return jax.lax.dynamic_update_slice_in_dim(queue_QP, rows_BP, place, 0), (place + rows) % size


def require_queue(config: ConfigDict) -> int:
    """Returns the number of rows of the queue.

    Raises:
      ConfigError: it is not a multiple of the batch size.
    """
    size = config.joint.queue
    if size % config.batch_size or not size:
        raise ConfigError(
            f"config.joint.queue={size}: must be above 0 and a multiple of config.batch_size={config.batch_size}, "
            "which enters it at each step"
        )
    return size


def _check(c: ConfigDict) -> None:
    if c.batch_size < 2:
        raise ConfigError(
            f"config.batch_size={c.batch_size}: must be at least 2 for joint embedding, whose batch norms and losses "
            "compare the images of a batch"
        )
    patch = c.encoder.patch_size
    if c.views.small and ENCODERS[c.encoder.name].patches and any(side % patch for side in c.views.small_size):
        raise ConfigError(
            f"config.views.small_size={tuple(c.views.small_size)}: both sides must be multiples of "
            f"config.encoder.patch_size={patch}"
        )


JOINT = Section(
    "joint",
    "What joint-embedding methods share.",
    of_the_run=True,
    check=_check,
    keys=dict(
        hidden=Key(2048, positive, "width of the projector's hidden layers"),
        out=Key(256, positive, "width of the projections"),
        # Some methods read the next six keys: those whose rows of METHODS name them.
        predictor_hidden=Key(4096, positive, "width of the predictor's hidden layer"),
        tau=Key(0.99, within(0, 1), "share of the target that an update keeps at the start", resume=RECORDED),
        tau_final=Key(1.0, within(0, 1), "this share at the end; it rises along a cosine", resume=RECORDED),
        judged=Key(
            "student",
            one_of("student", "target"),
            "the encoder that is evaluated, exported and loaded; target: the slow copy",
        ),
        temperature=Key(0.2, positive, "what similarities are divided by", resume=RECORDED),
        queue=Key(65536, at_least(0), "rows of the queue, a multiple of batch_size"),
        batch_norm=Key("view", one_of("view", "pooled"), "statistics of each view alone, or of all of one size"),
    ),
)
