"""Weights go in and out: names, layouts, files, formats, and what is refused."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import report as report_config
from crate_jax.config import base
from crate_jax.convert import (
    FAMILIES,
    __main__ as command,
    detect,
    export_state_dict,
    files,
    import_state_dict,
    pretrained,
    weights,
)
from crate_jax.convert.describe import Hints, config_of, describe, grid_of
from crate_jax.convert.export import export
from crate_jax.errors import CheckpointError, ConfigError
from crate_jax.jobs import report
from crate_jax.models import adopt, autoencoder, representation
from crate_jax.models.corruption import Identity, Masking
from crate_jax.models.patches import relative_position_index, sincos_positions, unpatchify
from crate_jax.parallel.parameters import count, names
from crate_jax.workdir.checkpoint_files import nest
from tests.conftest import ROOT

# --- The names and shapes of published models, written down from their code and not from our rules.

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, in_: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, in_)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, d: int) -> Shapes:
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}


def conv(name: str, d: int, p: int) -> Shapes:
    return {f"{name}.weight": (d, 3, p, p), f"{name}.bias": (d,)}


def timm_block(name: str, d: int, bias: bool = True) -> Shapes:
    return {
        **norm(f"{name}.norm1", d),
        **linear(f"{name}.attn.qkv", 3 * d, d, bias),
        **linear(f"{name}.attn.proj", d, d),
        **norm(f"{name}.norm2", d),
        **linear(f"{name}.mlp.fc1", 4 * d, d),
        **linear(f"{name}.mlp.fc2", d, 4 * d),
    }


def vit(d: int, depth: int, p: int, n: int) -> Shapes:
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + n, d), **conv("patch_embed.proj", d, p), **norm("norm", d)}
    for layer in range(depth):
        shapes |= timm_block(f"blocks.{layer}", d)
    return shapes


def mae(d: int, depth: int, p: int, n: int, decoder: int = 512, decoder_depth: int = 8) -> Shapes:
    shapes = vit(d, depth, p, n) | linear("decoder_embed", decoder, d) | norm("decoder_norm", decoder)
    shapes |= {"mask_token": (1, 1, decoder), "decoder_pos_embed": (1, 1 + n, decoder)}
    shapes |= linear("decoder_pred", 3 * p * p, decoder)
    for layer in range(decoder_depth):
        shapes |= timm_block(f"decoder_blocks.{layer}", decoder)
    return shapes


def beit(d: int, depth: int, p: int, heads: int, rows: int, shared: bool, prefix: str = "", side: int = 0) -> Shapes:
    shapes = {"cls_token": (1, 1, d), **conv("patch_embed.proj", d, p), **norm("norm", d)}
    tables = ["rel_pos_bias"] if shared else [f"blocks.{layer}.attn" for layer in range(depth)]
    for table in tables:
        shapes |= {f"{table}.relative_position_bias_table": (rows, heads)}
        shapes |= {f"{table}.relative_position_index": (side * side + 1,) * 2} if side else {}
    for layer in range(depth):
        block = f"blocks.{layer}"
        shapes |= timm_block(block, d, bias=False)
        shapes |= {f"{block}.attn.q_bias": (d,), f"{block}.attn.v_bias": (d,)}
        shapes |= {f"{block}.gamma_1": (d,), f"{block}.gamma_2": (d,)}
    return {prefix + name: shape for name, shape in shapes.items()}


def ropim(d: int, depth: int, p: int, heads: int, side: int, mask_token: bool = False) -> Shapes:
    shapes = beit(d, depth, p, heads, (2 * side - 1) ** 2 + 3, True, "encoder.", side)
    shapes |= {"encoder.mask_token": (1, 1, d)} if mask_token else {}
    return shapes | {"decoder.0.weight": (3 * p * p, d, 1, 1), "decoder.0.bias": (3 * p * p,)}


def mssa(name: str, d: int) -> Shapes:
    return {
        **norm(f"{name}.norm", d),
        **linear(f"{name}.fn.qkv", d, d, bias=False),
        **linear(f"{name}.fn.to_out.0", d, d),
    }


def crate(d: int, depth: int, p: int, n: int, classes: int = 1000) -> Shapes:
    P = 3 * p * p
    shapes = {"pos_embedding": (1, 1 + n, d), "cls_token": (1, 1, d)}
    shapes |= norm("to_patch_embedding.1", P) | linear("to_patch_embedding.2", d, P) | norm("to_patch_embedding.3", d)
    for layer in range(depth):
        block = f"transformer.layers.{layer}"
        shapes |= mssa(f"{block}.0", d) | norm(f"{block}.1.norm", d) | {f"{block}.1.fn.weight": (d, d)}
    return shapes | norm("mlp_head.0", d) | linear("mlp_head.1", classes, d)


def crate_mae(d: int, depth: int, p: int, n: int) -> Shapes:
    shapes = {"cls_token": (1, 1, d), "mask_token": (1, 1, d), "pos_embed": (1, 1 + n, d)}
    shapes |= {"decoder_pos_embed": (1, 1 + n, d), **conv("patch_embed.proj", d, p), **norm("norm", d)}
    for layer in range(depth):
        first, second = f"blocks.{layer}.layers.0", f"decoder_blocks.{layer}.layers.0"
        shapes |= mssa(f"{first}.0", d) | norm(f"{first}.1.norm", d) | {f"{first}.1.fn.weight": (d, d)}
        shapes |= norm(f"{second}.0.norm", d) | {f"{second}.0.fn.weight": (d, d)} | mssa(f"{second}.1", d)
    return shapes | linear("decoder_embed", d, d) | norm("decoder_norm", d) | linear("decoder_pred", 3 * p * p, d)


def crate_torch(d: int, depth: int, p: int, n: int, atoms: int = 0, tied: bool = False) -> Shapes:
    """modeling_crate.py's, with learned positions; with `atoms` over-complete and without a decoder."""

    def mssa(name: str) -> Shapes:
        shapes = norm(f"{name}.mssa_norm", d) | linear(f"{name}.mssa.subspaces", d, d, bias=False)
        return shapes | ({} if tied else linear(f"{name}.mssa.output", d, d))

    shapes = {"encoder.embedding.cls_token": (1, 1, d), "encoder.embedding.positions": (1, 1 + n, d)}
    shapes |= linear("encoder.embedding.patch_embed", d, 3 * p * p) | norm("encoder.norm", d)
    for layer in range(depth):
        block = f"encoder.blocks.{layer}"
        shapes |= mssa(block) | norm(f"{block}.ista_norm", d) | {f"{block}.ista.dictionary": (d, atoms or d)}
        shapes |= linear(f"{block}.back", d, atoms, bias=False) if atoms else {}
    if atoms:
        return shapes
    shapes |= {"encoder.embedding.mask_token": (1, 1, d)} | norm("decoder.norm", d)
    for layer in range(2):
        block = f"decoder.blocks.{layer}"
        shapes |= norm(f"{block}.linear_norm", d) | linear(f"{block}.linear", d, d, bias=False) | mssa(block)
    return shapes | linear("decoder.head", 3 * p * p, d)


def hf_block(name: str, d: int) -> Shapes:
    shapes = norm(f"{name}.layernorm_before", d) | norm(f"{name}.layernorm_after", d)
    for part in ("query", "key", "value"):
        shapes |= linear(f"{name}.attention.attention.{part}", d, d)
    shapes |= linear(f"{name}.attention.output.dense", d, d) | linear(f"{name}.intermediate.dense", 4 * d, d)
    return shapes | linear(f"{name}.output.dense", d, 4 * d)


def hf(d: int, depth: int, p: int, n: int, decoder: int = 512, decoder_depth: int = 8) -> Shapes:
    shapes = {"vit.embeddings.cls_token": (1, 1, d), "vit.embeddings.position_embeddings": (1, 1 + n, d)}
    shapes |= conv("vit.embeddings.patch_embeddings.projection", d, p) | norm("vit.layernorm", d)
    for layer in range(depth):
        shapes |= hf_block(f"vit.encoder.layer.{layer}", d)
    for layer in range(decoder_depth):
        shapes |= hf_block(f"decoder.decoder_layers.{layer}", decoder)
    shapes |= {"decoder.mask_token": (1, 1, decoder), "decoder.decoder_pos_embed": (1, 1 + n, decoder)}
    shapes |= linear("decoder.decoder_embed", decoder, d) | linear("decoder.decoder_pred", 3 * p * p, decoder)
    return shapes | norm("decoder.decoder_norm", decoder)


