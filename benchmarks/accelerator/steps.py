"""The train steps of the models, ours with and without kernels, and PyTorch's, on random images that lie on the device.

Ours are what training runs, in bfloat16: with the optimiser, random masks or projections, and for BYOL with colours and
blur of the views, the target's average and the online classifier. :mod:`benchmarks.accelerator.pytorch` says what
PyTorch's do.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from benchmarks import hlo_cost, step
from benchmarks.accelerator import pytorch
from benchmarks.accelerator.clock import timed
from benchmarks.accelerator.parts import WITHOUT, Cases, Row, Settings
from crate_jax.flags import one_line
from crate_jax.models.layers import attention_noted

CONFIGS = {
    "crate_mae_b": ("crate_mae", "variant=B"),
    "ropim_vit_b": ("rop_vitb", "variant=B"),
    "vit_mae_b": ("vit_mae", "variant=B"),
    "byol_resnet50": ("joint_lightly", "penalty=none"),
}
DEBUG_BATCH = 8


def cases(name: str, settings: Settings) -> Cases:
    """Ours, and PyTorch's right after it; those without kernels are a later part, for which there may be no time."""
    if name == WITHOUT:
        return {model: functools.partial(ours, model, settings, "0") for model in CONFIGS if model != "byol_resnet50"}
    return {
        "ours": functools.partial(ours, name, settings, "1"),
        "pytorch": functools.partial(pytorch.measure, name, settings),
    }


def config_of(name: str, settings: Settings) -> ConfigDict:
    """The config of a model, with the batch of the settings on each device."""
    module, argument = CONFIGS[name]
    config = importlib.import_module(f"configs.{module}").get_config(argument + ",debug" * settings.debug)
    config.batch_size = DEBUG_BATCH if settings.debug else settings.batch * jax.device_count()
    if settings.debug and config.encoder.name == "resnet50":
        config.encoder.name = "resnet18"  # compiles in a third of the time
    return config


def ours(name: str, settings: Settings, kernels: str) -> Row:
    """Compiles and times the step; `kernels` is the value of CRATE_JAX_KERNELS."""
    os.environ["CRATE_JAX_KERNELS"] = kernels
    prepared = step.prepare(config_of(name, settings))
    start = time.perf_counter()
    with attention_noted() as noted:
        lowered = prepared.step.lower(prepared.state, prepared.batch)
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    stepper = Stepper(compiled, prepared)
    times = timed(stepper, 0.1 if settings.debug else 0.5, 3 if settings.debug else 7)
    return {
        "batch": prepared.config.batch_size,
        "dtype": prepared.config.dtype,
        "images_per_sec": prepared.config.batch_size / times["ms"] * 1e3,
        **times,
        "loss": stepper.loss(),
        "model_flops_per_image": prepared.flops,
        "attention": ", ".join(noted),
        "compile_seconds": seconds,
        "peak_bytes": peak_bytes(),
        "compiled": compiled_cost(compiled),
    }


class Stepper:
    """Runs a step on the same batch again and again.

    Args:
      run: the step, jitted or compiled.
      prepared: its first state and its batch.
    """

    def __init__(self, run: Any, prepared: step.Prepared):
        self._run, self._state, self._batch = run, prepared.state, prepared.batch
        self._scalars: dict[str, jax.Array] = {}

    def __call__(self, batch: dict[str, jax.Array] | None = None) -> dict[str, jax.Array]:
        """Starts a step, on another batch if one is given."""
        self._state, self._scalars = self._run(self._state, self._batch if batch is None else batch)
        return self._scalars

    def loss(self) -> float:
        """The last step's loss.

        Raises:
          FloatingPointError: it is not finite, so that the time means nothing.
        """
        loss = float(self._scalars["loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} after the timed steps")
        return loss


def peak_bytes() -> int | None:
    """The most memory that one device held since the process began; None where the device does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def compiled_cost(compiled: jax.stages.Compiled) -> Row:
    """FLOPs and bytes of the compiled program per device, as benchmarks.gpu_aot counts them; memory as XLA plans it."""
    try:
        cost = hlo_cost.Program(compiled.as_text()).cost()
        memory = compiled.memory_analysis()
        planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        planned += memory.output_size_in_bytes - memory.alias_size_in_bytes
    except Exception as e:  # a program of a compiler that the count does not know; the times stand without it
        return {"not counted": f"{type(e).__name__}: {one_line(e)}"[:200]}
    return {"flops": cost.flops, "bytes": cost.bytes, "planned_bytes": planned, "not_counted": cost.not_counted}
