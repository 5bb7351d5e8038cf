"""From the authors' PyTorch state dicts to our parameter trees, one table of rules per model.

A rule says which of their tensors becomes which of our arrays, and how it is laid out: torch keeps
linear weights as (out, in) and images as NCHW, we keep kernels as (in, out) and patches as (row,
column, channel). ``{l}`` in a name runs over the layers, which we stack on a leading axis. Every
tensor must be used by a rule or be listed as not needed, with the reason.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

from crate_jax.errors import ConfigError
from crate_jax.patches import relative_position_index, sincos_positions

Array = np.ndarray


def _same(a: Array) -> Array:
    return a


def _linear(a: Array) -> Array:
    """(out, in) -> (in, out)."""
    return a.T


def _patch_conv(a: Array) -> Array:
    """Patch-embedding convolution (D, 3, p, p) -> dense kernel (P, D), P as (row, column, channel)."""
    return a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0])


def _shuffle_patch(a: Array) -> Array:
    """Rows of a pixel-shuffle head, (channel, row, column) -> (row, column, channel)."""
    side = int((a.shape[0] // 3) ** 0.5)
    return a.reshape(3, side, side, *a.shape[1:]).transpose(1, 2, 0, *range(3, a.ndim + 2)).reshape(a.shape)


def _shuffle_conv(a: Array) -> Array:
    """1x1 convolution before a pixel shuffle (P, D, 1, 1) -> dense kernel (D, P)."""
    return _shuffle_patch(a[:, :, 0, 0]).T


@dataclasses.dataclass(frozen=True)
class Rule:
    """Their tensor `theirs`, laid out anew by `layout`, is our array `ours`."""

    ours: str
    theirs: str
    layout: Callable[[Array], Array] = _same


def _norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    return Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")


def _dense(ours: str, theirs: str) -> tuple[Rule, ...]:
    return Rule(f"{ours}/kernel", f"{theirs}.weight", _linear), Rule(f"{ours}/bias", f"{theirs}.bias")


def _mssa(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{ours}/mssa_norm", f"{theirs}.norm"),
        Rule(f"{ours}/mssa/subspaces/kernel", f"{theirs}.fn.qkv.weight", _linear),
        *_dense(f"{ours}/mssa/output", f"{theirs}.fn.to_out.0"),
    )


def _crate_encoder_block(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        *_mssa(ours, f"{theirs}.0.0"),
        *_norm(f"{ours}/ista_norm", f"{theirs}.0.1.norm"),
        Rule(f"{ours}/dictionary/kernel", f"{theirs}.0.1.fn.weight", _linear),
    )


def _crate_decoder_block(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{ours}/linear_norm", f"{theirs}.0.0.norm"),
        Rule(f"{ours}/linear/kernel", f"{theirs}.0.0.fn.weight", _linear),
        *_mssa(ours, f"{theirs}.0.1"),
    )


def _embedding(prefix: str = "") -> tuple[Rule, ...]:
    return (
        Rule("encoder/embedding/patch_embed/kernel", f"{prefix}patch_embed.proj.weight", _patch_conv),
        Rule("encoder/embedding/patch_embed/bias", f"{prefix}patch_embed.proj.bias"),
        Rule("encoder/embedding/cls_token", f"{prefix}cls_token"),
    )


def _vit_block(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{ours}/attention_norm", f"{theirs}.norm1"),
        Rule(f"{ours}/attention/qkv/kernel", f"{theirs}.attn.qkv.weight", _linear),
        *_dense(f"{ours}/attention/output", f"{theirs}.attn.proj"),
        *_norm(f"{ours}/mlp_norm", f"{theirs}.norm2"),
        *_dense(f"{ours}/mlp_in", f"{theirs}.mlp.fc1"),
        *_dense(f"{ours}/mlp_out", f"{theirs}.mlp.fc2"),
    )


def _mae_block(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (*_vit_block(ours, theirs), Rule(f"{ours}/attention/qkv/bias", f"{theirs}.attn.qkv.bias"))


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything known about one published model's state dict.

    Attributes:
      rules: tensors that become parameters.
      unused: tensors that no forward pass reads, name -> why.
      fixed: tensors that are constants here, name -> the value they must have, given (grid, tensor).
    """

    rules: tuple[Rule, ...]
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Callable[[tuple[int, int], Array], Array]] = dataclasses.field(default_factory=dict)


def _sincos(grid: tuple[int, int], a: Array) -> Array:
    return sincos_positions(grid, a.shape[-1])[None]


