"""The parts in order of value, what their cases may take, and what all of them are told."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Cases = dict[str, Callable[[], Row]]  # each measures and returns its row of the part's JSON


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a case is told.

    Attributes:
      out: the folder of the results.
      debug: whether sizes are tiny.
      batch: images per step on each device.
      data: a folder of images or an .npz, for the runs on CIFAR-10; '' if there is none.
      platform: gpu, tpu or cpu; '' as long as it is not known.
      until: when the process is killed, as `time.time()` counts.
    """

    out: str
    debug: bool = False
    batch: int = 128
    data: str = ""
    platform: str = ""
    until: float = 0.0


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the measurements.

    Attributes:
      module: the module of this package with the function ``cases`` (settings, part's name) -> Cases; it must not use
        a device itself, since the parent process calls it too.
      limit: seconds after which a case is killed; 0: cases share what is left of the time.
      least: with fewer seconds left no case is started.
      alone: whether each case has a process of its own, as memory's peak and a fair start need.
      asked: whether it runs only where --only names it.
    """

    module: str
    limit: float
    least: float
    alone: bool = False
    asked: bool = False

    def cases(self, name: str, settings: Settings) -> Cases:
        """The part's cases, in order; `name` is the part's."""
        module = importlib.import_module(f"benchmarks.accelerator.{self.module}")
        return module.cases(name, settings)


MACHINE = "machine"
WITHOUT = "without_kernels"  # the steps by XLA alone
PARTS = {
    "peak": Part("peak", limit=60, least=10),
    "parity": Part("kernels", limit=60, least=10),
    "crate_mae_b": Part("steps", limit=240, least=40, alone=True),
    "ropim_vit_b": Part("steps", limit=240, least=40, alone=True),
    "vit_mae_b": Part("steps", limit=240, least=40, alone=True),
    "byol_resnet50": Part("steps", limit=240, least=40, alone=True),
    "profile": Part("profile", limit=120, least=30, alone=True),
    WITHOUT: Part("steps", limit=180, least=40, alone=True),
    "kernel_times": Part("kernel_times", limit=120, least=15),
    "parity_more": Part("kernels", limit=60, least=10),
    "feed": Part("feed", limit=180, least=60, alone=True),
    "tune": Part("tune", limit=150, least=30),
    "cifar10": Part("cifar", limit=0, least=240, alone=True),
    "questions": Part("questions", limit=0, least=120, alone=True, asked=True),
}
DEFAULT = tuple(name for name, part in PARTS.items() if not part.asked)
ALL = {MACHINE: Part(MACHINE, limit=60, least=5), **PARTS}
