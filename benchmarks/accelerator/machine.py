"""What the numbers belong to: the card, its driver, and the versions."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess

import jax

from benchmarks.accelerator.parts import Cases, Row, Settings

PACKAGES = ("jax", "jaxlib", "flax", "torch", "torchvision", "triton")


def cases(name: str, settings: Settings) -> Cases:
    """One case."""
    return {"machine": functools.partial(machine, settings)}


def machine(settings: Settings) -> Row:
    """The devices as JAX and nvidia-smi name them, and the versions of what runs on them."""
    first = jax.devices()[0]
    if first.platform == "cpu" and not settings.debug:
        raise RuntimeError("JAX sees no accelerator here, only a CPU; --debug runs tiny sizes on it")
    memory = (first.memory_stats() or {}).get("bytes_limit") if first.platform != "cpu" else None
    return {
        "device": first.device_kind,
        "devices": jax.device_count(),
        "platform": first.platform,
        "runtime": " ".join(first.client.platform_version.split()),
        "memory_for_jax": memory,
        "nvidia_smi": nvidia_smi(),
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str:
    """The installed version of a package; '' if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def nvidia_smi() -> str:
    """The cards' names, drivers, memory and power limits; '' without NVIDIA's tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = "--query-gpu=name,driver_version,memory.total,power.limit"
    result = subprocess.run([tool, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=30)
    return "; ".join(result.stdout.splitlines()) or " ".join(result.stderr.split())