FAMILIES: dict[str, Family] = {
    "crate_blocks": Family(
        rules=(
            *_crate_encoder_block("encoder", "encoder/layers"),
            *_crate_decoder_block("decoder", "decoder/layers"),
        )
    ),
    "crate_mae": Family(
        rules=(
            *_embedding(),
            Rule("encoder/embedding/mask_token", "mask_token"),
            *_crate_encoder_block("encoder/blocks", "blocks.{l}.layers"),
            *_norm("encoder/norm", "norm"),
            *_crate_decoder_block("decoder/blocks", "decoder_blocks.{l}.layers"),
            *_norm("decoder/norm", "decoder_norm"),
            *_dense("decoder/head", "decoder_pred"),
        ),
        unused={
            "pos_embed": "a second position table that the forward pass never adds",
            "decoder_embed.weight": "created, never called",
            "decoder_embed.bias": "created, never called",
        },
        fixed={"decoder_pos_embed": _sincos},
    ),
    "vit_mae": Family(
        rules=(
            *_embedding(),
            *_mae_block("encoder/blocks", "blocks.{l}"),
            *_norm("encoder/norm", "norm"),
            *_dense("decoder/embed", "decoder_embed"),
            Rule("decoder/mask_token", "mask_token"),
            *_mae_block("decoder/blocks", "decoder_blocks.{l}"),
            *_norm("decoder/norm", "decoder_norm"),
            *_dense("decoder/head", "decoder_pred"),
        ),
        fixed={"pos_embed": _sincos, "decoder_pos_embed": _sincos},
    ),
    "ropim": Family(
        rules=(
            *_embedding("encoder."),
            Rule("encoder/relative_bias", "encoder.rel_pos_bias.relative_position_bias_table"),
            *_vit_block("encoder/blocks", "encoder.blocks.{l}"),
            Rule("encoder/blocks/attention/q_bias", "encoder.blocks.{l}.attn.q_bias"),
            Rule("encoder/blocks/attention/v_bias", "encoder.blocks.{l}.attn.v_bias"),
            Rule("encoder/blocks/layer_scale_1", "encoder.blocks.{l}.gamma_1"),
            Rule("encoder/blocks/layer_scale_2", "encoder.blocks.{l}.gamma_2"),
            *_norm("encoder/norm", "encoder.norm"),
            Rule("decoder/head/kernel", "decoder.0.weight", _shuffle_conv),
            Rule("decoder/head/bias", "decoder.0.bias", _shuffle_patch),
        ),
        fixed={"encoder.rel_pos_bias.relative_position_index": lambda grid, a: relative_position_index(grid)},
    ),
}


def import_state_dict(family: str, state: Mapping[str, Array], grid: tuple[int, int], check_fixed: bool = True) -> dict:
    """Turns a state dict into our nested parameter tree.

    Args:
      family: a key of FAMILIES.
      state: tensors (or gradients) by the authors' names, as arrays.
      grid: (h, w) patches, for the constants that must agree.
      check_fixed: False for gradients, where constants and unused tensors are absent.

    Returns:
      Nested dict of arrays, ``{"encoder": ..., "decoder": ...}``.

    Raises:
      ConfigError: an unknown family, missing or unused names (all listed), or a constant tensor
        with another value than ours.
    """
    if family not in FAMILIES:
        raise ConfigError(f"unknown model family '{family}'; valid: {', '.join(FAMILIES)}")
    rules, left = FAMILIES[family].rules, dict(state)
    params: dict = {}
    missing = []
    for rule in rules:
        names = _expand(rule.theirs, state)
        absent = [n for n in names if n not in left]
        if absent:
            missing += absent
            continue
        arrays = [rule.layout(np.asarray(left.pop(n))) for n in names]
        _insert(params, rule.ours, np.stack(arrays) if "{l}" in rule.theirs else arrays[0])
    for name in FAMILIES[family].unused:
        left.pop(name, None)
    for name, expected in FAMILIES[family].fixed.items():
        value = left.pop(name, None)
        if check_fixed and value is not None and not np.allclose(value, expected(grid, value), atol=1e-5):
            raise ConfigError(f"{family} weights: the constant '{name}' is not the table of a {grid} grid of patches")
    if missing or left:
        raise ConfigError(
            f"{family} weights do not fit: missing {sorted(missing) or 'none'}; not used {sorted(left) or 'none'}"
        )
    return params


def _expand(template: str, state: Mapping[str, Array]) -> list[str]:
    """All layers' names of a template, 0 .. the highest layer present."""
    if "{l}" not in template:
        return [template]
    stem = re.escape(template.split("{l}")[0])
    layers = [int(m[1]) for name in state if (m := re.match(rf"{stem}(\d+)\.", name))]
    return [template.format(l=i) for i in range(max(layers, default=0) + 1)]


def _insert(tree: dict, path: str, value: Array) -> None:
    *parents, leaf = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[leaf] = value