def batch_norm(name: str, d: int) -> Shapes:
    return norm(name, d) | {
        f"{name}.running_mean": (d,),
        f"{name}.running_var": (d,),
        f"{name}.num_batches_tracked": (),
    }


def resnet(blocks: tuple[int, ...], width: int, factor: int = 1, inner: int = 1, side: int = 7) -> Shapes:
    """torchvision's, without fc; `factor` 4: bottlenecks, `inner` times as wide inside."""
    shapes = {"conv1.weight": (width, 3, side, side), **batch_norm("bn1", width)}
    before = width
    for stage, depth in enumerate(blocks):
        d = width * 2**stage * inner
        after = width * 2**stage * factor
        for i in range(depth):
            block = f"layer{stage + 1}.{i}"
            sides = {1: 1, 2: 3, 3: 1} if factor > 1 else {1: 3, 2: 3}
            ins, outs = {1: before, 2: d, 3: d}, {1: d, 2: d, 3: after}
            for n, k in sides.items():
                shapes |= {f"{block}.conv{n}.weight": (outs[n], ins[n], k, k), **batch_norm(f"{block}.bn{n}", outs[n])}
            if i == 0 and (stage > 0 or before != after):
                shapes |= {f"{block}.downsample.0.weight": (after, before, 1, 1)}
                shapes |= batch_norm(f"{block}.downsample.1", after)
            before = after
    return shapes


LEARNED = ("timm_vit", "crate", "hf_vit")  # families whose position table is a parameter


def filled(family: str, shapes: Shapes, fill) -> dict[str, np.ndarray]:
    """A state dict of these shapes: constants as the authors' code makes them, all else from `fill`."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith("relative_position_index"):
            side = int((shape[0] - 1) ** 0.5)
            state[name] = relative_position_index((side, side)).astype(np.int64)
        elif ("pos_embed" in name or "position_embeddings" in name) and family not in LEARNED:
            side = int((shape[1] - 1) ** 0.5)
            state[name] = sincos_positions((side, side), shape[2])[None]
        elif name.startswith("decoder_embed.") and family == "crate_mae":
            state[name] = np.zeros(shape, np.float32)
        elif name.endswith("num_batches_tracked"):
            state[name] = np.zeros(shape, np.int64)
        else:
            state[name] = fill(shape)
    return state


def random_state(family: str, shapes: Shapes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return filled(family, shapes, lambda shape: rng.standard_normal(shape, np.float32))


TINY = {  # family and kind -> names and shapes of a small model; 16 px images, 4 x 4 patches of 4 px
    "vit_mae": mae(8, 3, 4, 16, decoder=4, decoder_depth=2),
    "vit_mae encoder": vit(8, 3, 4, 16),
    "timm_vit": vit(8, 3, 4, 16),
    "timm_vit layer scale": vit(8, 2, 4, 16) | {f"blocks.{i}.ls{j}.gamma": (8,) for i in (0, 1) for j in (1, 2)},
    "ropim": ropim(8, 3, 4, 2, 4),
    "simmim": ropim(8, 3, 4, 2, 4, mask_token=True),
    "beit shared": beit(8, 2, 4, 2, 52, True, side=4),
    "beit per block": beit(8, 2, 4, 2, 52, False, side=4),
    "crate": {n: s for n, s in crate(8, 3, 4, 16).items() if not n.startswith("mlp_head.1")},
    "crate_mae": crate_mae(8, 3, 4, 16),
    "hf_vit_mae": hf(8, 3, 4, 16, decoder=4, decoder_depth=2),
    "hf_vit": {n: s for n, s in hf(8, 3, 4, 16).items() if n.startswith("vit.")},
    "crate_torch": crate_torch(8, 3, 4, 16),
    "crate_torch over-complete, tied": crate_torch(8, 2, 4, 16, atoms=24, tied=True),
    "resnet": resnet((2, 2, 2, 2), 4),
    "resnet bottleneck": resnet((3, 4, 6, 3), 2, factor=4, inner=2),
}
HEADS = Hints(heads=2, decoder_heads=2)


def tiny(kind: str) -> tuple[str, dict[str, np.ndarray]]:
    family = kind.split()[0]
    return family, random_state(family, TINY[kind])


def imported(kind: str) -> tuple[dict, dict]:
    """(config, parameters) of a tiny model."""
    family, state = tiny(kind)
    return describe(family, state, HEADS).to_dict(), import_state_dict(family, state, (4, 4))


@pytest.mark.parametrize("kind", TINY)
def test_there_and_back_are_the_same_bits(kind):
    family, state = tiny(kind)
    assert detect(state) == family
    params = import_state_dict(family, state, (4, 4))
    back = export_state_dict(family, params, (4, 4))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
        assert back[name].dtype == tensor.dtype
    again = names(import_state_dict(family, back, (4, 4)))
    for name, array in names(params).items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_every_family_is_tested_there_and_back():
    assert {kind.split()[0] for kind in TINY} == FAMILIES.keys() - {"crate_blocks"}


@pytest.mark.one_python
@pytest.mark.parametrize("kind", TINY)
def test_the_described_model_has_these_parameters(kind):
    c, params = imported(kind)
    weights.require_fit(c, params)  # names and shapes
    flat = names(params)
    bias = next(n for n, a in flat.items() if n.endswith("bias") and a.ndim == 1)
    with pytest.raises(ConfigError, match=rf"{bias}: \[9\], not \[{flat[bias].size}\]"):
        weights.require_fit(c, nest({**flat, bias: np.zeros(9)}))


PUBLISHED = [  # family, names and shapes, trained parameters, heads
    *(("crate", crate(d, 12, 16, 196), None, h) for d, h in ((384, 6), (576, 12), (768, 12))),
    ("crate", crate(1024, 24, 16, 196), None, 16),
    ("crate_mae", crate_mae(576, 12, 16, 196), 24_846_528, 12),
    ("crate_mae", crate_mae(768, 12, 16, 196), 43_745_280, 12),
    ("vit_mae", mae(768, 12, 16, 196), 111_655_680, 12),
    ("vit_mae", vit(768, 12, 16, 196), 85_647_360, 12),
    ("vit_mae", mae(1024, 24, 16, 196), 329_239_296, 16),
    pytest.param("vit_mae", mae(1280, 32, 14, 256), 656_613_964, 16, marks=pytest.mark.slow),
    *(("ropim", ropim(d, 12, 16, h, 14), None, h) for d, h in ((192, 3), (384, 6), (768, 12))),
    ("simmim", ropim(768, 12, 16, 12, 14, mask_token=True), None, 12),
    ("beit", beit(768, 12, 16, 12, 732, False, side=14), None, 12),
    ("timm_vit", vit(768, 12, 16, 196) | linear("head", 1000, 768), None, 12),
    ("hf_vit_mae", hf(768, 12, 16, 196), 111_655_680, 12),
    ("hf_vit", {n: s for n, s in hf(768, 12, 16, 196).items() if n.startswith("vit.")}, 85_798_656, 12),
]  # fmt: skip


@pytest.mark.one_python
@pytest.mark.parametrize(("family", "shapes", "trained", "heads"), PUBLISHED)
def test_published_models_fit(family, shapes, trained, heads):
    """Each array of our model is there, in its shape, and no other: numbers of one byte that are all one."""
    state = filled(family, shapes, lambda shape: np.broadcast_to(np.int8(1), shape))
    assert detect(state) == family
    grid = grid_of(family, state, None)
    params = import_state_dict(family, state, grid)
    c = config_of(family, params, grid, Hints())
    assert c.data.image_size == (224, 224)
    assert c.encoder.heads == heads
    weights.require_fit(c.to_dict(), params)
    init = autoencoder.init_params if "decoder" in params else representation.init_params
    expected = jax.eval_shape(lambda: init(c, jax.random.key(0)))
    mask_token = 0 if "decoder" in params else params["encoder"]["embedding"].pop("mask_token", np.zeros(0)).size
    assert count(params) == count(expected)
    if trained is not None:
        assert count(params) + mask_token == trained


def test_a_classifier_gives_its_encoder():
    """Fine-tuned MAE has `fc_norm` in place of the norm; head and fc_norm are named as not needed."""
    state = random_state("vit_mae", vit(8, 2, 4, 16) | norm("fc_norm", 8) | linear("head", 5, 8))
    del state["norm.weight"], state["norm.bias"]
    found = weights.match(FAMILIES["vit_mae"], list(state))
    assert found.absent == ("biases of q, k, v", "layer scale", "final norm", "decoder")[1:]
    assert {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"} <= found.ignored.keys()
    c = describe("vit_mae", state, HEADS)
    assert not c.encoder.final_norm
    weights.require_fit(c.to_dict(), import_state_dict("vit_mae", state, (4, 4)))
    del state["fc_norm.weight"], state["fc_norm.bias"]
    with pytest.raises(ConfigError, match=r"missing norm.bias, norm.weight"):
        import_state_dict("vit_mae", state, (4, 4))


def test_other_names_of_transformers_are_the_same_model():
    """ViTMAEModel alone; transformers 5's modules; what its save_pretrained calls the decoder's layers."""
    family, state = tiny("hf_vit_mae")
    expected = names(import_state_dict(family, state, (4, 4)))
    new = {
        name.replace("encoder.layer.", "layers.")
        .replace("decoder_layers.", "decoder_encoder.layer.")
        .replace("attention.attention.query", "attention.q_proj")
        .replace("attention.output.dense", "attention.o_proj")
        .replace("intermediate.dense", "mlp.fc1"): a
        for name, a in state.items()
    }
    assert not {n for n in new if "q_proj" in n} & state.keys()
    for other in (new, {n.removeprefix("vit."): a for n, a in state.items() if n.startswith("vit.")}):
        assert detect(other) == family
        for name, array in names(import_state_dict(family, other, (4, 4))).items():
            np.testing.assert_array_equal(array, expected[name])


def test_a_table_without_a_row_for_the_class_token_gets_one_of_zeros(tmp_path):
    """Timm's no_embed_class; DeiT III's own names; BEiT's; and images that are not square, if their size is given."""
    for kind in ("timm_vit layer scale", "hf_vit", "crate"):
        family, state = tiny(kind)
        (table,) = (name for name in state if re.search("pos_?embed|position_embed", name))
        state[table] = state[table][:, 1:]
        if "ls1" in " ".join(state):
            state = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): a for name, a in state.items()}
        files.write(tmp_path / "x.safetensors", state, {})
        loaded = weights.load(tmp_path / "x.safetensors", hints=HEADS)
        expected = names(imported(kind)[1])
        expected["encoder/embedding/positions"][0] = 0
        assert loaded.family == family and list(loaded.config["data"]["image_size"]) == [16, 16]
        for name, array in names(loaded.params).items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
        state[table] = state[table][:, :8]
        files.write(tmp_path / "x.safetensors", state, {})
        with pytest.raises(CheckpointError, match="position table of 7 rows is not that of a square; .*--image-size"):
            weights.load(tmp_path / "x.safetensors", hints=HEADS)
        wide = weights.load(tmp_path / "x.safetensors", hints=Hints(heads=2, image_size=(8, 16)))
        np.testing.assert_array_equal(wide.params["encoder"]["embedding"]["positions"][1:], state[table][0])


