"""What compiling a train step for chips of another machine has in common for TPUs (tpu_aot) and GPUs (gpu_aot).

The step is the one that training runs. `flops_per_chip` and `bytes_per_chip` follow XLA's rules, with each run of a
loop counted (:mod:`benchmarks.hlo_cost`). `hbm_bytes_per_chip` is the memory for arguments and temporaries. The
roofline is the larger of FLOPs / peak and bytes / bandwidth. It is a bound, not a measurement, and it does not include
the links between chips, whose bytes are in `collective_bytes_per_chip`. `not_counted` names the custom calls whose
FLOPs nothing tells, with the number of their runs. `--hlo=FILE` writes the compiled program; `--top=N` prints the N
instructions that move the most bytes on stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from benchmarks import hlo_cost
from benchmarks.roofline import Chip, Family, chip_of, roofline
from benchmarks.stand_in import training_set
from crate_jax import data
from crate_jax.config import validate
from crate_jax.errors import ConfigError, UserError
from crate_jax.flags import fail
from crate_jax.jobs.train import method_of
from crate_jax.parallel import sharding
from crate_jax.training import step as train_step


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides the compiler's messages about missing chips from stderr."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def lower_step(config: ConfigDict, devices: list[Any]) -> jax.stages.Lowered:
    """The train step of a validated config, traced for these devices without making an array."""
    mesh = sharding.make_mesh(config.batch_size, config.accumulate, devices, config.mesh.data, config.mesh.model)
    source = training_set(config)
    method = method_of(config, source)
    recipe = train_step.make_recipe(config, method, len(source))
    step = train_step.make_train_step(config, method, recipe, mesh)
    state = jax.eval_shape(functools.partial(train_step.init_state, config, method, recipe))
    return step.lower(state, data.batch_shapes(config, method.inputs))


def compile_step(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles the step.

    Raises:
      UserError: the chip has too little memory for the step.
    """
    try:
        with quiet():
            return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        reason = re.sub(r"^RESOURCE_EXHAUSTED: ", "", str(e).splitlines()[0])
        raise UserError(f"{reason}; lower --batch_per_chip, or set --config.remat=True") from None


def report(compiled: jax.stages.Compiled, chip: Chip, images: int) -> tuple[dict[str, Any], hlo_cost.Cost]:
    """The cost of a compiled step per chip, and the roofline; `images` is the number of images on each chip."""
    memory = compiled.memory_analysis()
    cost = hlo_cost.Program(compiled.as_text()).cost()
    hbm = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    hbm += memory.output_size_in_bytes - memory.alias_size_in_bytes  # the state is updated in place
    return {
        "flops_per_chip": cost.flops,
        "bytes_per_chip": cost.bytes,
        "hbm_traffic_per_chip": cost.hbm_bytes,
        "hbm_bytes_per_chip": hbm,
        "hbm_arguments_per_chip": memory.argument_size_in_bytes,
        "hbm_temporaries_per_chip": memory.temp_size_in_bytes,
        "hbm_share": hbm / chip.hbm,
        "collective_bytes_per_chip": sum(cost.collective_bytes.values()),
        "collective_bytes_by_kind": cost.collective_bytes,
        "collectives": cost.collectives,
        "not_counted": cost.not_counted,
        **roofline(chip, cost.flops, cost.bytes, images),
        "hbm_traffic_time_over_flop_time": (cost.hbm_bytes / chip.bandwidth) / (cost.flops / chip.flops),
    }, cost


def show_top(cost: hlo_cost.Cost, count: int) -> None:
    """Prints the `count` instructions that move the most bytes on stderr, one line each."""
    for line in sorted(cost.lines, key=lambda line: -line.bytes)[:count]:
        arrays = ", ".join(f"{a.dtype}{list(a.sides)}" for a in line.instruction.arrays[:3])
        print(
            f"{line.bytes / 1e9:7.2f} GB {line.hbm_bytes / 1e9:7.2f} in HBM  x{line.runs:<4} "
            f"{line.instruction.call or line.instruction.opcode} {arrays}  {line.instruction.origin}",
            file=sys.stderr,
        )


def define_flags(topology: str, meaning: str) -> None:
    """Defines the flags of the command line; `topology` is the default."""
    config_flags.DEFINE_config_file("config", None, "A file of configs/ that pre-trains.")
    flags.DEFINE_string("topology", topology, meaning)
    flags.DEFINE_integer("batch_per_chip", 128, "Images per step on each chip.", lower_bound=1)
    flags.DEFINE_string("hlo", "", "File for the text of the compiled program.")
    flags.DEFINE_integer("top", 0, "How many instructions to list, those that move the most bytes.", lower_bound=0)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags as absl does, but a bad flag, config file or key gives one line and status 2."""
    try:
        rest = flags.FLAGS(list(argv))
        if flags.FLAGS.config is None:
            raise ConfigError("--config is missing, such as --config=configs/crate_mae.py:variant=B")
        if len(rest) > 1:
            raise ConfigError(f"unexpected argument {rest[1]!r}; flags start with --")
        return rest
    except Exception as e:  # errors of a config file or an override are the user's errors
        fail(e)


def run(family: Family, devices_of: Callable[[str], list[Any]]) -> None:
    """Compiles the step of the config and prints its cost; `devices_of` describes the chips of a topology."""
    given = flags.FLAGS
    config = given.config
    try:
        chip, chips = chip_of(given.topology, family)
        if config.job != "pretrain":
            raise ConfigError(f"config.job={config.job!r}: only the step of pretrain is compiled here")
        config.batch_size = given.batch_per_chip * chips
        config.steps, config.epochs = config.steps or 10_000, 0.0
        config.optimizer.warmup_epochs = 0.0
        validate(config)
        lowered = lower_step(config, devices_of(given.topology))
        with open(
            given.hlo or os.devnull, "w", encoding="utf-8"
        ) as file:  # opened before compiling, which takes minutes
            start = time.perf_counter()
            compiled = compile_step(lowered)
            seconds = time.perf_counter() - start
            file.write(compiled.as_text() if given.hlo else "")
    except (UserError, OSError) as e:
        fail(e)
    numbers, cost = report(compiled, chip, given.batch_per_chip)
    show_top(cost, given.top)
    for call, runs in cost.not_counted.items():
        print(f"not counted: FLOPs of {call}, {runs} runs", file=sys.stderr)
    if numbers["hbm_share"] > 1:  # XLA for TPUs refuses to compile such a step, XLA for GPUs does not
        print(f"does not fit: {numbers['hbm_share']:.2f} of the chip's memory; lower --batch_per_chip", file=sys.stderr)
    print(
        json.dumps(
            {
                "topology": given.topology,
                "chips": chips,
                "chip": dataclasses.asdict(chip),
                "batch_per_chip": given.batch_per_chip,
                "dtype": config.dtype,
                "compile_seconds": round(seconds, 1),
                **numbers,
            }
        )
    )


def start(topology: str, meaning: str, family: Family, devices_of: Callable[[str], list[Any]]) -> None:
    """Runs the command line; see :func:`define_flags` and :func:`run`."""
    define_flags(topology, meaning)
    app.run(lambda _: run(family, devices_of), flags_parser=parse_flags)
