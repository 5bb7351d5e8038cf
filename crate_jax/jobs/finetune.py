"""The jobs ``finetune`` and ``segment``: train and score a head on a pre-trained or on a random encoder."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from crate_jax.config import KEYS, require_keys, validate
from crate_jax.convert import pretrained
from crate_jax.errors import ConfigError
from crate_jax.jobs import train
from crate_jax.jobs.evaluate import append_result, inherit, show
from crate_jax.parallel import sharding
from crate_jax.parallel.interrupt import Interrupt
from crate_jax.training.clock import Clock
from crate_jax.validation import check_values, flatten
from crate_jax.workdir.folder import lock

__all__ = ["run", "show"]  # the scores are printed like those of frozen features

# {name: version}. The recipes are in configs/evaluate.py and configs/segment.py.
PROTOCOLS = {"finetune_crate": 2, "finetune_mae": 1, "finetune_ropim": 1}
SEGMENTERS = {"segment_linear": 1, "segment_upernet": 1}


def resolve(config: ConfigDict, encoder: pretrained.Pretrained) -> ConfigDict:
    """The config of the training run: that of the checkpoint's encoder, with the changes of ``config.finetune``."""
    full = inherit(config, encoder)
    full.encoder.final_norm = config.finetune.final_norm
    if full.encoder.name == "vit":
        full.encoder.drop_path = config.finetune.drop_path
        if full.encoder.positions == "relative" and config.finetune.relative_bias == "per_block":
            full.encoder.positions = "relative_per_block"
    full.init_from = "" if config.protocol.scratch else config.checkpoint
    return full


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Fine-tunes `config.checkpoint`, or continues to; returns the record that it appends to results.jsonl.

    Raises:
      UserError: the config, the data or the workdir cannot be used; one line says why.
      Interrupted: one of `interrupt.SIGNALS` came; the state is saved.
    """
    name, protocols = config.protocol.name, SEGMENTERS if config.job == "segment" else PROTOCOLS
    if name not in protocols:
        raise ConfigError(f"config.protocol.name={name!r}: must be one of {', '.join(protocols)}")
    require_keys(config)
    check_values(flatten(config), {key: KEYS[key] for key in ("batch_size", "accumulate", "mesh.model")})
    clock = Clock()
    # Before the checksums, which start JAX.
    sharding.use_cpu_cores(config.batch_size, config.accumulate, config.mesh.model)
    encoder = pretrained.load(config.checkpoint, "config.checkpoint")
    full = resolve(config, encoder)
    validate(full)
    with Interrupt() as interrupt, lock(workdir) as folder:  # until the score is recorded, so that it is this run's
        summary = train.run_in(folder, full, interrupt, clock)
        summary.pop("goodput", None)  # of the machine, not of the result
        description = {
            "data": full.data.source,
            "image_size": list(full.data.image_size),
            "scratch": config.protocol.scratch,
            "freeze": full.finetune.freeze,
        }
        if config.job == "segment":
            description |= {**full.segment.to_dict(), "classes": len(summary["iou"])}
        else:
            description["pool"] = full.evaluation.pool
        used = None if config.protocol.scratch else encoder
        return append_result(folder, full, used, protocols[name], description, summary)