def test_a_vit_of_transformers_is_a_vit(tmp_path):
    """The same as under timm's names; config.json says heads and image size, preprocessor_config.json the pixels'."""
    family, state = tiny("hf_vit")
    files.write(tmp_path / "model.safetensors", state | random_state(family, linear("classifier", 5, 8)), {})
    about = {"model_type": "vit", "num_attention_heads": 4, "image_size": 16, "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(about))
    pixels = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.1, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    loaded = weights.load(tmp_path / "model.safetensors")
    c = loaded.config
    assert (c["encoder"]["heads"], c["encoder"]["positions"], c["data"]["mean"]) == (4, "learned", (0.5, 0.4, 0.3))
    theirs = {"vit.embeddings.cls_token": "cls_token", "vit.embeddings.position_embeddings": "pos_embed"}
    theirs |= {f"vit.layernorm.{x}": f"norm.{x}" for x in ("weight", "bias")}
    theirs |= {f"vit.embeddings.patch_embeddings.projection.{x}": f"patch_embed.proj.{x}" for x in ("weight", "bias")}
    parts = {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention.output.dense": "attn.proj"}
    parts |= {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
    for i in range(3):
        old, new = f"vit.encoder.layer.{i}", f"blocks.{i}"
        for x in ("weight", "bias"):
            theirs |= {f"{old}.{a}.{x}": f"{new}.{b}.{x}" for a, b in parts.items()}
            qkv = [state.pop(f"{old}.attention.attention.{part}.{x}") for part in ("query", "key", "value")]
            state[f"{new}.attn.qkv.{x}"] = np.concatenate(qkv)
    timm = {theirs.get(name, name): a for name, a in state.items()}
    for name, array in names(import_state_dict("timm_vit", timm, (4, 4))).items():
        np.testing.assert_array_equal(names(loaded.params)[name], array, err_msg=name)


def test_a_table_of_another_shape_is_named():
    family, state = tiny("timm_vit")
    state["pos_embed"] = state["pos_embed"][0]
    with pytest.raises(
        ConfigError, match=r"'pos_embed' has the shape \[17, 8\]; expected a table .*\(1, rows, width\)"
    ):
        describe(family, state, HEADS)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("vit_small_patch16_rope_224", True),
        ("vit_base_patch16_rope_ape_224", True),
        ("eva02_enormous_patch14_clip_224", True),
        ("eva_large_patch14_196", False),
        ("vit_base_patch16_224", False),
    ],
)
def test_a_vit_of_timm_that_computes_what_no_tensor_shows_is_refused(tmp_path, name, refused):
    """Rotary positions, and norms after attention and MLP: only the name in config.json says so."""
    files.write(tmp_path / "model.safetensors", random_state("timm_vit", vit(8, 2, 4, 16)), {"format": "pt"})
    about = {"architecture": name, "model_args": {"num_heads": 2}, "pretrained_cfg": {"input_size": [3, 16, 16]}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    if refused:
        with pytest.raises(CheckpointError, match=f"model.safetensors: .* timm's {name}, whose rotary positions or"):
            weights.load(tmp_path / "model.safetensors")
    else:
        assert weights.load(tmp_path / "model.safetensors").config["encoder"]["heads"] == 2


def test_tokens_besides_the_class_token_are_named():
    for kind, tensor, words in (
        ("timm_vit", "reg_token", "a register"),
        ("timm_vit", "dist_token", "a distilled model"),
        ("hf_vit", "vit.encoder.layer.0.layer_scale1.lambda1", "Dinov2Model"),
    ):
        family, state = tiny(kind)
        with pytest.raises(ConfigError, match=f"'{tensor}' is .*{words}.*, which is not supported"):
            import_state_dict(family, state | {tensor: np.ones(8, np.float32)}, (4, 4))


def test_what_does_not_fit_is_named():
    family, state = tiny("simmim")
    both = state | {f"encoder.blocks.{i}.attn.relative_position_bias_table": np.ones((52, 2)) for i in range(3)}
    with pytest.raises(ConfigError, match="both relative and relative_per_block positions"):
        describe(family, both)
    del both["encoder.blocks.1.attn.relative_position_bias_table"]
    with pytest.raises(ConfigError, match=r"missing encoder.blocks.1.attn.relative_position_bias_table"):
        import_state_dict(family, both, (4, 4))
    family, state = tiny("vit_mae")
    with pytest.raises(ConfigError, match="no published encoder has the width 8.*--heads"):
        describe(family, state)
    with pytest.raises(ConfigError, match="no published decoder has the width 4.*--decoder-heads"):
        describe(family, state, Hints(heads=2))
    with pytest.raises(ConfigError, match="3 heads do not divide the encoder's width 8"):
        describe(family, state, Hints(heads=3))
    with pytest.raises(ConfigError, match=r"does not fit images of \[32, 16\]"):
        describe(family, state, Hints(image_size=(32, 16)))
    with pytest.raises(ConfigError, match="not a multiple of the patch size 4"):
        describe(family, state, Hints(image_size=(18, 16)))
    with pytest.raises(ConfigError, match="not the table of a"):
        describe(family, state, Hints(heads=2, decoder_heads=2, image_size=(32, 8)))  # as many patches
    with pytest.raises(ConfigError, match=r"not used encoder/relative_bias"):
        export_state_dict(
            "vit_mae", {"encoder": imported("vit_mae")[1]["encoder"] | {"relative_bias": np.ones(3)}}, (4, 4)
        )
    with pytest.raises(ConfigError, match="unknown model family 'gpt'; valid: crate_blocks, crate_mae"):
        import_state_dict("gpt", state, (4, 4))


# --- The supervised CRATE's embedding, which no reference file covers.


@pytest.mark.one_python
def test_supervised_crate_computes_what_its_code_does():
    """Norms around the patch projection, learned positions, lambda 0.1, last norm with eps 1e-5."""
    family, state = tiny("crate")
    state = {n: a * 0.3 for n, a in state.items()}
    c = describe(family, state, HEADS)
    assert (c.encoder.lam, c.encoder.embed_norm, c.encoder.final_eps) == (0.1, True, 1e-5)
    images = np.random.default_rng(1).random((2, 16, 16, 3), np.float32)
    params, model = import_state_dict(family, state, (4, 4)), autoencoder.build(c)
    ours = jax.jit(lambda params: model.apply({"params": params}, images, Identity(), method="encode"))(params)

    def ln(x, name):
        centred = x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return y * state[f"{name}.weight"] + state[f"{name}.bias"]

    def affine(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = images.reshape(2, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 48)
    x = ln(affine(ln(x, "to_patch_embedding.1"), "to_patch_embedding.2"), "to_patch_embedding.3")
    x = np.concatenate([np.repeat(state["cls_token"], 2, 0), x], 1) + state["pos_embedding"]
    for layer in range(3):
        block = f"transformer.layers.{layer}"
        w = (ln(x, f"{block}.0.norm") @ state[f"{block}.0.fn.qkv.weight"].T).reshape(2, 17, 2, 4).transpose(0, 2, 1, 3)
        logits = np.exp(w @ w.swapaxes(-1, -2) / 2)
        y = (logits / logits.sum(-1, keepdims=True) @ w).transpose(0, 2, 1, 3).reshape(2, 17, 8)
        x = x + affine(y, f"{block}.0.fn.to_out.0")
        y, D = ln(x, f"{block}.1.norm"), state[f"{block}.1.fn.weight"]
        x = np.maximum(y + 0.1 * ((y - y @ D.T) @ D) - 0.1 * 0.1, 0)
    np.testing.assert_allclose(ours, ln(x, "mlp_head.0"), atol=2e-5)


# --- Files. A PyTorch checkpoint made without PyTorch: the opcodes that torch.save writes, protocol 2.


class Pickled:
    """Writes the pickle of dictionaries, texts, numbers and tensors; `storages` are the bytes it points at."""

    BY_PYTHON = (collections.Counter, collections.deque, datetime.datetime, datetime.timedelta, types.SimpleNamespace)
    TYPES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}

    def __init__(self, legacy: bool = False) -> None:
        self.storages: dict[str, np.ndarray] = {}
        self.legacy = legacy

    def dumps(self, obj) -> bytes:
        return b"\x80\x02" + self._item(obj) + b"."

    def _item(self, obj) -> bytes:
        if isinstance(obj, self.BY_PYTHON):
            return pickle.dumps(obj, protocol=2)[2:-1]  # without the protocol and the end: a value of any pickle
        if isinstance(obj, dict):
            return b"}(" + b"".join(self._item(k) + self._item(v) for k, v in obj.items()) + b"u"
        if isinstance(obj, bool) or obj is None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[obj]
        if isinstance(obj, str):
            return b"X" + struct.pack("<I", len(obj)) + obj.encode()
        if isinstance(obj, int):
            return b"J" + struct.pack("<i", obj)
        if isinstance(obj, float):
            return b"G" + struct.pack(">d", obj)
        if isinstance(obj, tuple):
            return b"(" + b"".join(map(self._item, obj)) + b"t"
        if isinstance(obj, np.ndarray):
            return self._tensor(obj)
        raise TypeError(obj)

    def _tensor(self, array: np.ndarray) -> bytes:
        """A view two elements into its storage, with the array's strides."""
        key, flat = str(len(self.storages)), np.concatenate([np.zeros(2, array.dtype), array.ravel(order="K")])
        self.storages[key] = flat
        kind = b"ctorch\n" + self.TYPES[str(array.dtype)].encode() + b"\n"
        view = b"N" if self.legacy else b""
        storage = b"(" + self._item("storage") + kind + self._item(key) + self._item("cpu") + self._item(len(flat))
        strides = tuple(s // array.itemsize for s in array.strides)
        arguments = storage + view + b"tQ" + self._item(2) + self._item(array.shape) + self._item(strides)
        hooks = b"ccollections\nOrderedDict\n)R"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + self._item(False) + hooks + b"tR"


def write_zip(path: Path, obj, data_pkl: bytes | None = None) -> Path:
    pickled = Pickled()
    body = pickled.dumps(obj) if data_pkl is None else data_pkl
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/byteorder", "little")
        for key, flat in pickled.storages.items():
            archive.writestr(f"archive/data/{key}", flat.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def write_legacy(path: Path, obj) -> Path:
    pickled = Pickled(legacy=True)
    body = pickled.dumps(obj)
    sizes = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with path.open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, sizes):
            pickle.dump(part, file, protocol=2)
        file.write(body)
        pickle.dump(list(pickled.storages), file, protocol=2)
        for flat in pickled.storages.values():
            file.write(struct.pack("<q", len(flat)) + flat.tobytes())
    return path


def arrays() -> dict[str, np.ndarray]:
    a = np.random.default_rng(0).standard_normal((3, 4), np.float32)
    return {
        "a": a,
        "transposed": np.asfortranarray(a),
        "half": a.astype(np.float16),
        "brain": a.astype(jnp.bfloat16),
        "count": np.arange(5),
        "scalar": np.array(2.5, np.float32),
    }


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("nested", [(), ("model",), ("state_dict", "model")])
def test_checkpoints_of_pytorch_are_read_without_it(tmp_path, write, nested):
    tree = {f"module.{n}": a for n, a in arrays().items()}
    for key in reversed(nested):
        tree = {"epoch": 3, key: tree, "optimizer": {"lr": 0.1}}
    read, about = files.read(write(tmp_path / "weights.pth.tar", tree))
    assert about["nested"] == list(nested)
    assert about["prefix"] == "module."
    assert read.keys() == arrays().keys()
    for name, array in arrays().items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype


@pytest.mark.parametrize(
    "kept",
    [
        collections.Counter([30, 30, 80]),  # the milestones of MultiStepLR
        collections.deque([2.5, 1.5], maxlen=7),
        datetime.datetime(2026, 3, 1, 12, 7),
        datetime.timedelta(days=3, seconds=5),
        types.SimpleNamespace(lr=0.3),
    ],
)
def test_objects_of_the_standard_library_are_skipped(tmp_path, kept):
    """A training script keeps them beside its weights."""
    saved = {"kept": kept, "model": arrays()}
    read, about = files.read(write_zip(tmp_path / "weights.pth", saved))
    assert about["nested"] == ["model"]
    np.testing.assert_array_equal(read["a"], arrays()["a"])


def test_safetensors_are_read_with_bfloat16(tmp_path):
    import safetensors.numpy

    plain = {n: a for n, a in arrays().items() if n not in ("brain", "transposed")}
    safetensors.numpy.save_file(plain, tmp_path / "a.safetensors", {"note": "text"})
    read, about = files.read(tmp_path / "a.safetensors")
    assert about["metadata"] == {"note": "text"}
    for name, array in plain.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype
    brain = arrays()["brain"]
    header = json.dumps({"brain": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]}}).encode()
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + brain.tobytes())
    np.testing.assert_array_equal(files.read(tmp_path / "b.safetensors")[0]["brain"], brain)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            import os

            return os.system, (f"touch {tmp_path}/ran",)

    evil = pickle.dumps({"model": Evil()}, protocol=2)
    write_zip(tmp_path / "evil.pth", None, evil)
    legacy = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(part, legacy, protocol=2)
    (tmp_path / "evil_legacy.pth").write_bytes(legacy.getvalue() + evil)
    (tmp_path / "evil.pkl").write_bytes(evil)
    for name in ("evil.pth", "evil_legacy.pth", "evil.pkl"):
        with pytest.raises(CheckpointError, match=rf"{name}: refused: its pickle asks for '\w+.system'") as e:
            files.read(tmp_path / name)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "ran").exists()
    for text in (b"cbuiltins\neval\n", b"ctorch\nload\n", b"cnumpy\nload\n", b"ctorch.storage\n_load_from_bytes\n"):
        write_zip(tmp_path / "evil.pth", None, b"\x80\x02" + text + b"(tR.")
        with pytest.raises(CheckpointError, match="asks for"):
            files.read(tmp_path / "evil.pth")


