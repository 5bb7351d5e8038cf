"""The train steps of the same models in PyTorch: torch.compile, fused attention (SDPA), bfloat16, channels last.

What they leave out makes them faster, not slower. All: the augmentation; images and views are finished. CRATE-MAE is
the authors' model (:mod:`benchmarks.pytorch_crate`), three products in ISTA included. ROPIM and ViT-MAE have the blocks
of timm; ROPIM has one relative bias for all layers, layer scale, and no drop path. BYOL has torchvision's ResNet50,
solo-learn's projector and predictor, a momentum encoder, and SGD instead of LARS. Matrix products in float32 use TF32.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.accelerator.parts import Row, Settings

if TYPE_CHECKING:
    import torch


def measure(name: str, settings: Settings) -> Row:
    """Times the compiled step of a model on one GPU; "absent" says what is not installed."""
    needed = ("torch", "torchvision") if name == "byol_resnet50" else ("torch",)
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        return {"absent": f"{' and '.join(missing)} not installed"}
    import torch

    if not (torch.cuda.is_available() or settings.debug):
        return {"absent": "torch finds no GPU with CUDA"}
    from benchmarks.accelerator import pytorch_models
    from benchmarks.accelerator.clock import timed

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    batch = 2 if settings.debug else settings.batch
    model, inputs = pytorch_models.build(name, batch, device, settings.debug)
    step = make_step(model, inputs, device, compile=not settings.debug)
    wait = functools.partial(synchronise, device)
    times = timed(step, 0.1 if settings.debug else 0.5, 2 if settings.debug else 7, wait)
    loss = float(step())
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} after the timed steps")
    return {
        "batch": batch,
        "devices": 1,
        "images_per_sec": batch / times["ms"] * 1e3,
        **times,
        "loss": loss,
        "compiled": not settings.debug,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "version": torch.__version__,
    }


def synchronise(device: torch.device, result: Any) -> None:
    """Waits for all work on the device."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def make_step(
    model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], device: torch.device, compile: bool
) -> Callable[[], torch.Tensor]:
    """The function that runs one step, forward in bfloat16 autocast, backward and optimiser, and returns the loss.

    Args:
      model: from `inputs` to a loss; it may have an ``optimizer`` (parameters -> optimiser) and an ``after``, called
        after each update.
      inputs: on the device.
      device: where all is.
      compile: whether forward and backward are compiled.
    """
    import torch

    fused = {"fused": True} if device.type == "cuda" else {}
    trained = [p for p in model.parameters() if p.requires_grad]
    if hasattr(model, "optimizer"):
        optimizer = model.optimizer(trained, **fused)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, **fused)
    after = getattr(model, "after", lambda: None)
    run = torch.compile(model) if compile else model

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = run(*inputs)
        loss.backward()
        optimizer.step()
        after()
        return loss.detach()

    return step
