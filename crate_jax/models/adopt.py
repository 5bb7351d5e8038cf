"""Starts a run's encoder from the parameters of another run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crate_jax.errors import CheckpointError, some
from crate_jax.models.patches import relative_table_rows, resize_table
from crate_jax.parallel.parameters import names

log = logging.getLogger(__name__)

Params = Any  # nested dictionaries of arrays


def init_encoder(params: Params, source: Params, origin: str) -> Params:
    """Returns `params` with the encoder's arrays replaced by the encoder's arrays of `source`.

    A `mask_token` on one side only is allowed: whether there is one depends on the corruption, not on the encoder.

    Args:
      params: nested dictionaries with the key 'encoder'; their dtypes and shardings stay.
      source: another run's parameters, nested dictionaries with the key 'encoder'.
      origin: the place that `source` comes from, for messages, such as ``"config.init_from=DIR"``.

    Raises:
      CheckpointError: lists the first arrays that are missing, unexpected or of another shape.
    """
    if not isinstance(source, Mapping) or "encoder" not in source:
        raise CheckpointError(f"{origin}: its parameters have no 'encoder'")
    ours, theirs = names(params["encoder"]), names(source["encoder"])
    wrong = []
    for name in sorted(ours.keys() ^ theirs.keys()):
        side = "not in this configuration" if name in theirs else "not in the checkpoint"
        if name.split("/")[-1] == "mask_token":
            log.info("%s: encoder/%s is %s; left as it is", origin, name, side)
        else:
            wrong.append(f"encoder/{name}: {side}")
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name].shape != theirs[name].shape:
            wrong.append(f"encoder/{name}: checkpoint {theirs[name].shape}, config {ours[name].shape}")
    if wrong:
        raise CheckpointError(f"{origin}: its encoder does not fit: {some(wrong, '; ')}")
    replaced = [_placed_like(theirs[name], leaf) if name in theirs else leaf for name, leaf in ours.items()]
    return {**params, "encoder": jax.tree.unflatten(jax.tree.structure(params["encoder"]), replaced)}


def adopt_encoder(params: Params, source: Params, origin: str, grid: tuple[int, int] | None = None) -> Params:
    """Starts the encoder under a head from a pre-trained encoder, like :func:`init_encoder`.

    A bias that all blocks share is copied to each block if `params` has one bias per block (ROPIM). The final
    norm is left out if `params` has none.

    Args:
      params: nested dictionaries with the key 'encoder'.
      source: the pre-training run's parameters, nested dictionaries with the key 'encoder'.
      origin: the place that `source` comes from, for messages.
      grid: (h, w) patches of the images of `params`, if they may differ from the images of `source`. Tables of
        learned positions and of relative biases are then resized bicubically to this grid. BEiT and MAE do so
        too; BEiT resizes relative biases at spacings that grow geometrically.

    Raises:
      CheckpointError: the encoders do not fit; every array that differs is named.
    """
    if "encoder" not in source:
        raise CheckpointError(f"{origin}: its parameters have no 'encoder'")
    encoder = dict(source["encoder"])
    if grid is not None:
        encoder = _resized(encoder, grid, origin)
    blocks = params["encoder"].get("blocks", {})
    if "relative_bias" in blocks and "relative_bias" in encoder:
        table = np.asarray(encoder.pop("relative_bias"))
        depth = blocks["relative_bias"].shape[0]
        encoder["blocks"] = {**encoder["blocks"], "relative_bias": np.broadcast_to(table, (depth, *table.shape))}
    if "norm" not in params["encoder"]:
        encoder.pop("norm", None)
    return init_encoder(params, {"encoder": encoder}, origin)


def _resized(encoder: Params, grid: tuple[int, int], origin: str) -> Params:
    """The encoder's parameters, with tables of positions and of relative biases resized to a grid of patches."""
    encoder = dict(encoder)
    embedding, stack = dict(encoder.get("embedding", {})), dict(encoder.get("blocks", {}))
    if "positions" in embedding:
        embedding["positions"] = _resize_table(np.asarray(embedding["positions"]), 1, grid, origin)
    tables = (2 * grid[0] - 1, 2 * grid[1] - 1)
    for tree in (encoder, stack):
        if "relative_bias" in tree:
            table = np.asarray(tree["relative_bias"])
            if table.shape[-2] != relative_table_rows(grid):
                special_first = (np.roll(x, 3, axis=0) for x in table.reshape(-1, *table.shape[-2:]))
                resized = [np.roll(_resize_table(x, 3, tables, origin), -3, axis=0) for x in special_first]
                table = np.stack(resized).reshape(*table.shape[:-2], -1, table.shape[-1])
            tree["relative_bias"] = table
    return encoder | {name: tree for name, tree in (("embedding", embedding), ("blocks", stack)) if tree}


def _placed_like(value: Any, leaf: Any) -> Any:
    value = np.asarray(value).astype(leaf.dtype)
    return jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value


def _resize_table(table_ND: np.ndarray, special: int, grid: tuple[int, int], origin: str) -> np.ndarray:
    """Resizes all rows but the first `special` ones, one row per place of a square grid; (N, D) -> (N', D)."""
    places = len(table_ND) - special
    if places == grid[0] * grid[1]:
        return table_ND
    side = round(places**0.5)
    if side * side != places:
        raise CheckpointError(f"{origin}: its {places} positions do not form a square and cannot be resized to {grid}")
    resized = resize_table(jnp.asarray(table_ND[special:]), (side, side), grid)
    return np.concatenate([table_ND[:special], np.asarray(resized)])