def test_frequent_wrong_files_get_advice(tmp_path):
    """A whole model in either format of PyTorch, and the text that Git LFS leaves in place of a file."""
    model = b"\x80\x02ctorchvision.models.resnet\nResNet\n)\x81}b."
    write_zip(tmp_path / "model.pth", None, model)
    (tmp_path / "model.pkl").write_bytes(model)
    for name in ("model.pth", "model.pkl"):
        with pytest.raises(
            CheckpointError, match=r"asks for 'torchvision.models.resnet.ResNet', .*model.state_dict\(\)"
        ):
            files.read(tmp_path / name)
    write_zip(tmp_path / "evil.pth", None, b"\x80\x02cbuiltins\neval\n(tR.")
    with pytest.raises(CheckpointError, match="asks for 'builtins.eval', which weights do not need$"):
        files.read(tmp_path / "evil.pth")
    (tmp_path / "lfs.pth").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n")
    with pytest.raises(CheckpointError, match="lfs.pth: a pointer of Git LFS, not the weights; `git lfs pull`"):
        files.read(tmp_path / "lfs.pth")


def test_a_number_in_a_pickle_takes_no_memory(tmp_path):
    """An empty dictionary remembered as number 2^32 - 16: an array of that many places would not fit."""
    write_zip(tmp_path / "a.pth", None, b"\x80\x02}r\xf0\xff\xff\xff.")
    with pytest.raises(CheckpointError, match="no weights found, it has nothing"):
        files.read(tmp_path / "a.pth")


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path):
    for tensor, message in (((100,), "reaches to element 101 of a storage of 14"), ((-1,), "negative")):
        pickled = Pickled()
        body = pickled.dumps({"a": arrays()["a"]})
        view = pickled._item((3, 4)) + pickled._item((4, 1))
        assert view in body
        with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
            archive.writestr("a/data.pkl", body.replace(view, pickled._item(tensor) + pickled._item((1,))))
            archive.writestr("a/data/0", pickled.storages["0"].tobytes())
        with pytest.raises(CheckpointError, match=message):
            files.read(tmp_path / "a.pth")


