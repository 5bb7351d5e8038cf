"""The families of models that we can read: which of our arrays each tensor is, and how to detect a family."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from crate_jax.convert.layouts import (
    CONV,
    LINEAR,
    PATCH_CONV,
    QKV_BIAS,
    QKV_LINEAR,
    SHUFFLE_BIAS,
    SHUFFLE_CONV,
    TABLE,
    Layout,
)
from crate_jax.convert.rules import Constant, Family, Grid, Group, Rule, canonical_name, export_tensors, import_tensors
from crate_jax.errors import ConfigError, some
from crate_jax.models.patches import relative_position_index, sincos_positions

Array = np.ndarray


def _weight(ours: str, theirs: str, layout: Layout = LINEAR) -> tuple[Rule, ...]:
    return (Rule(f"{ours}/kernel", (f"{theirs}.weight",), layout),)


def _dense(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (*_weight(ours, theirs), Rule(f"{ours}/bias", (f"{theirs}.bias",)))


def _norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    return Rule(f"{ours}/scale", (f"{theirs}.weight",)), Rule(f"{ours}/bias", (f"{theirs}.bias",))


def _patch_embedding(theirs: str) -> tuple[Rule, ...]:
    ours = "encoder/embedding/patch_embed"
    return (*_weight(ours, theirs, PATCH_CONV), Rule(f"{ours}/bias", (f"{theirs}.bias",)))


def _cls_token(theirs: str) -> Rule:
    return Rule("encoder/embedding/cls_token", (theirs,))


def _mssa(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{ours}/mssa_norm", f"{theirs}.norm"),
        *_weight(f"{ours}/mssa/subspaces", f"{theirs}.fn.qkv"),
        *_dense(f"{ours}/mssa/output", f"{theirs}.fn.to_out.0"),
    )


def _crate_encoder_block(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        *_mssa(ours, f"{theirs}.0"),
        *_norm(f"{ours}/ista_norm", f"{theirs}.1.norm"),
        *_weight(f"{ours}/dictionary", f"{theirs}.1.fn"),
    )


def _crate_decoder_block(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{ours}/linear_norm", f"{theirs}.0.norm"),
        *_weight(f"{ours}/linear", f"{theirs}.0.fn"),
        *_mssa(ours, f"{theirs}.1"),
    )


def _vit_block(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{ours}/attention_norm", f"{theirs}.norm1"),
        *_weight(f"{ours}/attention/qkv", f"{theirs}.attn.qkv"),
        *_dense(f"{ours}/attention/output", f"{theirs}.attn.proj"),
        *_norm(f"{ours}/mlp_norm", f"{theirs}.norm2"),
        *_dense(f"{ours}/mlp_in", f"{theirs}.mlp.fc1"),
        *_dense(f"{ours}/mlp_out", f"{theirs}.mlp.fc2"),
    )


def _hf_block(ours: str, theirs: str) -> tuple[Rule, ...]:
    qkv = tuple(f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value"))
    return (
        *_norm(f"{ours}/attention_norm", f"{theirs}.layernorm_before"),
        Rule(f"{ours}/attention/qkv/kernel", tuple(f"{part}.weight" for part in qkv), QKV_LINEAR),
        Rule(f"{ours}/attention/qkv/bias", tuple(f"{part}.bias" for part in qkv), QKV_BIAS),
        *_dense(f"{ours}/attention/output", f"{theirs}.attention.output.dense"),
        *_norm(f"{ours}/mlp_norm", f"{theirs}.layernorm_after"),
        *_dense(f"{ours}/mlp_in", f"{theirs}.intermediate.dense"),
        *_dense(f"{ours}/mlp_out", f"{theirs}.output.dense"),
    )


def _qkv_bias(ours: str, theirs: str) -> Rule:
    return Rule(f"{ours}/attention/qkv/bias", (f"{theirs}.attn.qkv.bias",))


def _final_norm(theirs: str) -> Group:
    """The final norm; classifiers that normalise after pooling have ``fc_norm`` in its place."""
    return Group("final norm", _norm("encoder/norm", theirs), replaced_by="fc_norm.")


def _pixel_shuffle_head() -> Group:
    rules = (
        *_weight("decoder/head", "decoder.0", SHUFFLE_CONV),
        Rule("decoder/head/bias", ("decoder.0.bias",), SHUFFLE_BIAS),
    )
    return Group("decoder", rules, optional=True)


def _sincos(grid: Grid, a: Array) -> Array:
    return sincos_positions(grid, a.shape[-1])[None]


def _index(grid: Grid, a: Array) -> Array:
    return relative_position_index(grid).astype(np.int64)


ENCODER_TABLE = Constant("pos_embed", "encoder/embedding/cls_token", _sincos, "the fixed sine-cosine table")
DECODER_TABLE = Constant("decoder_pos_embed", "decoder/mask_token", _sincos, "the fixed sine-cosine table")
CLASSIFIER = {
    r"head\..*": "a classifier's last layer",
    r"fc_norm\..*": "a classifier's norm, after pooling",
}
TOKENS_MORE = {
    r"(reg_token|register_tokens)": "a register, a token besides the class token",
    r"(dist_token|head_dist\..*)": "part of a distilled model (DeiT), with a token besides the class token",
}


def _vit(positions: bool) -> tuple[Group, ...]:
    """A ViT's encoder under timm's names, which MAE uses too."""
    learned = (Rule("encoder/embedding/positions", ("pos_embed",), TABLE),)
    scales = tuple(
        Rule(f"encoder/blocks/layer_scale_{i}", (f"blocks.{{l}}.ls{i}.gamma",)) for i in (1, 2)
    )  # fmt: skip
    return (
        Group("embedding", (*_patch_embedding("patch_embed.proj"), _cls_token("cls_token"))),
        *((Group("learned positions", learned, optional=True),) if positions else ()),
        Group("blocks", _vit_block("encoder/blocks", "blocks.{l}")),
        Group("biases of q, k, v", (_qkv_bias("encoder/blocks", "blocks.{l}"),), optional=True),
        Group("layer scale", scales, optional=True),
        _final_norm("norm"),
    )


HF_TABLE = "vit.embeddings.position_embeddings"
HF_CLASSIFIER = {r"classifier\..*": "a classifier's last layer", r"vit\.pooler\..*": "a classifier's pooling"}
HF_NAMES = (
    # The model without its head; the module names of transformers 5; its save_pretrained's names of the decoder.
    (r"^(embeddings|encoder|layers|layernorm|pooler)\.", r"vit.\1."),
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def _hf_vit(positions: bool) -> tuple[Group, ...]:
    """A ViT's encoder under transformers' names."""
    embedding = _patch_embedding("vit.embeddings.patch_embeddings.projection")
    learned = (Rule("encoder/embedding/positions", (HF_TABLE,), TABLE),)
    return (
        Group("embedding", (*embedding, _cls_token("vit.embeddings.cls_token"))),
        *((Group("learned positions", learned),) if positions else ()),
        Group("blocks", _hf_block("encoder/blocks", "vit.encoder.layer.{l}")),
        Group("final norm", _norm("encoder/norm", "vit.layernorm")),
    )


def _beit(prefix: str, mask_token: bool, decoder: bool) -> Family:
    """BEiT, timm's Beit, and two models on BEiT's code, SimMIM and ROPIM, whose encoders are ``encoder.``."""
    block, blocks = f"{prefix}blocks.{{l}}", "encoder/blocks"
    shared, per_block = f"{prefix}rel_pos_bias.relative_position", f"{block}.attn.relative_position"
    return Family(
        groups=(
            Group("embedding", (*_patch_embedding(f"{prefix}patch_embed.proj"), _cls_token(f"{prefix}cls_token"))),
            Group("mask token", (Rule("encoder/embedding/mask_token", (f"{prefix}mask_token",)),), not mask_token),
            Group("learned positions", (Rule("encoder/embedding/positions", (f"{prefix}pos_embed",), TABLE),), True),
            Group("shared relative bias", (Rule("encoder/relative_bias", (f"{shared}_bias_table",)),), True),
            Group("relative bias per block", (Rule(f"{blocks}/relative_bias", (f"{per_block}_bias_table",)),), True),
            Group("blocks", _vit_block(blocks, block)),
            Group(
                "biases of q and v",
                tuple(Rule(f"{blocks}/attention/{x}_bias", (f"{block}.attn.{x}_bias",)) for x in ("q", "v")),
                optional=True,
            ),
            Group(
                "layer scale",
                tuple(Rule(f"{blocks}/layer_scale_{i}", (f"{block}.gamma_{i}",)) for i in (1, 2)),
                optional=True,
            ),
            _final_norm(f"{prefix}norm"),
            *((_pixel_shuffle_head(),) if decoder else ()),
        ),
        constants=(
            Constant(f"{shared}_index", "encoder/relative_bias", _index, "a constant index"),
            Constant(f"{per_block}_index", f"{blocks}/relative_bias", _index, "a constant index"),
        ),
        unused=CLASSIFIER | {r"lm_head\..*": "predicts BEiT's visual words"},
    )


def _resnet() -> Family:
    """A ResNet of torchvision; the stages are unrolled because their blocks differ in shape."""
    norms = []

    def convolutions(ours: str, theirs: str, numbers: tuple[int, ...]) -> tuple[Rule, ...]:
        return tuple(
            rule
            for n in numbers
            for rule in layer(f"{ours}/conv{n}", f"{ours}/norm{n}", f"{theirs}.conv{n}", f"{theirs}.bn{n}")
        )

    def layer(conv: str, norm: str, their_conv: str, their_norm: str) -> tuple[Rule, ...]:
        norms.append((norm, their_norm))
        statistics = (Rule(f"{norm}/{x}", (f"{their_norm}.{x}",)) for x in ("running_mean", "running_var"))
        return *_weight(conv, their_conv, CONV), *_norm(norm, their_norm), *statistics

    def shortcut(k: int) -> tuple[Rule, ...]:
        ours, theirs = f"encoder/stage{k}/block0/shortcut", f"layer{k}.0.downsample"
        return layer(f"{ours}_conv", f"{ours}_norm", f"{theirs}.0", f"{theirs}.1")

    stages = [(f"encoder/stage{k}/block{{i}}", f"layer{k}.{{i}}") for k in (1, 2, 3, 4)]
    return Family(
        groups=(
            Group("stem", layer("encoder/stem/conv", "encoder/stem/norm", "conv1", "bn1")),
            *(Group(f"stage {k}", convolutions(*stage, (1, 2))) for k, stage in enumerate(stages, 1)),
            Group(
                "third convolutions", tuple(r for stage in stages for r in convolutions(*stage, (3,))), optional=True
            ),
            *(Group(f"shortcut of stage {k}", shortcut(k), optional=True) for k in (1, 2, 3, 4)),
        ),
        constants=tuple(
            Constant(
                f"{theirs}.num_batches_tracked",
                f"{ours}/running_var",
                lambda grid, a: np.zeros((), np.int64),
                "a count of batches (written as 0)",
                checked=False,
            )
            for ours, theirs in norms
        ),
        unused={
            r"(fc|linear)\..*": "a classifier's last layer, or a projector",
            r"(projection_head|prototypes)\..*": "SwAV's projector and prototypes",
        },
        rename=((r"\.shortcut\.", ".downsample."),),
        variants={
            r"conv1\.\d+\..*": "part of a stem of several convolutions (timm's resnet50d and others)",
            r"layer\d\.\d+\.(se|attn)\..*": "a block's attention over channels (SE-ResNet and others)",
            r"attnpool\..*": "an attention pooling (CLIP)",
        },
    )


def _crate_torch() -> Family:
    """CRATE under the names of torch_model/modeling_crate.py: ours, with dots."""

    def layers(
        part: str, norms: Sequence[str] = (), matrices: Sequence[str] = (), dense: Sequence[str] = ()
    ) -> tuple[Rule, ...]:
        theirs = part.replace("/", ".").replace("blocks", "blocks.{l}")
        return tuple(
            rule
            for make, layers in ((_norm, norms), (_weight, matrices), (_dense, dense))
            for layer in layers
            for rule in make(f"{part}/{layer}", f"{theirs}.{layer.replace('/', '.')}")
        )

    embedding, encoder, decoder = "encoder/embedding", "encoder/blocks", "decoder/blocks"
    mask_tokens = (f"{part}.mask_token" for part in ("encoder.embedding", "decoder"))
    crate_decoder = layers(decoder, ["linear_norm", "mssa_norm"], ["linear", "mssa/subspaces"])
    transformer = layers(
        decoder, ["attention_norm", "mlp_norm"], [], ["attention/qkv", "attention/output", "mlp_in", "mlp_out"]
    )
    blocks = (
        *layers(encoder, ["mssa_norm", "ista_norm"], ["mssa/subspaces"]),
        Rule(f"{encoder}/dictionary/kernel", ("encoder.blocks.{l}.ista.dictionary",), LINEAR),
    )
    return Family(
        groups=(
            Group("embedding", (*layers(embedding, dense=["patch_embed"]), _cls_token("encoder.embedding.cls_token"))),
            Group("norms of the embedding", layers(embedding, ["pixel_norm", "token_norm"]), optional=True),
            Group(
                "learned positions", (Rule(f"{embedding}/positions", ("encoder.embedding.positions",), TABLE),), True
            ),
            *(Group(token, (Rule(token.replace(".", "/"), (token,)),), optional=True) for token in mask_tokens),
            Group("blocks", blocks),
            Group("MSSA's output", layers(encoder, dense=["mssa/output"]), optional=True),
            Group("second dictionary", layers(encoder, matrices=["back"]), optional=True),
            Group("final norm", layers("encoder", ["norm"]), optional=True),
            Group("decoder's embedding", layers("decoder", dense=["embed"]), optional=True),
            Group("CRATE decoder", crate_decoder, optional=True),
            Group("MSSA's output in the decoder", layers(decoder, dense=["mssa/output"]), optional=True),
            Group("transformer decoder", transformer, optional=True),
            Group("decoder's norm", layers("decoder", ["norm"]), optional=True),
            Group("decoder's head", layers("decoder", dense=["head"]), optional=True),
        )
    )


FAMILIES: dict[str, Family] = {
    # One encoder and one decoder block of CRATE-MAE, as in the files of reference numbers.
    "crate_blocks": Family(
        groups=(
            Group("encoder", _crate_encoder_block("encoder", "encoder/layers.0")),
            Group("decoder", _crate_decoder_block("decoder", "decoder/layers.0")),
        )
    ),
    "crate_mae": Family(
        groups=(
            Group("embedding", (*_patch_embedding("patch_embed.proj"), _cls_token("cls_token"))),
            Group("mask token", (Rule("encoder/embedding/mask_token", ("mask_token",)),)),
            Group("blocks", _crate_encoder_block("encoder/blocks", "blocks.{l}.layers.0")),
            Group("final norm", _norm("encoder/norm", "norm")),
            Group(
                "decoder",
                (
                    *_crate_decoder_block("decoder/blocks", "decoder_blocks.{l}.layers.0"),
                    *_norm("decoder/norm", "decoder_norm"),
                    *_dense("decoder/head", "decoder_pred"),
                ),
                optional=True,
            ),
        ),
        constants=(
            Constant("decoder_pos_embed", "encoder/embedding/cls_token", _sincos, "the fixed sine-cosine table"),
            Constant(
                "pos_embed",
                "encoder/embedding/cls_token",
                _sincos,
                "a second position table that the forward pass never adds",
                checked=False,
            ),
            Constant(
                "decoder_embed.weight",
                "encoder/norm/bias",
                lambda grid, a: np.zeros((a.size, a.size), a.dtype),
                "created, never called (written as zeros)",
                checked=False,
            ),
            Constant(
                "decoder_embed.bias",
                "encoder/norm/bias",
                lambda grid, a: np.zeros_like(a),
                "created, never called (written as zeros)",
                checked=False,
            ),
        ),
    ),
    "crate": Family(
        groups=(
            Group(
                "embedding",
                (
                    *_norm("encoder/embedding/pixel_norm", "to_patch_embedding.1"),
                    *_dense("encoder/embedding/patch_embed", "to_patch_embedding.2"),
                    *_norm("encoder/embedding/token_norm", "to_patch_embedding.3"),
                    Rule("encoder/embedding/positions", ("pos_embedding",), TABLE),
                    _cls_token("cls_token"),
                ),
            ),
            Group("blocks", _crate_encoder_block("encoder/blocks", "transformer.layers.{l}")),
            Group("final norm", _norm("encoder/norm", "mlp_head.0")),
        ),
        unused={r"mlp_head\.1\..*": "a classifier's last layer"},
    ),
    "vit_mae": Family(
        groups=(
            *_vit(positions=False),
            Group(
                "decoder",
                (
                    *_dense("decoder/embed", "decoder_embed"),
                    Rule("decoder/mask_token", ("mask_token",)),
                    *_vit_block("decoder/blocks", "decoder_blocks.{l}"),
                    _qkv_bias("decoder/blocks", "decoder_blocks.{l}"),
                    *_norm("decoder/norm", "decoder_norm"),
                    *_dense("decoder/head", "decoder_pred"),
                ),
                optional=True,
            ),
        ),
        constants=(ENCODER_TABLE, DECODER_TABLE),
        unused=CLASSIFIER,
    ),
    "timm_vit": Family(
        groups=_vit(positions=True),
        unused=CLASSIFIER | {"mask_token|masked_embed": "stands for masked patches while DINOv2 and iBOT train"},
        rename=(
            (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2 trains blocks in chunks, and numbers them through
            (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT III
        ),
        variants=TOKENS_MORE,
    ),
    "ropim": _beit("encoder.", mask_token=False, decoder=True),
    "simmim": _beit("encoder.", mask_token=True, decoder=True),
    "beit": _beit("", mask_token=False, decoder=False),
    "hf_vit_mae": Family(
        groups=(
            *_hf_vit(positions=False),
            Group(
                "decoder",
                (
                    *_dense("decoder/embed", "decoder.decoder_embed"),
                    Rule("decoder/mask_token", ("decoder.mask_token",)),
                    *_hf_block("decoder/blocks", "decoder.decoder_layers.{l}"),
                    *_norm("decoder/norm", "decoder.decoder_norm"),
                    *_dense("decoder/head", "decoder.decoder_pred"),
                ),
                optional=True,
            ),
        ),
        constants=(
            dataclasses.replace(ENCODER_TABLE, theirs=HF_TABLE),
            dataclasses.replace(DECODER_TABLE, theirs="decoder.decoder_pos_embed"),
        ),
        unused=HF_CLASSIFIER,
        rename=HF_NAMES,
    ),
    "hf_vit": Family(
        groups=_hf_vit(positions=True),
        unused=HF_CLASSIFIER
        | {r"vit\.embeddings\.mask_token|decoder\.0\..*": "part of masked modelling (ViTForMaskedImageModeling)"},
        rename=HF_NAMES,
        variants={
            r"vit\.encoder\.layer\.\d+\.layer_scale\d\..*": "part of transformers' Dinov2Model",
            r"vit\.embeddings\.(register_tokens|distillation_token)": "a token besides the class token",
        },
    ),
    "resnet": _resnet(),
    "crate_torch": _crate_torch(),
}


def family(name: str) -> Family:
    """The family of this name.

    Raises:
      ConfigError: there is no such family.
    """
    if name not in FAMILIES:
        raise ConfigError(f"unknown model family '{name}'; valid: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def import_state_dict(name: str, state: Mapping[str, Array], grid: Grid) -> dict:
    """Turns a state dict into our nested parameter tree.

    Args:
      name: a key of FAMILIES.
      state: tensors (or gradients), as arrays by the authors' names.
      grid: (h, w) patches, to compute the constants with which the state dict's are compared.

    Returns:
      Nested dict of arrays, ``{"encoder": ..., "decoder": ...}``; without decoder if the state dict has none.

    Raises:
      ConfigError: an unknown family, missing or unused names (all listed), or a constant tensor
        with another value than ours.
    """
    return import_tensors(family(name), name, state, grid)


def export_state_dict(name: str, params: Mapping, grid: Grid) -> dict[str, Array]:
    """The inverse of :func:`import_state_dict`; it adds the constants that the authors' code saves.

    Raises:
      ConfigError: an unknown family, or missing or unused arrays (all listed).
    """
    return export_tensors(family(name), name, params, grid)


# (family, a tensor that only this family has among those that follow); the first match counts.
SIGNATURES = (
    ("hf_vit_mae", "vit.embeddings.patch_embeddings.projection.weight"),
    ("crate_mae", "blocks.0.layers.0.0.fn.qkv.weight"),
    ("crate", "transformer.layers.0.0.fn.qkv.weight"),
    ("simmim", "encoder.mask_token"),
    ("ropim", "encoder.blocks.0.attn.qkv.weight"),
    ("beit", "rel_pos_bias.relative_position_bias_table"),
    ("beit", "blocks.0.attn.relative_position_bias_table"),
    ("beit", "blocks.0.attn.q_bias"),
    ("vit_mae", "decoder_blocks.0.attn.qkv.weight"),
    ("resnet", "layer1.0.conv1.weight"),
    ("crate_torch", "encoder.blocks.0.mssa.subspaces.weight"),
)
ENCODER_OF_TIMM = "blocks.0.attn.qkv.weight"


def detect(state: Mapping[str, Array]) -> str:
    """The family of a state dict, found by its names.

    An encoder with a decoder or with the sine-cosine table is `vit_mae` under timm's names, and `hf_vit_mae` under
    transformers'; without them it is `timm_vit` or `hf_vit`.

    Raises:
      ConfigError: the names belong to no known family.
    """
    hf = {canonical_name(FAMILIES["hf_vit_mae"], name): a for name, a in state.items()}
    for name, tensor in SIGNATURES:
        if name == "hf_vit_mae" and tensor in hf:
            return name if "decoder.mask_token" in hf or _is_sincos(hf.get(HF_TABLE)) else "hf_vit"
        if tensor in state:
            return name
    if any(canonical_name(FAMILIES["timm_vit"], name) == ENCODER_OF_TIMM for name in state):
        return "vit_mae" if _is_sincos(state.get("pos_embed")) else "timm_vit"
    raise ConfigError(
        f"not a known model (its {len(state)} tensors are named {some(sorted(state), ', ')}); "
        f"known: {', '.join(name for name in FAMILIES if name != 'crate_blocks')}"
    )


def _is_sincos(table: Array | None) -> bool:
    if table is None or table.ndim != 3 or table.shape[-1] % 4:
        return False
    side = math.isqrt(table.shape[1] - 1)
    if side * side + 1 != table.shape[1]:
        return False
    tolerance = 1e-5 if table.dtype.itemsize > 2 else 1e-2
    return np.allclose(table.astype(np.float64), sincos_positions((side, side), table.shape[-1])[None], atol=tolerance)
