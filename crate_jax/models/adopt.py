"""Starts a run's encoder from the parameters of another run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crate_jax.errors import CheckpointError, some
from crate_jax.models.patches import grid_shape, relative_table_rows, resize_relative_table, resize_table
from crate_jax.parallel.parameters import names

log = logging.getLogger(__name__)

Params = Any  # nested dictionaries of arrays
Grid = tuple[int, int]  # (h, w), the patches of an image

TABLES = ("positions", "relative_bias")  # arrays with a row for each place, or for each displacement


def grid_of(config: ConfigDict) -> Grid:
    """The grid of patches of the config's images."""
    return grid_shape(config.data.image_size, config.encoder.patch_size)


def init_encoder(params: Params, source: Params, origin: str, theirs: Grid, *, ours: Grid) -> Params:
    """Returns `params` with the encoder's arrays replaced by the encoder's arrays of `source`.

    A `mask_token` on one side only is allowed: whether there is one depends on the corruption, not on the encoder.

    Args:
      params: nested dictionaries with the key 'encoder'; their dtypes and shardings stay.
      source: another run's parameters, nested dictionaries with the key 'encoder'.
      origin: the place that `source` comes from, for messages, such as ``"config.init_from=DIR"``.
      theirs: the grid of patches of the other run's images.
      ours: that of this run's. Tables of positions or of relative biases fit only the same grid: 2 x 8 places are as
        many as 4 x 4.

    Raises:
      CheckpointError: lists the first arrays that are missing, unexpected, of another shape or for another grid.
    """
    return _replaced(params, _encoder(source, origin), origin, theirs, ours)


def _encoder(source: Params, origin: str) -> Params:
    if not isinstance(source, Mapping) or "encoder" not in source:
        raise CheckpointError(f"{origin}: its parameters have no 'encoder'")
    return source["encoder"]


def _replaced(params: Params, encoder: Params, origin: str, their_grid: Grid, our_grid: Grid) -> Params:
    ours, theirs = names(params["encoder"]), names(encoder)
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
        elif their_grid != our_grid and name.split("/")[-1] in TABLES:
            grids = (f"{h} x {w}" for h, w in (their_grid, our_grid))
            wrong.append("encoder/{}: checkpoint of {} patches, config of {}".format(name, *grids))
    if wrong:
        raise CheckpointError(f"{origin}: its encoder does not fit: {some(wrong, '; ')}")
    replaced = [_placed_like(theirs[name], leaf) if name in theirs else leaf for name, leaf in ours.items()]
    return {**params, "encoder": jax.tree.unflatten(jax.tree.structure(params["encoder"]), replaced)}


def adopt_encoder(
    params: Params, source: Params, origin: str, theirs: Grid, *, ours: Grid, resize: bool = False
) -> Params:
    """Starts the encoder under a head from a pre-trained encoder, like :func:`init_encoder`.

    A bias that all blocks share is copied to each block if `params` has one bias per block (ROPIM). The final
    norm is left out if `params` has none.

    Args:
      params: nested dictionaries with the key 'encoder'.
      source: the pre-training run's parameters, nested dictionaries with the key 'encoder'.
      origin: the place that `source` comes from, for messages.
      theirs: the grid of patches of the pre-training run's images.
      ours: that of the images of `params`.
      resize: whether tables of learned positions and of relative biases are resized bicubically to the grid `ours`.
        BEiT and MAE do so too; BEiT resizes relative biases at spacings that grow geometrically.

    Raises:
      CheckpointError: the encoders do not fit; every array that differs is named.
    """
    encoder = dict(_encoder(source, origin))
    if resize and ours != theirs:
        encoder, theirs = _resized(encoder, theirs, ours, origin), ours
    blocks = params["encoder"].get("blocks", {})
    if "relative_bias" in blocks and "relative_bias" in encoder:
        table = np.asarray(encoder.pop("relative_bias"))
        depth = blocks["relative_bias"].shape[0]
        encoder["blocks"] = {**encoder["blocks"], "relative_bias": np.broadcast_to(table, (depth, *table.shape))}
    if "norm" not in params["encoder"]:
        encoder.pop("norm", None)
    return _replaced(params, encoder, origin, theirs, ours)


def _resized(encoder: Params, grid: Grid, new: Grid, origin: str) -> Params:
    """The encoder's parameters, with tables of positions and of relative biases resized to another grid of patches."""

    def check(name: str, rows: int, right: int) -> None:
        if rows != right:
            raise CheckpointError(
                f"{origin}: its {name} has {rows} rows, and {grid[0]} x {grid[1]} patches have {right}"
            )

    encoder = dict(encoder)
    embedding, stack = dict(encoder.get("embedding", {})), dict(encoder.get("blocks", {}))
    if "positions" in embedding:
        table = np.asarray(embedding["positions"])  # the class token's row comes first
        check("table of positions", len(table), 1 + grid[0] * grid[1])
        resized = resize_table(jnp.asarray(table[1:]), grid, new)
        embedding["positions"] = np.concatenate([table[:1], np.asarray(resized)])
    for tree in (encoder, stack):
        if "relative_bias" in tree:
            table = np.asarray(tree["relative_bias"])
            check("table of relative biases", table.shape[-2], relative_table_rows(grid))
            layers = jnp.asarray(table).reshape(-1, *table.shape[-2:])
            others = np.stack([np.asarray(resize_relative_table(x, grid, new)) for x in layers])
            tree["relative_bias"] = others.reshape(*table.shape[:-2], -1, table.shape[-1])
    return encoder | {name: tree for name, tree in (("embedding", embedding), ("blocks", stack)) if tree}


def _placed_like(value: Any, leaf: Any) -> Any:
    value = np.asarray(value).astype(leaf.dtype)
    return jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value
