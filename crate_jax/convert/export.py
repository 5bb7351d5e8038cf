"""Weights for other libraries: timm, transformers, the authors' own code, and CRATE as one file for PyTorch.

Each format is a folder with ``model.safetensors`` and the files that the library reads beside it. If a format
cannot hold a model, `export` raises and writes nothing. Only whole parts for which the format has no place (a decoder,
a mask token, a classifier's head) are left out, and the summary names them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

from crate_jax.config import base
from crate_jax.convert import files, torch_crate
from crate_jax.convert.beside import RESAMPLING
from crate_jax.convert.families import export_state_dict
from crate_jax.convert.rules import Array
from crate_jax.convert.weights import MASK_TOKENS, metadata, model_config, require_replaceable
from crate_jax.errors import ConfigError
from crate_jax.models.patches import grid_shape, sincos_positions
from crate_jax.models.resnet import ARCHITECTURES
from crate_jax.parallel.parameters import names
from crate_jax.workdir.folder import expanduser, require_no_run
from crate_jax.workdir.metrics import write_json, write_text


@dataclasses.dataclass(frozen=True)
class Export:
    """The content of an exported folder.

    Attributes:
      family: the family of the tensors' names.
      state: tensors by name.
      json_files: further files, name -> content.
      left_out: parts of the model for which the format has no place.
      copied: files of ours that are copied into the folder.
    """

    family: str
    state: dict[str, Array]
    json_files: dict[str, Any]
    left_out: tuple[str, ...]
    copied: tuple[Path, ...] = ()


def export(
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    format: str,
    out: str | os.PathLike[str],
    source: str | os.PathLike[str] = "",
) -> Export:
    """Writes a model to a folder in another library's format; returns the folder's content.

    Args:
      config: the model's config, as a dictionary.
      params: nested dictionaries with ``encoder`` and perhaps ``decoder``.
      format: a key of FORMATS.
      out: the folder, which is made if it is missing. The files of an earlier export without config.json are replaced.
      source: the file, folder or workdir that the model was read from; '': none.

    Raises:
      ConfigError: the format cannot hold this model, or a file would be replaced that no export has written.
      UserError: the folder cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format={format}: must be one of {', '.join(FORMATS)}")
    model = model_config(config, params)
    if model.data.channels != 3:
        raise ConfigError(
            f"--format={format}: takes images of 3 channels, not config.data.channels={model.data.channels}"
        )
    if not os.fspath(out):
        raise ConfigError("--out is empty: it must name the folder of the export")
    folder = expanduser(out)
    require_no_run(folder, "an export")
    made = FORMATS[format](model, params)
    config = _without_paths(config)
    others = [folder / name for name in (*made.json_files, *(path.name for path in made.copied))]
    require_replaceable(folder / "model.safetensors", source, True, others)
    files.write(folder / "model.safetensors", made.state, {"format": "pt", **metadata(made.family, config)})
    for name, content in made.json_files.items():
        write_json(folder / name, content)
    for path in made.copied:
        write_text(folder / path.name, path.read_text("utf-8"))
    return made


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without paths and names of the user's machine, because exports are often published."""
    empty: dict[str, Any] = {"init_from": "", "checkpoint": ""}
    config = {**config, **{key: value for key, value in empty.items() if key in config}}
    config["data"] = {**config["data"], "source": base().data.source, "data_dir": ""}
    if "log" in config:
        config["log"] = {**config["log"], "wandb": ""}
    return config


def _grid(c: ConfigDict) -> tuple[int, int]:
    return grid_shape(c.data.image_size, c.encoder.patch_size)


