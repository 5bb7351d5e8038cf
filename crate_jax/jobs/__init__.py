"""The jobs of the command line, one file each. No other room imports a job.

A job's module holds ``run(config, workdir)``, which returns a record, and ``show(record)``, which prints the record.
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
