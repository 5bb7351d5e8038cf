"""The jobs ``finetune`` and ``segment``: a head on a pre-trained encoder, or on a random one, trained and scored."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from crate_jax.convert import pretrained
from crate_jax.errors import ConfigError
from crate_jax.jobs import train
from crate_jax.jobs.evaluate import append_result, inherit, show
from crate_jax.parallel import sharding
from crate_jax.workdir.folder import expanduser

__all__ = ["run", "show"]  # a score is shown as an evaluation of frozen features is

# name -> version; the recipes are in configs/evaluate.py and configs/segment.py. Scratch is a random encoder of the
# same shape.
PROTOCOLS = {"finetune_crate": 1, "finetune_mae": 1, "finetune_ropim": 1}
SEGMENTERS = {"segment_linear": 1, "segment_upernet": 1}


def resolve(config: ConfigDict, encoder: pretrained.Pretrained) -> ConfigDict:
    """The config of the training run: the checkpoint's encoder, changed as ``config.finetune`` says."""
    full = inherit(config, encoder)
    full.encoder.final_norm = config.finetune.final_norm
    if full.encoder.name == "vit":
        full.encoder.drop_path = config.finetune.drop_path
        if full.encoder.positions == "relative" and config.finetune.relative_bias == "per_block":
            full.encoder.positions = "relative_per_block"
    full.init_from = "" if config.protocol.scratch else config.checkpoint
    return full


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Fine-tunes `config.checkpoint`, or goes on doing so; returns the record appended to results.jsonl.

    Raises:
      UserError: anything a user can mend, in one line.
    """
    name, protocols = config.protocol.name, SEGMENTERS if config.job == "segment" else PROTOCOLS
    if name not in protocols:
        raise ConfigError(f"config.protocol.name={name!r}: must be one of {', '.join(protocols)}")
    sharding.use_cpu_cores(config.batch_size, config.accumulate, config.mesh.model)  # before checksums start JAX
    encoder = pretrained.load(config.checkpoint, "config.checkpoint")
    full = resolve(config, encoder)
    summary = train.run(full, workdir)
    about = {
        "data": full.data.source,
        "train_split": full.data.train_split,
        "eval_split": full.data.eval_split,
        "image_size": list(full.data.image_size),
        "scratch": config.protocol.scratch,
        "freeze": full.finetune.freeze,
    }
    if config.job == "segment":
        about |= {**full.segment.to_dict(), "classes": len(summary["iou"])}
    else:
        about["pool"] = full.evaluation.pool
    used = None if config.protocol.scratch else encoder
    return append_result(expanduser(workdir).absolute(), full, used, protocols[name], about, summary)
