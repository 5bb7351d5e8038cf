"""Compares ResNets with torchvision's, of a narrower first stage (tests/golden/README.md)."""

from __future__ import annotations

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
    """torchvision's name of a parameter.

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


def tree_like(tree: dict, state: File) -> dict:
    """The arrays of a state_dict under our names, those of `tree`."""
    flat = {}
    for path in traverse_util.flatten_dict(tree):
        x = jnp.asarray(state[torch_name(path)])
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

    Features, maps and statistics are compared in float32, relative to their largest entry; gradients, and the features
    in training, in float64, where batch norm does not magnify rounding.
    """
    c = config_of(file)
    encoder, stages = build_encoder(c), representation.layers(c)
    params = representation.init_params(c, jax.random.key(0))
    state = {k.removeprefix("sd/"): v for k, v in file.items() if k.startswith("sd/")}
    tree = tree_like(params["encoder"], state)
    images_BHWC = jnp.asarray(file["in/images_nchw"]).transpose(0, 2, 3, 1)
    keys_B = jax.random.split(jax.random.key(0), len(images_BHWC))

    def train(weights: dict, statistics: dict) -> tuple[jax.Array, tuple[jax.Array, dict]]:
        whole = batch_norm.merge(weights, statistics)
        tokens_BND, moved = batch_norm.train(encoder, whole, images_BHWC, keys_B=keys_B)
        features_BD = jnp.mean(tokens_BND, 1)
        return jnp.sum(features_BD**2) / 2, (features_BD, moved)

    output_BND, tokens = jax.jit(stages)({"encoder": tree}, images_BHWC)
    (_, (features_BD, moved)), grads = jax.jit(jax.value_and_grad(train, has_aux=True))(*batch_norm.split(tree))
    found = {"out/features_eval": jnp.mean(output_BND, 1), "out/features_train": features_BD}
    found |= {f"out/eval_layer{i + 1}_mean": jnp.mean(x, 1) for i, x in enumerate(tokens)}
    found |= {f"f64/out/{k}": found[f"out/{k}"] for k in ("features_eval", "features_train")}
    outputs = {k: relative(v, file[k]) for k, v in found.items()}
    sides = [(len(images_BHWC), x.shape[-1], *grid) for x, grid in zip(tokens, grids(c), strict=True)]
    outputs |= {
        f"layer{i + 1}_shape": float(sides[i] != tuple(file[f"out/layer{i + 1}_shape"])) for i in range(len(sides))
    }
    after = {k.removeprefix("after/"): v for k, v in file.items() if k.startswith("after/")}
    theirs = names(tree_like(batch_norm.split(moved)[1], after))
    ours = names(batch_norm.split(moved)[1])
    outputs |= {k: relative(ours[k], theirs[k]) for k in theirs}
    reference = {k.removeprefix("grad/"): v for k, v in file.items() if k.startswith("grad/")}
    theirs = names(tree_like(grads, reference))
    return outputs, {k: relative(g, theirs[k]) for k, g in names(grads).items()}


def relative(ours: jax.Array, theirs: np.ndarray) -> float:
    """The largest difference over the largest entry of the reference; shapes must agree."""
    if np.shape(ours) != np.shape(theirs):
        return float("inf")
    return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs)) / np.max(np.abs(theirs)))
