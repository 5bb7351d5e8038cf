"""CRATE for PyTorch: the config.json of ``torch_model/modeling_crate.py``, made of our config, and read back.

That file imports nothing from crate_jax and is copied into the exported folder as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from crate_jax.config import base
from crate_jax.convert import beside
from crate_jax.errors import ConfigError

FAMILY = "crate_torch"
MODELING = Path(__file__).parent / "torch_model" / "modeling_crate.py"
MODEL_TYPE = "crate"  # what config.json calls this kind of model
# Fields of CrateConfig -> the keys they come from. Their values are ours, but for two: `decoder` is none without a
# decoder, and without one `corruption` is mask only where the encoder has a mask token.
KEYS = {
    **{key: f"data.{key}" for key in ("image_size", "mean", "std", "interpolation", "eval_crop")},
    "pool": "evaluation.pool",
    **{
        key: f"encoder.{key}"
        for key in (
            "patch_size", "width", "depth", "heads", "positions", "eta", "lam", "dictionary", "expansion",
            "tied_output", "embed_norm", "final_norm", "final_eps", "init",
        )
    },
    "corruption": "corruption.name",
    **{
        key: f"corruption.{key}"
        for key in (
            "mask_ratio", "mask_fill", "rop_ratio", "rop_buckets", "rop_signs", "paper_scale", "noise_std"
        )
    },
    "decoder": "decoder.name",
    **{f"decoder_{key}": f"decoder.{key}" for key in ("width", "depth", "heads", "positions", "residual")},
    **{f"loss_{key}": f"loss.{key}" for key in ("target", "norm", "region")},
}  # fmt: skip


def config_json(c: ConfigDict, params: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds: the fields of modeling_crate.py's CrateConfig.

    Args:
      c: a whole config of a CRATE encoder.
      params: nested dictionaries with ``encoder`` and perhaps ``decoder``.
    """
    about = {field: c[section][name] for field, (section, name) in _places()}
    if "decoder" not in params:
        has_token = "mask_token" in params["encoder"]["embedding"]
        about |= {"decoder": "none", "corruption": "mask" if has_token else "none"}
        about |= {"mask_fill": "token"} if has_token else {}
    return {"model_type": MODEL_TYPE, **about}


def config_beside(path: Path) -> dict[str, Any] | None:
    """The whole config, not checked, of a model whose folder modeling_crate.py wrote; None without its config.json.

    Args:
      path: the file of weights.

    Raises:
      ConfigError: a field is missing.
    """
    about = beside.read_object(path.parent / beside.CONFIG)
    if about.get("model_type") != MODEL_TYPE:
        return None
    config = base().to_dict()
    for field, (section, name) in _places():
        if field not in about:
            raise ConfigError(f"the config.json beside it has no {field!r}")
        if (field, about[field]) != ("decoder", "none"):
            config[section][name] = about[field]
    return config


def _places() -> list[tuple[str, list[str]]]:
    return [(field, key.split(".")) for field, key in KEYS.items()]
