"""Where the time of a train step goes: the device's own record of some steps, by kind of kernel.

The record itself stays in DIR/traces/MODEL, for XProf or TensorBoard, beside the compiled program, whose names it has.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks import step
from benchmarks.accelerator.parts import Cases, Row, Settings
from benchmarks.accelerator.steps import CONFIGS, Stepper, config_of

STEPS = 5
TOP = 60  # kernels in a row
KINDS = {  # the first expression that a kernel's name has decides
    "attention": r"attention_|fmha|flash",
    "norm": r"norm_forward|norm_backward",
    "convolution": r"conv(?!ert)|fprop|dgrad|wgrad|cudnn",
    "product": r"gemm|nvjet|cublas|cutlass|dot",
    "copy": r"memcpy|memset|copy|transpose",
    "collective": r"nccl|all-reduce|reduce-scatter|all-gather",
}
OTHER = "other"  # XLA's fusions: sums, element by element


def cases(name: str, settings: Settings) -> Cases:
    """Every model's step."""
    return {model: functools.partial(measure, model, settings) for model in CONFIGS}


def measure(model: str, settings: Settings) -> Row:
    """Runs some steps under the profiler."""
    prepared = step.prepare(config_of(model, settings))
    compiled = prepared.step.lower(prepared.state, prepared.batch).compile()
    stepper = Stepper(compiled, prepared)
    for _ in range(3):
        jax.block_until_ready(stepper())
    folder = Path(settings.out) / "traces" / model
    with jax.profiler.trace(folder):
        for _ in range(STEPS):
            scalars = stepper()
        jax.block_until_ready(scalars)
    stepper.loss()
    (folder / "program.txt").write_text(compiled.as_text(), encoding="utf-8")
    newest = max(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return {"batch": prepared.config.batch_size, **summed(kernels(newest), STEPS)}


def kernels(path: Path) -> Iterator[tuple[str, float, float]]:
    """The name, the start and the duration in ns of all that the first device ran, by a file of the profiler.

    GPUs have a line for each stream, TPUs one for all; a CPU's operations are among the host's events.
    """
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = sorted((p for p in planes if re.search(r"^/device:(GPU|TPU):\d+$", p.name)), key=lambda p: p.name)
    for plane in devices[:1] or [p for p in planes if p.name == "/host:CPU"]:
        for line in plane.lines:
            if not devices or line.name.startswith("Stream") or line.name == "XLA Ops":
                for event in line.events:
                    if devices or "hlo_op" in dict(event.stats):
                        yield event.name, event.start_ns, event.duration_ns


def summed(events: Iterable[tuple[str, float, float]], steps: int) -> Row:
    """Sums of the events' durations.

    Args:
      events: names, starts and durations in ns.
      steps: the number of steps in which they were.

    Returns:
      of one step: "span_ms" from the first start to the last end, "busy_ms" in which something ran, the ms and the
      number of kernels by kind, and [name, kind, ms, number] of those that take longest.

    Raises:
      RuntimeError: there are no events.
    """
    events = sorted(events, key=lambda event: event[1])
    if not events:
        raise RuntimeError("the profiler recorded nothing on the device")
    busy, end = 0.0, events[0][1]
    times: collections.Counter[str] = collections.Counter()
    numbers: collections.Counter[str] = collections.Counter()
    for name, start, duration in events:
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
        times[name] += duration
        numbers[name] += 1

    def each(ns: float) -> float:
        return ns / steps / 1e6

    kinds: dict[str, Any] = {}
    for name, ns in times.items():
        of = kinds.setdefault(kind(name), {"ms": 0.0, "kernels": 0.0})
        of["ms"] += each(ns)
        of["kernels"] += numbers[name] / steps
    return {
        "span_ms": each(end - events[0][1]),
        "busy_ms": each(busy),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1]["ms"])),
        "top": [[name, kind(name), each(ns), numbers[name] / steps] for name, ns in times.most_common(TOP)],
    }


def kind(name: str) -> str:
    """The kind of a kernel by its name.

    >>> kind("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNN"), kind("loop_convert_fusion_7")
    ('product', 'other')
    """
    return next((kind for kind, expression in KINDS.items() if re.search(expression, name)), OTHER)
