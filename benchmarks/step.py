"""Measures the train step of a config as training runs it: jitted, with donated state, on all local devices.

    python -m benchmarks.step --config=configs/crate_mae.py:variant=Ti --batch=16 [--config.KEY=VALUE ...]

Prints one JSON object. `model_flops_per_image` counts the matrix products and convolutions of the loss in the traced
program, forward and backward, for all views of an image, without recomputation by remat. `matmul_peak_flops` is
measured on this device, with a large square product of the same type. With `--telemetry`, `telemetry_ms` is the time of
one call on config.whitebox.images images, and `telemetry_share` is its average share of a step, as it runs once in
config.whitebox.every steps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from benchmarks.stand_in import training_set
from crate_jax import data
from crate_jax.config import validate
from crate_jax.jobs import train
from crate_jax.methods.method import Method
from crate_jax.parallel import sharding
from crate_jax.training import step as train_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
_BATCH = flags.DEFINE_integer("batch", 16, "Images per step.", lower_bound=1)
_TELEMETRY = flags.DEFINE_bool(
    "telemetry", False, "Also measure the telemetry of config.whitebox, and its share of a step."
)
_STEPS = flags.DEFINE_integer("steps", 10, "Timed steps.", lower_bound=1)


def matmul_peak(dtype: str, mesh: Mesh) -> float:
    """FLOP/s of square matrix products, one on each device of the mesh at the same time, the best of ten timings."""
    side = 2048 if mesh.devices.flat[0].platform == "cpu" else 8192
    shape, rows = (mesh.size, side, side), sharding.split(mesh)
    a = jax.jit(lambda: jax.random.normal(jax.random.key(0), shape, jnp.dtype(dtype)), out_shardings=rows)()
    product = jax.jit(lambda a: a @ a, in_shardings=rows, out_shardings=rows)
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * mesh.size * side**3 / best


def matmul_flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products and convolutions in a traced program; each run of a loop counts.

    A convolution's products with padding count; those with the zeros between the entries of a dilated input do not.
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = np.prod([eqn.invars[0].aval.shape[d] for d in contracted], dtype=np.int64)
            total += 2 * int(np.prod(eqn.outvars[0].aval.shape, dtype=np.int64) * inner)
        if eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            per_output = kernel.size // kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * per_output // math.prod(eqn.params["lhs_dilation"])
        repeats = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += repeats * matmul_flops(inner)
    return total


def random_batch(config: ConfigDict, inputs: Iterable[str], classes: int) -> dict[str, np.ndarray]:
    """A batch of random pixels, with random labels and the indices 0, 1, ...

    Args:
      config: a validated config.
      inputs: the names of the entries, as in `Method.inputs`.
      classes: number of classes.
    """
    rng = np.random.default_rng(0)
    batch = {}
    for name, x in data.batch_shapes(config, inputs).items():
        below = classes if name in ("label", "mask") else 256
        batch[name] = rng.integers(0, below, x.shape, x.dtype)
    return batch | ({"index": np.arange(config.batch_size, dtype=np.int32)} if "index" in batch else {})


def telemetry_cost(config: ConfigDict, params: Any, mesh: Mesh, step_seconds: float) -> dict[str, Any]:
    """Times one call of telemetry as the training loop makes it: images split over devices, results on the host."""
    shape = (config.whitebox.images, *config.data.image_size, 3)
    images = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    measure = train.telemetry(config, images, mesh)
    measure(params)
    seconds = []
    for _ in range(_STEPS.value):
        start = time.perf_counter()
        measure(params)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {
        "telemetry_ms": round(median * 1e3, 2),
        "telemetry_images": config.whitebox.images,
        "telemetry_every": config.whitebox.every,
        "telemetry_share": round(median / (config.whitebox.every * step_seconds), 5),
    }


@dataclasses.dataclass
class Prepared:
    """A step and what it takes.

    Attributes:
      config: validated, with a number of steps.
      mesh: all local devices.
      method: what is trained.
      step: the jitted step.
      state: of step 0.
      batch: random images and labels on the devices.
      flops: matrix products and convolutions of an image, forward and backward, without recomputation by remat.
    """

    config: ConfigDict
    mesh: Mesh
    method: Method
    step: Callable[..., Any]
    state: Any
    batch: dict[str, jax.Array]
    flops: float


def prepare(config: ConfigDict, source: data.Source | None = None) -> Prepared:
    """Builds the step of a config as training does; `source` is the training set, None: a stand-in."""
    config.steps, config.epochs = config.steps or 10_000, 0.0
    config.optimizer.warmup_epochs = 0.0
    validate(config)
    sharding.use_cpu_cores(config.batch_size, config.accumulate)
    mesh = sharding.make_mesh(config.batch_size, config.accumulate)
    source = source or training_set(config)
    method = train.method_of(config, source)
    recipe = train_step.make_recipe(config, method, len(source))
    step = train_step.make_train_step(config, method, recipe, mesh)
    state = train_step.make_init(config, method, recipe, mesh)()
    classes = len(source.class_names or ())
    batch = sharding.put_batch(random_batch(config, method.inputs, classes), mesh)
    keys = jax.random.split(jax.random.key(0), config.batch_size)
    plain = config.copy_and_resolve_references()
    plain.remat = False
    loss_and_grad = jax.value_and_grad(train.method_of(plain, source).loss, has_aux=True)
    program = jax.make_jaxpr(loss_and_grad)(state.params, state.carried, batch, keys)
    flops = matmul_flops(program.jaxpr) / config.batch_size
    return Prepared(config, mesh, method, step, state, batch, flops)


def main(_: list[str]) -> None:
    """Builds the step of the config, times it and prints the result."""
    config = _CONFIG.value
    config.batch_size = _BATCH.value
    prepared = prepare(config)
    step, state, batch, mesh, flops = prepared.step, prepared.state, prepared.batch, prepared.mesh, prepared.flops

    start = time.perf_counter()
    state, scalars = step(state, batch)
    jax.block_until_ready(scalars)
    compile_seconds = time.perf_counter() - start
    seconds = []
    for i in range(_STEPS.value + 2):
        start = time.perf_counter()
        state, scalars = step(state, batch)
        jax.block_until_ready(scalars)
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    telemetry: dict[str, Any] = {}
    if _TELEMETRY.value:
        if not config.whitebox.every or config.job != "pretrain":
            raise app.UsageError("--telemetry needs --config.whitebox.every above 0 and a config of job pretrain")
        telemetry = telemetry_cost(config, state.params, mesh, statistics.median(seconds))
    median = statistics.median(seconds)
    peak = matmul_peak(config.dtype, mesh)
    print(
        json.dumps(
            {
                "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
                "dtype": config.dtype,
                "batch": config.batch_size,
                "images_per_sec": round(config.batch_size / median, 2),
                "step_ms": round(median * 1e3, 2),
                "step_ms_min_max": [round(min(seconds) * 1e3, 2), round(max(seconds) * 1e3, 2)],
                "model_flops_per_image": flops,
                "matmul_peak_flops": round(peak),
                "fraction_of_peak": round(flops * config.batch_size / median / peak, 4),
                "first_step_seconds": round(compile_seconds, 2),
                "steps": _STEPS.value,
                **telemetry,
            }
        )
    )


if __name__ == "__main__":
    app.run(main)
