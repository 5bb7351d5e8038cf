"""Files of weights: .safetensors and PyTorch's .pth, .pt, .bin and .pth.tar, as dictionaries of NumPy arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from crate_jax.convert.torch_files import PICKLE_START, ZIP_START, Inert, Tensor, open_checkpoint
from crate_jax.errors import CheckpointError
from crate_jax.workdir.folder import check_free_space, expanduser

Arrays = dict[str, np.ndarray]

# Keys under which training scripts save the weights; the first key that is present counts.
NESTED = (
    "model", "state_dict", "model_state_dict", "model_state", "net", "module", "teacher", "encoder", "params",
    "online_network_state_dict",
)  # fmt: skip
# Prefixes of wrappers; a prefix is removed if all names have it.
PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")

SAFETENSORS_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read(path: str | os.PathLike[str]) -> tuple[Arrays, dict[str, Any]]:
    """Reads a file of weights and executes nothing in it. The content decides the format, not the file's name.

    Args:
      path: a .safetensors file, or a PyTorch checkpoint of either format.

    Returns:
      read-only arrays by name; and a dictionary: ``format``, ``metadata`` (safetensors' texts), ``nested`` (the keys
      under which the weights were), ``prefix`` (removed from all names), ``args`` (a training script's arguments).

    Raises:
      CheckpointError: there is no such file, it is damaged, has another format, or refers to anything but weights.
    """
    path = expanduser(path)
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: not a file of weights")
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
    if start[8:9] == b"{":
        arrays, about = _read_safetensors(path)
    elif start.startswith((ZIP_START, PICKLE_START)):
        arrays, about = _read_torch(path, start)
    else:
        what = f"begins with {start!r}" if start else "is empty"
        raise CheckpointError(f"{path}: {what}; expected .safetensors, or a checkpoint of PyTorch (.pth, .pt, .bin)")
    prefix = ""
    while found := next((p for p in PREFIXES if all(name.startswith(p) for name in arrays)), ""):
        arrays = {name.removeprefix(found): a for name, a in arrays.items()}
        prefix += found
    return arrays, {"metadata": {}, "nested": [], "args": {}, **about, "prefix": prefix}


def _read_safetensors(path: Path) -> tuple[Arrays, dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="np") as file:  # checks header, sizes and offsets
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as e:
        raise CheckpointError(f"{path}: damaged or cut short: {e}") from None
    # We slice the bytes ourselves: safetensors.numpy does not know bfloat16.
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    arrays = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: '{name}' has the type {entry['dtype']}, which is not supported")
        first, last = entry["data_offsets"]
        numbers = np.frombuffer(memoryview(data)[start + first : start + last], SAFETENSORS_DTYPES[entry["dtype"]])
        arrays[name] = numbers.reshape(entry["shape"])
    if not arrays:
        raise CheckpointError(f"{path}: holds no tensors")
    return arrays, {"format": "safetensors", "metadata": metadata}


def _read_torch(path: Path, start: bytes) -> tuple[Arrays, dict[str, Any]]:
    with open_checkpoint(path, start) as checkpoint:
        tree, nested = checkpoint.tree, []
        args = tree.get("args") if isinstance(tree, dict) else None
        while not _is_state_dict(tree):
            key = next((k for k in NESTED if isinstance(tree, dict) and isinstance(tree.get(k), dict)), None)
            if key is None:
                found = (
                    f"has {', '.join(map(str, tree)) or 'nothing'}" if isinstance(tree, dict) else "is not a dictionary"
                )
                raise CheckpointError(
                    f"{path}: no weights found, it {found}; expected tensors by name, at the top or under one of "
                    f"{', '.join(NESTED)}"
                )
            tree = tree[key]
            nested.append(key)
        arrays = {str(name): checkpoint.array(leaf) for name, leaf in tree.items() if isinstance(leaf, Tensor)}
    about = {"format": "zip" if start.startswith(ZIP_START) else "legacy", "nested": nested}
    return arrays, {**about, "args": vars(args) if isinstance(args, Inert) else {}}


def _is_state_dict(tree: Any) -> bool:
    return isinstance(tree, dict) and any(isinstance(leaf, Tensor) for leaf in tree.values())


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file; an error leaves no partial file under its name.

    Raises:
      CheckpointError: the file cannot be written, or the disk is full.
    """
    path = expanduser(path).absolute()
    dense = {name: np.asarray(a, order="C") for name, a in arrays.items()}  # ascontiguousarray makes scalars vectors
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_free_space(path.parent, sum(a.nbytes for a in dense.values()) + 2**20)
        partial = path.with_name(f"{path.name}.partial")
        safetensors.numpy.save_file(dense, partial, dict(metadata))
        partial.replace(path)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be written ({e.strerror})") from None