def _only(params: Mapping[str, Any], *parts: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The chosen parts, and the names of the other ones."""
    return {k: v for k, v in params.items() if k in parts}, tuple(k for k in params if k not in parts)


def _require(section: ConfigDict, name: str, needed: Mapping[str, Any], target: str) -> None:
    for key, right in needed.items():
        if section[key] != right:
            raise ConfigError(f"{target} supports only config.{name}.{key}={right!r}, not {section[key]!r}")


def _require_vit(c: ConfigDict, library: str) -> None:
    if c.encoder.name in ARCHITECTURES:
        raise ConfigError(f"{library} has no {c.encoder.name}; --format=torchvision or timm writes it")
    if c.encoder.name != "vit":
        raise ConfigError(
            f"{library} has no {c.encoder.name} encoder; --format=torch writes it with its PyTorch code, "
            "--format=authors under the names of its authors' code"
        )
    if c.encoder.embed_norm:
        raise ConfigError(f"{library} has no norms around the patch embedding (config.encoder.embed_norm)")


def to_timm(c: ConfigDict, params: Mapping[str, Any]) -> Export:
    """The encoder as timm's ResNet, VisionTransformer, or Beit if it has relative positions or biases of q and v only.

    Raises:
      ConfigError: timm has no such encoder.
    """
    if c.encoder.name in ARCHITECTURES:
        return _to_timm_resnet(c, params)
    _require_vit(c, "timm")
    params, left_out = _only(params, "encoder")
    beit = c.encoder.positions.startswith("relative") or c.encoder.qkv_bias == "qv"
    params, dropped = _without_mask_token(params)
    left_out += dropped
    grid = _grid(c)
    # timm's Beit normalises the mean; an encoder here takes the mean of normalised tokens, as the ViT without fc_norm.
    mean = c.evaluation.pool == "mean" and not beit
    if c.evaluation.pool != ("mean" if mean else "cls"):
        left_out += (f"pooling, config.evaluation.pool={c.evaluation.pool}; timm's model takes the class token",)
    if c.evaluation.layer:
        left_out += (f"config.evaluation.layer={c.evaluation.layer}; timm's model takes the output",)
    args: dict[str, Any] = {
        "img_size": list(c.data.image_size),
        "patch_size": c.encoder.patch_size,
        "embed_dim": c.encoder.width,
        "depth": c.encoder.depth,
        "num_heads": c.encoder.heads,
        "mlp_ratio": c.encoder.mlp_ratio,
        "init_values": c.encoder.layer_scale,  # 0: no scale; timm would replace None by its own default
        "global_pool": "avg" if mean else "token",
    }
    if c.encoder.final_norm and c.encoder.final_eps != 1e-6:
        raise ConfigError(f"timm's norms add 1e-6, not config.encoder.final_eps={c.encoder.final_eps}")
    if beit:
        if c.encoder.qkv_bias == "qkv":
            raise ConfigError("timm's Beit has no key bias: config.encoder.qkv_bias must be qv or none")
        if not c.encoder.final_norm:
            raise ConfigError("timm's Beit always has a final norm: config.encoder.final_norm must be True")
        family, architecture = "beit", "beit_base_patch16_224"
        if c.encoder.positions == "sincos":  # a parameter in Beit
            params = _with_table(params, grid, c.encoder.width)
        args["qkv_bias"] = c.encoder.qkv_bias == "qv"
        args["use_abs_pos_emb"] = c.encoder.positions in ("learned", "sincos")
        args["use_shared_rel_pos_bias"] = c.encoder.positions == "relative"
        args["use_rel_pos_bias"] = c.encoder.positions == "relative_per_block"
    else:
        family, architecture = "timm_vit", _timm_name(c)
        if c.encoder.positions == "sincos":
            family = "vit_mae"
        args["qkv_bias"] = c.encoder.qkv_bias == "qkv"
        args["pos_embed"] = "none" if c.encoder.positions == "none" else "learn"
        args["final_norm"] = c.encoder.final_norm
        args |= {"fc_norm": False} if mean else {}
    state = export_state_dict(family, params, grid)
    state = {n: a for n, a in state.items() if not n.endswith("relative_position_index")}  # timm computes it
    about = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": c.encoder.width,
        "global_pool": args["global_pool"],
        "model_args": args,
        "pretrained_cfg": _timm_images(c)
        | {
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return Export(family, state, {"config.json": about}, left_out)


def _timm_images(c: ConfigDict) -> dict[str, Any]:
    """What timm's ``pretrained_cfg`` says about images."""
    height, width = c.data.image_size
    return {
        "num_classes": 0,
        "input_size": [3, height, width],
        "interpolation": c.data.interpolation,
        "crop_pct": c.data.eval_crop,
        "crop_mode": "center",
        "mean": list(c.data.mean),
        "std": list(c.data.std),
    }


def _to_timm_resnet(c: ConfigDict, params: Mapping[str, Any]) -> Export:
    if c.encoder.stem != "imagenet" or c.encoder.stage_width != 64:
        raise ConfigError(
            f"timm's {c.encoder.name} supports only config.encoder.stem='imagenet' and stage_width=64, not "
            f"{c.encoder.stem!r} and {c.encoder.stage_width}; --format=torchvision writes any"
        )
    made = to_torchvision(c, params)
    about = {
        "architecture": c.encoder.name,
        "num_classes": 0,
        "num_features": ARCHITECTURES[c.encoder.name].widths(c.encoder.stage_width)[-1],
        "global_pool": "avg",
        "pretrained_cfg": _timm_images(c) | {"fixed_input_size": False, "first_conv": "conv1", "classifier": "fc"},
    }
    return dataclasses.replace(made, json_files={"config.json": about})


def to_torchvision(c: ConfigDict, params: Mapping[str, Any]) -> Export:
    """A ResNet under torchvision's names, without ``fc``.

    Raises:
      ConfigError: the encoder is no ResNet.
    """
    if c.encoder.name not in ARCHITECTURES:
        raise ConfigError(f"--format=torchvision writes only {', '.join(ARCHITECTURES)}, not {c.encoder.name}")
    params, left_out = _only(params, "encoder")
    params, dropped = _without_mask_token(params)
    return Export("resnet", export_state_dict("resnet", params, (0, 0)), {}, left_out + dropped)


def _without_mask_token(params: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The encoder without the mask token of pre-training, and the names of the arrays that are left out."""
    flat = traverse_util.flatten_dict(params, sep="/")
    dropped = tuple(name for name in MASK_TOKENS if flat.pop(name, None) is not None)
    return traverse_util.unflatten_dict(flat, sep="/"), dropped


def _with_table(params: dict[str, Any], grid: tuple[int, int], width: int) -> dict[str, Any]:
    embedding = {**params["encoder"]["embedding"], "positions": sincos_positions(grid, width)}
    return {**params, "encoder": {**params["encoder"], "embedding": embedding}}


def _timm_name(c: ConfigDict) -> str:
    """Timm's name for a model of this width, else for a base model; `model_args` hold all sizes anyway."""
    size = {192: "tiny", 384: "small", 1024: "large", 1280: "huge"}.get(c.encoder.width, "base")
    return "vit_huge_patch14_224" if size == "huge" else f"vit_{size}_patch16_224"


def to_transformers(c: ConfigDict, params: Mapping[str, Any]) -> Export:
    """The model as transformers' ViTMAEForPreTraining, or as ViTMAEModel if it does not have MAE's decoder.

    Raises:
      ConfigError: ViTMAE cannot hold this model.
    """
    _require_vit(c, "transformers' ViTMAE")
    height, width = c.data.image_size
    if height != width:
        raise ConfigError(f"transformers' ViTMAE takes square images, not config.data.image_size={(height, width)}")
    needed = {"positions": "sincos", "qkv_bias": "qkv", "layer_scale": 0.0, "final_norm": True, "final_eps": 1e-6}
    _require(c.encoder, "encoder", needed, "transformers' ViTMAE")
    trained_with = "decoder" in params or "mask_token" in params["encoder"]["embedding"]
    if trained_with and c.corruption.name == "mask" and c.corruption.mask_fill != "drop":
        raise ConfigError(
            f"transformers' ViTMAE drops removed patches, and config.corruption.mask_fill={c.corruption.mask_fill!r} "
            "does not; --format=timm writes the encoder alone"
        )
    parts = ("encoder", "decoder") if _has_mae_decoder(params) else ("encoder",)
    params, left_out = _only(params, *parts)
    state = export_state_dict("hf_vit_mae", params, _grid(c))
    decoder = names(params.get("decoder", {}))
    about = {
        "architectures": ["ViTMAEForPreTraining" if decoder else "ViTMAEModel"],
        "model_type": "vit_mae",
        "hidden_size": c.encoder.width,
        "num_hidden_layers": c.encoder.depth,
        "num_attention_heads": c.encoder.heads,
        "intermediate_size": int(c.encoder.width * c.encoder.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "image_size": height,
        "patch_size": c.encoder.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "mask_ratio": c.corruption.mask_ratio,
        "norm_pix_loss": c.loss.target == "patch_normalised",
    }
    if decoder:
        depth, in_width, mlp_width = decoder["blocks/mlp_in/kernel"].shape
        about |= {
            "decoder_hidden_size": in_width,
            "decoder_num_hidden_layers": depth,
            "decoder_num_attention_heads": c.decoder.heads,
            "decoder_intermediate_size": mlp_width,
        }
    images = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": RESAMPLING[c.data.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(c.data.mean),
        "image_std": list(c.data.std),
    }
    return Export("hf_vit_mae", state, {"config.json": about, "preprocessor_config.json": images}, left_out)


def _has_mae_decoder(params: Mapping[str, Any]) -> bool:
    return {"embed", "mask_token", "blocks"} <= params.get("decoder", {}).keys()


def to_torch(c: ConfigDict, params: Mapping[str, Any]) -> Export:
    """CRATE with its code for PyTorch: the folder needs nothing else.

    Raises:
      ConfigError: the encoder is no CRATE.
    """
    if c.encoder.name != "crate":
        others = "torchvision or timm" if c.encoder.name in ARCHITECTURES else "timm or hf"
        raise ConfigError(f"--format=torch writes only crate, not {c.encoder.name}; --format={others} writes it")
    params, left_out = _only(params, "encoder", "decoder")
    state = export_state_dict(torch_crate.FAMILY, params, _grid(c))
    about = torch_crate.config_json(c, params)
    return Export(torch_crate.FAMILY, state, {"config.json": about}, left_out, (torch_crate.MODELING,))


def to_authors(c: ConfigDict, params: Mapping[str, Any]) -> Export:
    """The model under the names of the code with which it was published.

    Raises:
      ConfigError: that code cannot hold this model.
    """
    if c.encoder.name in ARCHITECTURES:
        raise ConfigError(f"the authors of {c.encoder.name} use torchvision's names; --format=torchvision writes them")
    params, left_out = _only(params, "encoder", "decoder")
    e = c.encoder
    if e.name == "crate":
        family = "crate" if e.embed_norm else "crate_mae"
        eps = 1e-5 if e.embed_norm else 1e-6
        positions = "learned" if e.embed_norm else "sincos"
        needed = {"dictionary": "complete", "tied_output": False, "final_eps": eps, "positions": positions}
        _require(e, "encoder", needed, "the authors' CRATE")
        if "decoder" in params:
            _require(c.decoder, "decoder", {"residual": "stream", "positions": False}, "the authors' CRATE-MAE")
    else:
        _require(e, "encoder", {"final_eps": 1e-6}, "the authors' ViT")
        family = "vit_mae" if e.positions == "sincos" else "timm_vit"
        if e.positions.startswith("relative") or e.qkv_bias == "qv":
            family = "simmim" if "mask_token" in params["encoder"]["embedding"] else "ropim"
            if e.positions == "sincos":  # a parameter in BEiT's code
                params = _with_table(params, _grid(c), e.width)
    return Export(family, export_state_dict(family, params, _grid(c)), {}, left_out)


FORMATS: dict[str, Callable[[ConfigDict, Mapping[str, Any]], Export]] = {
    "timm": to_timm,
    "hf": to_transformers,
    "torchvision": to_torchvision,
    "torch": to_torch,
    "authors": to_authors,
}