def test_a_storage_has_the_length_it_says(tmp_path):
    pickled = Pickled()
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", pickled.dumps({"a": arrays()["a"]}))
        archive.writestr("a/data/0", pickled.storages["0"].tobytes() + bytes(4))
    with pytest.raises(CheckpointError, match="storage 0 has 60 bytes, not 56"):
        files.read(tmp_path / "a.pth")


def test_damaged_and_foreign_files_are_one_line(tmp_path):
    """Cut at every tenth: never a traceback, never wrong numbers."""
    state = {n: a for n, a in arrays().items() if n != "transposed"}
    whole = [
        write_zip(tmp_path / "zip.pth", state),
        write_legacy(tmp_path / "legacy.pth", state),
        tmp_path / "weights.safetensors",
    ]
    files.write(whole[2], {"a": state["a"]}, {})
    for path in whole:
        content = path.read_bytes()
        for share in range(10):
            cut = tmp_path / f"cut_{path.name}"
            cut.write_bytes(content[: len(content) * share // 10])
            with pytest.raises(CheckpointError, match=f"cut_{path.name}: ") as e:
                files.read(cut)
            assert "\n" not in str(e.value)
    flipped = bytearray(whole[0].read_bytes())
    flipped[flipped.index(state["a"].tobytes()) + 3] ^= 1
    (tmp_path / "flipped.pth").write_bytes(flipped)
    with pytest.raises(CheckpointError, match="flipped.pth: damaged.*CRC"):
        files.read(tmp_path / "flipped.pth")
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>not found</html>")
    (tmp_path / "list.pth").write_bytes(pickle.dumps([1, 2], protocol=2))
    write_zip(tmp_path / "other.pth", {"epoch": 3, "best": 0.5})
    for name, message in (
        ("a.npz", "no data.pkl"),
        ("page.pth", "begins with b'<!DOCTYPE"),
        ("list.pth", "a pickle, but not a PyTorch checkpoint"),
        ("other.pth", "no weights found, it has epoch, best"),
        ("none.pth", "cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: .*{message}"):
            files.read(tmp_path / name)


def test_a_checkpoint_of_another_model_is_one_line(tmp_path, capsys):
    vgg = {"features.0.weight": np.ones((64, 3, 3, 3), np.float32), "features.0.bias": np.ones(64, np.float32)}
    path = write_zip(tmp_path / "vgg16.pth", {"state_dict": vgg})
    with pytest.raises(CheckpointError, match=r"vgg16.pth: not a known model.*features.0.bias") as e:
        pretrained.load(str(path), "config.checkpoint")
    assert "\n" not in str(e.value)
    assert command.main(["inspect", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


# --- Through files and commands.


@pytest.mark.one_python
def test_a_command_whose_output_is_closed_fails_in_one_line(tmp_path, cli_env):
    """As after `>&-`; the file of the weights must not get the stream's number."""
    path = write_zip(tmp_path / "a.pth", random_state("timm_vit", vit(192, 1, 4, 16)))
    flags = "--mean=0.5,0.5,0.5 --std=0.5,0.5,0.5"  # without a warning
    script = f"exec {sys.executable} -m crate_jax.convert inspect {path} {flags} >&-"
    done = subprocess.run(["sh", "-c", script], cwd=ROOT, env=cli_env, timeout=200, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: the output cannot be written (Bad file descriptor)\n")


def mae_file(path: Path, **more) -> Path:
    return write_zip(path, {"model": random_state("vit_mae", TINY["vit_mae"]), **more})


def test_import_inspect_load_and_start_from_a_file(tmp_path, capsys):
    path, out = mae_file(tmp_path / "mae.pth"), tmp_path / "ours.safetensors"
    with pytest.raises(CheckpointError, match="mae.pth: the number of heads"):
        pretrained.load(str(path), "config.checkpoint")
    flags = ["--heads=2", "--decoder-heads=1", "--target=patch_normalised", "--mean=0.5,0.5,0.5", "--std=0.5,0.5,0.5"]
    assert command.main(["inspect", str(path), *flags[:2]]) == 0
    shown = capsys.readouterr().out
    assert "zip, under 'model', 74 tensors" in shown
    assert "not needed: decoder_pos_embed, pos_embed (the fixed sine-cosine table)" in shown
    assert command.main(["import", str(path), f"--out={out}", *flags]) == 0
    ours = pretrained.load(str(out), "config.checkpoint")
    expected = names(import_state_dict("vit_mae", random_state("vit_mae", TINY["vit_mae"]), (4, 4)))
    assert names(ours.params).keys() == expected.keys()
    for name, array in names(ours.params).items():
        np.testing.assert_array_equal(array, expected[name])
    c = weights.model_config(ours.config, ours.params)
    assert (c.encoder.heads, c.decoder.heads, c.loss.target, c.data.mean) == (2, 1, "patch_normalised", (0.5,) * 3)
    shapes = jax.eval_shape(lambda: autoencoder.init_params(c, jax.random.key(0)))
    fresh = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    started = adopt.init_encoder(
        fresh, ours.params, "config.init_from=ours.safetensors", (2, 2), ours=(2, 2)
    )  # as pretrain does
    for name, array in names(started["encoder"]).items():
        np.testing.assert_array_equal(array, expected[f"encoder/{name}"])


def test_a_folder_of_weights_is_taken_where_a_checkpoint_is_asked_for(tmp_path, capsys):
    """That of an export, of transformers and of timm, or with one file; not one that holds checkpoints of a run."""
    c, params = imported("vit_mae")
    for format in ("timm", "hf", "authors"):
        out = tmp_path / format
        export(c, params, format, out)
        (out / "optimizer.pt").write_bytes(b"not weights")
        encoder = pretrained.load(str(out), "config.init_from")
        assert encoder.name == str(out) and encoder.config["encoder"]["heads"] == 2
        for name, array in names({"encoder": encoder.params["encoder"]}).items():
            np.testing.assert_array_equal(array, names(params)[name])
        assert command.main(["inspect", str(out)]) == 0
        assert f"{out / 'model.safetensors'}: safetensors" in capsys.readouterr().out
    assert command.main(["import", str(out), f"--out={tmp_path / 'again.safetensors'}"]) == 0
    assert command.main(["export", str(out), "--format=timm", f"--out={tmp_path / 'third'}"]) == 0
    capsys.readouterr()
    one = tmp_path / "one"
    one.mkdir()
    write_zip(one / "checkpoint-199.pth", {"model": random_state("vit_mae", TINY["vit_mae encoder"])})
    (one / "log.txt").write_text("")
    assert weights.load(one, hints=HEADS).family == "vit_mae"
    (one / "checkpoint-99.pth").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"one: holds several files of weights, checkpoint-199.pth, checkpoint-99"
    ):
        weights.load(one)
    write_zip(one / "pytorch_model.bin", random_state("hf_vit", TINY["hf_vit"]))
    assert weights.load(one, hints=HEADS).family == "hf_vit"
    (one / "pytorch_model.bin").rename(one / "pytorch_model.bin.index.json")
    with pytest.raises(CheckpointError, match=r"split into several files \(pytorch_model.bin.index.json\)"):
        weights.load(one)
    (tmp_path / "timm" / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint; expected the workdir of a run"):
        pretrained.load(str(tmp_path / "timm"), "config.checkpoint")
    c = report_config.get_config()
    c.checkpoint = str(tmp_path / "hf")
    with pytest.raises(ConfigError, match="--workdir is missing"):  # a report does not go into a folder of weights
        report.run(c, None)


def test_a_scripts_arguments_are_used(tmp_path):
    """MAE's checkpoints hold an argparse.Namespace."""
    body = Pickled()
    state = body._item({"model": random_state("vit_mae", TINY["vit_mae"])})
    args = b"cargparse\nNamespace\n)\x81" + body._item({"norm_pix_loss": True, "mask_ratio": 0.5}) + b"b"
    with zipfile.ZipFile(tmp_path / "mae.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + state + b"(" + body._item("args") + args + b"u.")
        for key, flat in body.storages.items():
            archive.writestr(f"a/data/{key}", flat.tobytes())
    loaded = weights.load(tmp_path / "mae.pth", hints=HEADS)
    assert loaded.config["loss"]["target"] == "patch_normalised"
    assert loaded.config["corruption"]["mask_ratio"] == 0.5


def test_flags_and_metadata_that_are_wrong(tmp_path, capsys):
    path = mae_file(tmp_path / "mae.pth")
    for flag, message in (
        ("--image-size=16x16x3", "must be a number of pixels, or HEIGHTxWIDTH"),
        ("--image-size=²", "must be a number of pixels, or HEIGHTxWIDTH"),  # a digit to str.isdigit only
        ("--mean=1,2", "must be three numbers"),
        ("--mean=1,2,1e999", "must be three numbers"),
        ("--std=0,1,1", "must be three numbers"),
        ("--family=gpt", "unknown model family 'gpt'"),
        ("--prefix=backbone.", "--prefix=backbone.: no tensor's name begins with it; the parts are blocks., cls_token"),
        ("--family=crate", "missing"),
    ):
        assert (
            command.main(["import", str(path), f"--out={tmp_path / 'x'}", "--heads=2", "--decoder-heads=2", flag]) == 2
        )
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    later = {"crate_jax": json.dumps({"version": 2, "family": "crate_jax", "config": {}})}
    files.write(tmp_path / "later.safetensors", {"a": np.ones(3, np.float32)}, later)
    with pytest.raises(CheckpointError, match="later.safetensors: written by a later version"):
        weights.load(tmp_path / "later.safetensors")


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("encoder", "heads", 0, "config.encoder.heads=0"),
        ("encoder", "width", "wide", "its config is damaged"),
        ("encoder", "name", "resnet", "must be one of crate, vit"),
        ("encoder", "patch_size", 0, "config.encoder.patch_size=0"),
        ("data", "image_size", (), "config.data.image_size"),
        ("", "encoder", 3, "its config is damaged"),
        ("", "", {}, "its config is damaged"),
    ],
)
def test_a_config_of_no_model_in_a_file_of_ours_is_one_line(tmp_path, section, key, value, words):
    config = json.loads(json.dumps(base().to_dict()))
    (config[section] if section else config)[key] = value
    for family in ("crate_jax", "vit_mae"):
        text = {"version": 1, "family": family, "config": config if key else value}
        files.write(tmp_path / "x.safetensors", {"a": np.ones(3, np.float32)}, {"crate_jax": json.dumps(text)})
        with pytest.raises(CheckpointError, match=words):
            weights.load(tmp_path / "x.safetensors")


EXPORTS = [  # kind, format, family of the names, parts that come back
    ("vit_mae", "timm", "vit_mae", ("encoder",)),
    ("timm_vit layer scale", "timm", "timm_vit", ("encoder",)),
    ("ropim", "timm", "beit", ("encoder",)),
    ("simmim", "timm", "beit", ("encoder",)),
    ("beit per block", "timm", "beit", ("encoder",)),
    ("vit_mae", "hf", "hf_vit_mae", ("encoder", "decoder")),
    ("vit_mae encoder", "hf", "hf_vit_mae", ("encoder",)),
    ("vit_mae", "authors", "vit_mae", ("encoder", "decoder")),
    ("crate_mae", "authors", "crate_mae", ("encoder", "decoder")),
    ("crate", "authors", "crate", ("encoder",)),
    ("crate_mae", "torch", "crate_torch", ("encoder", "decoder")),
    ("crate", "torch", "crate_torch", ("encoder",)),
    ("ropim", "authors", "ropim", ("encoder", "decoder")),
    ("simmim", "authors", "simmim", ("encoder", "decoder")),
    ("resnet", "torchvision", "resnet", ("encoder",)),
]


@pytest.mark.one_python
@pytest.mark.parametrize(("kind", "format", "family", "parts"), EXPORTS)
def test_an_export_comes_back_the_same(tmp_path, kind, format, family, parts):
    c, params = imported(kind)
    c["data"]["mean"], c["loss"]["target"] = (0.5, 0.4, 0.3), "patch_normalised"
    c["data"]["source"], c["init_from"] = "folder:someone/images", "someone/weights.pth"
    weights.save(tmp_path / "ours.safetensors", c, params)
    out = tmp_path / "out"
    assert command.main(["export", str(tmp_path / "ours.safetensors"), f"--format={format}", f"--out={out}"]) == 0
    assert b"someone" not in (out / "model.safetensors").read_bytes()  # it will be published
    back = weights.load(out / "model.safetensors")
    assert back.family == family
    assert tuple(sorted(back.params, reverse=True)) == parts
    expected = names(params)
    for name, array in names(back.params).items():
        np.testing.assert_array_equal(array, expected[name])
    assert list(back.config["data"]["mean"]) == [0.5, 0.4, 0.3]
    assert back.config["loss"]["target"] == "patch_normalised"
    left = {n for n in expected.keys() - names(back.params).keys() if not n.startswith("decoder/")}
    assert left <= {"encoder/embedding/mask_token"}


def test_only_results_of_the_same_command_are_replaced(tmp_path, capsys):
    """Not what is read, under any of its names; not a file that is somebody else's; a repetition of a command works."""

    def refused(*words: str) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert command.main(list(words)) == 2
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return capsys.readouterr().err

    theirs = random_state("vit_mae", TINY["vit_mae"])
    pth = write_zip(tmp_path / "mae.pth", {"model": theirs})
    own, notes = tmp_path / "own", tmp_path / "notes.txt"
    notes.write_text("mine")
    os.link(pth, tmp_path / "other_name")
    flags = ["--heads=2", "--decoder-heads=2"]
    for out in (pth, tmp_path / "other_name"):
        assert f"error: {out}: is the file that is read; choose another --out" in refused(
            "import", str(pth), f"--out={out}", *flags
        )
    line = "exists, and is not the result of an import; remove it, or choose another --out"
    assert f"error: {notes}: {line}" in refused("import", str(pth), f"--out={notes}", *flags)
    for _ in "12":
        assert command.main(["import", str(pth), f"--out={own / 'model.safetensors'}", *flags]) == 0
    for source in (own, own / "model.safetensors"):
        for format in ("timm", "authors"):
            assert "is the file that is read" in refused("export", str(source), f"--format={format}", f"--out={own}")
    line = "exists, and is not the result of an export; remove it, or choose another --out"
    for _ in "12":
        assert command.main(["export", str(own), "--format=authors", f"--out={tmp_path / 'exported'}"]) == 0
    for folder in ("foreign", "settings", "copy"):
        (tmp_path / folder).mkdir()
    files.write(tmp_path / "foreign" / "model.safetensors", theirs, {"format": "pt"})
    (tmp_path / "settings" / "config.json").write_text('{"mine": 3}')
    shutil.copy(own / "model.safetensors", tmp_path / "copy")
    for folder, format in (("foreign", "authors"), ("settings", "hf"), ("copy", "authors")):
        assert line in refused("export", str(own), f"--format={format}", f"--out={tmp_path / folder}")
    exported = tmp_path / "exported" / "model.safetensors"
    assert "not the result of an import" in refused("import", str(pth), f"--out={exported}", *flags)


@pytest.mark.parametrize("format", ["ours", "authors"])
def test_flags_come_before_what_a_file_says(tmp_path, capsys, format):
    c, params = imported("crate_mae")
    path, out = tmp_path / "ours.safetensors", tmp_path / "out.safetensors"
    weights.save(path, c, params)
    if format != "ours":
        export(c, params, format, tmp_path / "theirs")
        path = tmp_path / "theirs" / "model.safetensors"
    given = ["--lam=5", "--mean=0.1,0.2,0.3", "--std=1,2,3", "--heads=4", "--target=patch_normalised"]
    assert command.main(["import", str(path), f"--out={out}", *given]) == 0
    back = weights.load(out)
    assert (back.config["encoder"]["lam"], back.config["data"]["mean"]) == (5, [0.1, 0.2, 0.3])
    assert (back.config["data"]["std"], back.config["loss"]["target"]) == ([1, 2, 3], "patch_normalised")
    assert (back.config["encoder"]["heads"], back.config["decoder"]["heads"]) == (4, 4)
    assert back.config["encoder"]["width"] == c["encoder"]["width"]
    capsys.readouterr()
    wrong = {
        "--lam=nan": "config.encoder.lam=nan: must be a finite number",
        "--heads=-3": "config.encoder.heads=-3: must be greater than 0",
        "--stem-padding=1": "--stem-padding=1: its model has no 3 x 3 stem of a ResNet; leave the flag out",
        "--image-size=9": "must be multiples of config.encoder.patch_size",
    }
    if format == "ours":
        wrong["--family=vit_mae"] = "--family=vit_mae: its names are our own, crate_jax; leave the flag out"
        wrong["--prefix=a."] = "--prefix=a.: its names are our own, crate_jax; leave the flag out"
    for flag, message in wrong.items():
        assert command.main(["import", str(path), f"--out={tmp_path / 'none'}", flag]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("kind", "flags", "line"),
    [
        ("timm_vit", ["--heads=0"], "0 heads do not divide the encoder's width 8"),
        ("timm_vit", ["--heads=2", "--lam=0.3"], "--lam=0.3: its model has no lambda: its encoder is vit, not crate"),
        ("timm_vit", ["--heads=2", "--lam=nan"], "--lam=nan: its model has no lambda"),
        ("timm_vit", ["--heads=2", "--stem-padding=1"], "--stem-padding=1: its model has no 3 x 3 stem of a ResNet"),
        ("timm_vit", ["--heads=2", "--decoder-heads=2"], "--decoder-heads=2: its model has no decoder with heads"),
        ("vit_mae", ["--heads=2", "--decoder-heads=0"], "0 heads do not divide the decoder's width 4"),
        ("beit shared", ["--heads=4"], "the weights do not fit together: encoder/relative_bias: [52, 2], not [52, 4]"),
        ("resnet", ["--heads=2"], "--heads=2: its model has no heads: its encoder is a ResNet"),
    ],
)
def test_a_flag_that_does_not_fit_a_foreign_file_is_one_line(tmp_path, capsys, kind, flags, line):
    path = write_zip(tmp_path / "x.pth", tiny(kind)[1])
    for command_of in (["inspect", str(path)], ["import", str(path), f"--out={tmp_path / 'out'}"]):
        assert command.main([*command_of, *flags]) == 2
        assert f"error: {path}: {line}" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_files_beside_say_heads_and_preprocessing(tmp_path):
    """A config.json of transformers or timm is read where the tensors come without our metadata."""
    c, params = imported("vit_mae")
    c["data"]["mean"], c["loss"]["target"] = (0.5, 0.4, 0.3), "patch_normalised"
    c["data"]["interpolation"], c["data"]["eval_crop"] = "bilinear", 0.9
    for format in ("hf", "timm"):
        made = export(c, params, format, tmp_path / format)
        files.write(tmp_path / format / "model.safetensors", made.state, {"format": "pt"})
        back = weights.load(tmp_path / format / "model.safetensors").config
        assert (back["encoder"]["heads"], back["data"]["mean"]) == (2, (0.5, 0.4, 0.3))
        assert back["data"]["interpolation"] == "bilinear"
        assert back["data"]["eval_crop"] == (0.9 if format == "timm" else 0.875)  # transformers has no such crop
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert about["norm_pix_loss"] is True
    assert about["decoder_num_attention_heads"] == 2
    about = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert about["pretrained_cfg"]["mean"] == [0.5, 0.4, 0.3]
    assert about["pretrained_cfg"]["input_size"] == [3, 16, 16]


@pytest.mark.parametrize("kind", TINY)
def test_statistics_that_nobody_gave_are_a_warning_where_models_differ(tmp_path, caplog, kind):
    """A ViT of timm may have 0.5 or ImageNet's, and no tensor shows it."""
    flags = Hints(heads=2, decoder_heads=1, stem_padding=1)
    path = write_zip(tmp_path / "w.pth", random_state(kind.split()[0], TINY[kind]))
    loaded = weights.load(path, hints=flags)
    assert loaded.config["data"]["std"] == (0.229, 0.224, 0.225)
    unsure = loaded.family in ("timm_vit", "beit", "hf_vit")
    assert len(caplog.messages) == unsure
    if unsure:
        assert caplog.messages[0].startswith(f"{path}: neither a flag nor a file says what mean and std its images had")
        assert "--mean=0.5,0.5,0.5 --std=0.5,0.5,0.5" in caplog.text and "--config.data.std" in caplog.text
        weights.load(path, hints=dataclasses.replace(flags, mean=(0.5,) * 3))
        assert len(caplog.messages) == 2  # not of the deviation, which counts more
    weights.load(path, hints=dataclasses.replace(flags, mean=(0.5,) * 3, std=(0.5,) * 3))
    weights.save(tmp_path / "ours.safetensors", loaded.config, loaded.params)
    weights.load(tmp_path / "ours.safetensors")
    about = {"architecture": "vit", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    if not loaded.family.startswith(("resnet", "crate")):
        assert weights.load(path, hints=flags).config["data"]["std"] == (0.5,) * 3
    assert len(caplog.messages) == 2 * unsure


@pytest.mark.parametrize(
    ("kind", "pool", "layer", "theirs", "left_out"),
    [
        ("vit_mae encoder", "cls", 0, ("token", None), ()),
        ("vit_mae encoder", "mean", 0, ("avg", False), ()),
        (
            "vit_mae encoder",
            "cls_mean",
            2,
            ("token", None),
            ("pool=cls_mean; timm's", "config.evaluation.layer=2; timm's"),
        ),
        ("beit shared", "mean", 0, ("token", None), ("pool=mean; timm's model takes the class token",)),
    ],
)
def test_the_pooling_of_a_run_goes_to_timm_or_is_named(tmp_path, kind, pool, layer, theirs, left_out):
    """Timm's ViT without fc_norm takes the mean of normalised tokens; its Beit normalises the mean."""
    c, params = imported(kind)
    c["evaluation"].update(pool=pool, layer=layer)
    made = export(c, params, "timm", tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    assert (about["model_args"]["global_pool"], about["model_args"].get("fc_norm")) == theirs
    assert about["global_pool"] == theirs[0] and len(made.left_out) == len(left_out)
    assert all(part in text for part, text in zip(left_out, made.left_out, strict=True))


REFUSED = [  # kind, changes to the config, format, message
    ("crate_mae", {}, "timm", "timm has no crate encoder"),
    ("crate_mae", {}, "hf", "ViTMAE has no crate encoder"),
    ("simmim", {}, "hf", "only config.encoder.positions='sincos'"),
    ("vit_mae", {"corruption.mask_fill": "token"}, "hf", "mask_fill='token' does not"),
    ("timm_vit", {}, "hf", "only config.encoder.positions='sincos', not 'learned'"),
    ("vit_mae", {"data.image_size": (32, 8)}, "hf", "square images"),
    ("ropim", {"encoder.qkv_bias": "qkv"}, "timm", "no key bias"),
    ("crate_mae", {"decoder.residual": "normalised"}, "authors", "only config.decoder.residual='stream'"),
    ("crate_mae", {"encoder.tied_output": True}, "authors", "only config.encoder.tied_output=False"),
    ("resnet", {}, "timm", "only config.encoder.stem='imagenet' and stage_width=64, not 'imagenet' and 4"),
    ("resnet", {"encoder.stem": "cifar", "encoder.stage_width": 64}, "timm", "not 'cifar' and 64"),
    ("resnet", {}, "hf", "ViTMAE has no resnet18; --format=torchvision or timm"),
    ("resnet", {}, "authors", "resnet18 use torchvision's names; --format=torchvision"),
    ("resnet", {}, "torch", "writes only crate, not resnet18; --format=torchvision or timm writes it"),
    ("vit_mae", {}, "torch", "writes only crate, not vit; --format=timm or hf writes it"),
    ("crate_mae", {}, "torchvision", "writes only resnet18, .*, not crate"),
    ("vit_mae", {}, "onnx", "must be one of timm, hf, torchvision, torch, authors"),
]


@pytest.mark.parametrize(("kind", "changes", "format", "message"), REFUSED)
def test_what_a_format_cannot_hold_is_one_line(tmp_path, kind, changes, format, message):
    c, params = imported(kind)
    for key, value in changes.items():
        section, name = key.split(".")
        c[section][name] = value
    with pytest.raises(ConfigError, match=message) as e:
        export(c, params, format, tmp_path / "out")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


# --- Against the libraries themselves, where they are installed.


def encode(c: dict, params: dict, images_BHWC: np.ndarray) -> np.ndarray:
    """Tokens after the final norm."""
    model = autoencoder.build(weights.model_config(c, params))
    return np.asarray(model.apply({"params": params}, jnp.asarray(images_BHWC), Identity(), method="encode"))


def shaken(torch, model):
    """The model with random biases, norms and tokens too, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "pos" not in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("new", [True, False])
def test_torch_saves_what_we_read(tmp_path, new):
    torch = pytest.importorskip("torch")
    whole = torch.randn(6, 5)
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()
    state |= {"view": whole[1:4, ::2], "turned": whole.T, "half": whole.half(), "brain": whole.bfloat16()}
    state |= {"parameter": torch.nn.Parameter(whole[0]), "same storage": whole[2], "empty": torch.zeros(0, 3)}
    saved = {"model": state, "optimizer": {"state": {0: {"exp_avg": whole}}}, "epoch": 3, "lr": np.float64(0.1)}
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    read, about = files.read(tmp_path / "a.pth")
    assert about["format"] == ("zip" if new else "legacy")
    expected = torch.load(tmp_path / "a.pth", weights_only=False)["model"]
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(read[name].astype(np.float32), tensor.detach().float().numpy(), err_msg=name)


TIMM = {
    "learned": ("VisionTransformer", {"num_heads": 1, "embed_dim": 64}),
    "layer scale": ("VisionTransformer", {"num_heads": 2, "embed_dim": 64, "init_values": 0.1}),
    "no bias": ("VisionTransformer", {"num_heads": 2, "embed_dim": 64, "qkv_bias": False, "mlp_ratio": 2.0}),
    "shared": ("Beit", {"num_heads": 2, "use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "init_values": 0.1}),
    "per block": ("Beit", {"num_heads": 2, "use_abs_pos_emb": False, "use_rel_pos_bias": True}),
}


@pytest.mark.parametrize("kind", TIMM)
def test_timm_computes_the_same_before_and_after(tmp_path, kind):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    from timm.models import beit as timm_beit, vision_transformer

    name, options = TIMM[kind]
    cls = getattr(vision_transformer if name == "VisionTransformer" else timm_beit, name)
    options = {"embed_dim": 64, "depth": 2, "img_size": 32, "patch_size": 4, "num_classes": 0} | options
    model = shaken(torch, cls(**options, global_pool="token"))
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    loaded = weights.load(tmp_path / "timm.pth", hints=Hints(heads=options["num_heads"]))
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        theirs = model.forward_features(pixels).numpy()
    np.testing.assert_allclose(encode(loaded.config, loaded.params, images), theirs, atol=1e-4)

    export(loaded.config, loaded.params, "timm", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    again = timm.create_model(
        about["architecture"], num_classes=0, checkpoint_path=str(tmp_path / "out" / "model.safetensors"),
        **about["model_args"],
    ).eval()  # fmt: skip
    from_folder = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        np.testing.assert_allclose(again.forward_features(pixels).numpy(), theirs, atol=1e-5)
        np.testing.assert_allclose(from_folder.forward_features(pixels).numpy(), theirs, atol=1e-5)
    assert tuple(timm.data.resolve_model_data_config(from_folder)["input_size"]) == (3, 32, 32)


def test_timm_computes_what_our_mae_encoder_does(tmp_path):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    c, params = imported("vit_mae")
    params = jax.tree.map(lambda a: a * 0.2, params)
    export(c, params, "timm", tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
    with torch.no_grad():
        theirs = model.forward_features(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(encode(c, params, images), theirs, atol=1e-4)


def test_timm_pools_as_the_run_does(tmp_path):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    c, params = imported("vit_mae encoder")
    params = jax.tree.map(lambda a: a * 0.2, params)
    c["evaluation"]["pool"] = "mean"
    export(c, params, "timm", tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    ours = representation.build(weights.model_config(c, params))(params, jnp.asarray(images))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_transformers_computes_the_same_before_and_after(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    sizes |= {f"decoder_{k}": v for k, v in sizes.items()} | {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1}
    model = shaken(
        torch,
        transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(**sizes, image_size=32, patch_size=8, norm_pix_loss=True, layer_norm_eps=1e-6)
        ),
    )
    with torch.no_grad():  # a new model of transformers 5.23 has zeros there; published ones have MAE's tables
        model.vit.embeddings.position_embeddings.copy_(torch.from_numpy(sincos_positions((4, 4), 64).copy()))
        model.decoder.decoder_pos_embed.copy_(torch.from_numpy(sincos_positions((4, 4), 32).copy()))
    # The decoder's MLP is 4 times its width here, as in MAE.
    assert model.config.decoder_intermediate_size == 4 * model.config.decoder_hidden_size
    model.save_pretrained(tmp_path / "theirs")
    loaded = weights.load(tmp_path / "theirs" / "model.safetensors")
    assert loaded.config["loss"]["target"] == "patch_normalised"
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    noise = np.random.default_rng(1).random((2, 16), np.float32)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        theirs = model(pixels, noise=torch.from_numpy(noise)).logits.numpy()
    corruption = Masking.from_noise(jnp.asarray(noise), 4, drop=True)
    model_of_theirs = autoencoder.build(weights.model_config(loaded.config, loaded.params))
    ours = model_of_theirs.apply({"params": loaded.params}, jnp.asarray(images), corruption)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)

    export(loaded.config, loaded.params, "hf", tmp_path / "ours")
    again, about = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(about[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        np.testing.assert_allclose(again.eval()(pixels, noise=torch.from_numpy(noise)).logits, theirs, atol=1e-5)
    assert again.config.norm_pix_loss
    encoder = {"encoder": loaded.params["encoder"]}
    export(loaded.config, encoder, "hf", tmp_path / "encoder")
    _, about = transformers.ViTMAEModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not any(about[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_pixels_of_a_pixel_shuffle_head_land_where_torch_puts_them(tmp_path):
    torch = pytest.importorskip("torch")
    _, params = imported("ropim")
    state = export_state_dict("ropim", params, (4, 4))
    tokens = np.random.default_rng(0).standard_normal((2, 16, 8), np.float32)
    grid = torch.from_numpy(tokens.transpose(0, 2, 1).reshape(2, 8, 4, 4).copy())
    head = [torch.from_numpy(np.ascontiguousarray(state[f"decoder.0.{x}"])) for x in ("weight", "bias")]
    theirs = torch.nn.functional.pixel_shuffle(torch.nn.functional.conv2d(grid, *head), 4).numpy()
    ours = tokens @ params["decoder"]["head"]["kernel"] + params["decoder"]["head"]["bias"]
    np.testing.assert_allclose(unpatchify(jnp.asarray(ours), (16, 16), 4).transpose(0, 3, 1, 2), theirs, atol=1e-5)


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_a_file_of_weights_has_the_mode_of_any_new_file(umask, tmp_path):
    """As the files beside it, so that others in a group can read an export."""
    before = os.umask(umask)
    try:
        files.write(tmp_path / "x.safetensors", {"a": np.ones(3, np.float32)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
