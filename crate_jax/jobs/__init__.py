"""The jobs of the command line, one file each: config and folder in, record out. No other room imports a job.

The module of a job holds ``run(config, workdir)``, which returns a record, and ``show(record)``, which prints it.
"""

from __future__ import annotations

from types import ModuleType

from crate_jax.jobs import align, evaluate, finetune, report, sweep, train

JOBS: dict[str, ModuleType] = {
    "pretrain": train,
    "evaluate": evaluate,
    "finetune": finetune,
    "segment": finetune,
    "sweep": sweep,
    "align": align,
    "report": report,
}
