"""Compares ResNets with torchvision's, of a narrower first stage (tests/golden/README.md)."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from crate_jax import config as configs
from crate_jax.models import batch_norm, build_encoder, grids, representation
from crate_jax.parallel.parameters import names

File = Mapping[str, np.ndarray]
Errors = dict[str, float]


def torch_name(path: tuple[str, ...]) -> str:
    """The name in torchvision of a parameter.

    >>> torch_name(("stage2", "block1", "shortcut_norm", "running_var"))
    'layer2.1.downsample.1.running_var'
    """
    *place, part, leaf = path
    if place[0] == "stem":
        where = f"{'conv' if part == 'conv' else 'bn'}1"
    else:
        part = {"shortcut_conv": "downsample.0", "shortcut_norm": "downsample.1"}.get(part, part.replace("norm", "bn"))
        where = f"layer{place[0][-1]}.{place[1].removeprefix('block')}.{part}"
    return f"{where}.{leaf if leaf == 'bias' or leaf.startswith('running') else 'weight'}"


def tree_like(tree: dict, state: File, dtype: jax.typing.DTypeLike = np.float32) -> dict:
    """The arrays of a state_dict under our names, those of `tree`."""
    flat = {}
    for path in traverse_util.flatten_dict(tree):
        x = jnp.asarray(state[torch_name(path)], dtype)
        flat[path] = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x
    return traverse_util.unflatten_dict(flat)


def config_of(file: File) -> ConfigDict:
    """The config of a file's network."""
    meta = json.loads(str(file["meta"]))
    c = configs.base()
    c.encoder.name, c.encoder.stem = meta["net"].split("_")
    c.encoder.stage_width, c.evaluation.pool = meta["width"], "mean"
    c.encoder.stem_padding = int(re.findall(r"padding (\d)|$", meta["stem"])[0] or 0) if "cifar" in meta["net"] else 2
    c.data.image_size = file["in/images_nchw"].shape[2:]
    return c


def resnet(file: File) -> tuple[Errors, Errors]:
    """Features, maps, moved statistics; the gradient of half the sum of squares of the features in training.

    All errors are relative to the largest entry of an array. Over so few images batch norm magnifies rounding, so that
    gradients are compared in float64; features in training too, and in float32 to four times the limit.
    """
    c = config_of(file)
    encoder, stages = build_encoder(c), representation.layers(c)
    drawn = jax.eval_shape(lambda: representation.init_params(c, jax.random.key(0)))["encoder"]
    tree = tree_like(drawn, strip(file, "sd/"))
    images_BHWC = jnp.asarray(file["in/images_nchw"]).transpose(0, 2, 3, 1)
    keys_B = jax.random.split(jax.random.key(0), len(images_BHWC))

    output_BND, tokens = jax.jit(stages)({"encoder": tree}, images_BHWC)
    train_BND, moved = jax.jit(functools.partial(batch_norm.train, encoder))(tree, images_BHWC, keys_B=keys_B)
    outputs = {k: relative(jnp.mean(output_BND, 1), file[k]) for k in ("out/features_eval", "f64/out/features_eval")}
    outputs["out/features_train"] = relative(jnp.mean(train_BND, 1), file["out/features_train"]) / 4
    shapes = {"stem": (len(images_BHWC), c.encoder.stage_width, *grids(c)[0])}
    for i, (x, grid) in enumerate(zip(tokens, grids(c), strict=True)):
        outputs[f"out/eval_layer{i + 1}_mean"] = relative(jnp.mean(x, 1), file[f"out/eval_layer{i + 1}_mean"])
        shapes[f"layer{i + 1}"] = (len(x), x.shape[-1], *grid)
    outputs |= {f"{k}_shape": float(shape != tuple(file[f"out/{k}_shape"])) for k, shape in shapes.items()}
    statistics = batch_norm.split(moved)[1]
    outputs |= relatives(statistics, tree_like(statistics, strip(file, "after/")))

    with jax.enable_x64(True):
        weights, kept = batch_norm.split(tree_like(drawn, strip(file, "sd/"), np.float64))
        encoder = encoder.clone(dtype=jnp.float64)

        def half_square(weights: dict) -> tuple[jax.Array, jax.Array]:
            x = images_BHWC.astype(jnp.float64)
            tokens_BND, _ = batch_norm.train(encoder, batch_norm.merge(weights, kept), x, keys_B=keys_B)
            features_BD = jnp.mean(tokens_BND, 1)
            return jnp.sum(features_BD**2) / 2, features_BD

        grads, features_BD = jax.jit(jax.grad(half_square, has_aux=True))(weights)
        outputs["f64/out/features_train"] = relative(features_BD, file["f64/out/features_train"])
        return outputs, relatives(grads, tree_like(grads, strip(file, "grad/"), np.float64))


def strip(file: File, prefix: str) -> dict[str, np.ndarray]:
    """The arrays under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)}


def relatives(ours: dict, theirs: dict) -> Errors:
    """:func:`relative` for each array of two trees with the same names."""
    found = names(theirs)
    return {name: relative(x, found[name]) for name, x in names(ours).items()}


def relative(ours: jax.Array, theirs: np.ndarray) -> float:
    """The largest difference over the largest entry of the reference; shapes must agree."""
    if np.shape(ours) != np.shape(theirs):
        return float("inf")
    return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs)) / np.max(np.abs(theirs)))
