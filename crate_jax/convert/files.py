"""Files of weights: .safetensors and PyTorch's .pth, .pt, .bin and .pth.tar, as dictionaries of NumPy arrays."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from crate_jax.convert.branches import MAX_NETWORKS, fits, holds_network
from crate_jax.convert.torch_files import MAX_NAME, PICKLE_START, ZIP_START, Inert, Tensor, open_checkpoint
from crate_jax.errors import MAX_LENGTH, CheckpointError, ConfigError, some
from crate_jax.workdir.bucket import is_address
from crate_jax.workdir.checkpoint import FOLDER, of_step
from crate_jax.workdir.checkpoint_files import steps
from crate_jax.workdir.folder import check_free_space, expanduser, readable
from crate_jax.workdir.whole import whole

Arrays = dict[str, np.ndarray]

# Keys under which training scripts save networks: first those that methods evaluate (a teacher, a moving average), then
# the trained ones. Of the keys under which there is a known model, the first here counts.
NESTED = (
    "teacher", "teacher_state_dict", "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema",
    "online_network_state_dict", "online_network", "online_encoder", "base_encoder", "encoder_q", "backbone",
    "model", "state_dict", "model_state_dict", "model_state", "net", "network", "module", "encoder", "params",
)  # fmt: skip
STANDARD = ("model.safetensors", "pytorch_model.bin")  # names of a folder's weights
BUNDLED = Path(__file__).with_name("bundled")  # a folder for each model that comes with the package
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar")  # by which others are found in a folder
GIT_LFS = b"version https://git-lfs"  # how the text begins that lies in a repository in place of a large file
MAX_DEPTH = 4  # of dictionaries in each other
MAX_HEADER = 2**22  # bytes of a .safetensors file's header; a tensor takes about 100
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


def weights_file(path: str | os.PathLike[str]) -> Path | None:
    """The file of weights that a path means: the path itself, or the file in a folder that is not a run's.

    Args:
      path: a file; or a folder with one of STANDARD, as exports and libraries write it, or with one file of SUFFIXES;
        or the name of a model in BUNDLED, if there is no file or folder of that name.

    Returns:
      The file; None if there is no such file or folder, or the folder has no file of weights, or has checkpoints.

    Raises:
      CheckpointError: the folder holds several files of weights.
    """
    if is_address(path) and of_step(path):  # it would be copied, and once more with the records of its run
        return None
    path = readable(path)
    if path.name == str(path) and not path.exists() and (BUNDLED / path).is_dir():
        path = BUNDLED / path
    if path.is_file():
        return path
    if not path.is_dir() or steps(path) or (path / FOLDER).is_dir():
        return None
    for name in STANDARD:
        if (path / name).is_file():
            return path / name
        if (path / f"{name}.index.json").is_file():
            raise CheckpointError(f"{path}: its weights are split into several files ({name}.index.json); join them")
    found = sorted(p.name for p in path.iterdir() if p.name.endswith(SUFFIXES) and p.is_file() and p.name[0] != ".")
    if len(found) > 1:
        raise CheckpointError(f"{path}: holds several files of weights, {some(found, ', ')}; name one of them")
    return path / found[0] if found else None


def read(path: str | os.PathLike[str], prefix: str = "") -> tuple[Arrays, dict[str, Any]]:
    """Reads a file of weights and executes nothing in it. The content decides the format, not the file's name.

    Args:
      path: a .safetensors file, or a PyTorch checkpoint of either format; or a folder, see :func:`weights_file`.
      prefix: the keys above the weights in a PyTorch checkpoint, as in ``student.``, and perhaps the beginning of names
        below them; empty, or other keys: the first of NESTED that holds a known model.

    Returns:
      read-only arrays by name; and a dictionary: ``format``, ``metadata`` (safetensors' texts), ``nested`` (the keys
      under which the weights were), ``others`` ({keys of another network in the file: number of its tensors}),
      ``prefix`` (removed from all names), ``args`` (a training script's arguments).

    Raises:
      CheckpointError: there is no such file, it is damaged, has another format, or refers to anything but weights.
    """
    path = weights_file(path) or readable(path)
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: not a file of weights")
    try:
        with path.open("rb") as file:
            start = file.read(len(GIT_LFS))
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
    if start[8:9] == b"{":
        arrays, about = _read_safetensors(path)
    elif start.startswith((ZIP_START, PICKLE_START)):
        arrays, about = _read_torch(path, start, prefix)
    elif start == GIT_LFS:
        raise CheckpointError(
            f"{path}: a pointer of Git LFS, not the weights; `git lfs pull` in its folder fetches them"
        )
    else:
        what = f"begins with {start[:16]!r}" if start else "is empty"
        raise CheckpointError(f"{path}: {what}; expected .safetensors, or a checkpoint of PyTorch (.pth, .pt, .bin)")
    wrapper = _wrapper(arrays)
    arrays = {name.removeprefix(wrapper): a for name, a in arrays.items()}
    return arrays, {"metadata": {}, "nested": [], "others": {}, "args": {}, **about, "prefix": wrapper}


def _wrapper(names: Collection[str]) -> str:
    """The prefixes of wrappers that all names begin with."""
    wrapper = ""
    while found := next((p for p in PREFIXES if all(name.startswith(wrapper + p) for name in names)), ""):
        wrapper += found
    return wrapper


def _read_safetensors(path: Path) -> tuple[Arrays, dict[str, Any]]:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER:
        raise CheckpointError(f"{path}: its header has {header} bytes, more than the {MAX_HEADER} that are read")
    try:
        with safetensors.safe_open(path, framework="np") as file:  # checks header, sizes and offsets
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as e:
        raise CheckpointError(f"{path}: damaged or cut short: {e}") from None
    # We slice the bytes ourselves: safetensors.numpy does not know bfloat16.
    data = path.read_bytes()
    start = 8 + header
    arrays = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        if len(name) > MAX_NAME:
            raise CheckpointError(
                f"{path}: '{name[:MAX_LENGTH]}...' is longer than the {MAX_NAME} characters of a name"
            )
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: '{name}' has the type {entry['dtype']}, which is not supported")
        first, last = entry["data_offsets"]
        numbers = np.frombuffer(memoryview(data)[start + first : start + last], SAFETENSORS_DTYPES[entry["dtype"]])
        try:
            arrays[name] = numbers.reshape(entry["shape"])
        except ValueError:  # more dimensions than NumPy has, or a huge one beside a zero
            shape = some(list(map(str, entry["shape"])), " x ")
            raise CheckpointError(f"{path}: '{name}' has the shape {shape}, which no array has") from None
    if not arrays:
        raise CheckpointError(f"{path}: holds no tensors")
    return arrays, {"format": "safetensors", "metadata": metadata}


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file; {} if it is something else, or cannot be read."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError):
        return {}


def _read_torch(path: Path, start: bytes, prefix: str) -> tuple[Arrays, dict[str, Any]]:
    with open_checkpoint(path, start) as checkpoint:
        tree = checkpoint.tree
        args = tree.get("args") if isinstance(tree, dict) else None
        found = dict(_state_dicts(tree))
        if not found:
            keys = some(list(map(str, tree)), ", ") or "nothing" if isinstance(tree, dict) else ""
            what = f"has {keys}" if keys else "is not a dictionary"
            raise CheckpointError(
                f"{path}: no weights found, it {what}; expected tensors by name, at the top or under one of "
                f"{', '.join(NESTED)}"
            )
        plain = {keys: _plain(leaves) for keys, leaves in found.items()}
        networks = [keys for keys, names in plain.items() if holds_network(names)]
        fitting = networks
        if 1 < len(networks) <= MAX_NETWORKS:
            fitting = [keys for keys in networks if fits(plain[keys])] or networks
        try:
            nested = _choose(fitting, networks, prefix) if networks else max(found, key=lambda keys: len(found[keys]))
        except ConfigError as e:
            raise CheckpointError(f"{path}: {e}") from None
        arrays = checkpoint.arrays(found[nested])
    return arrays, {
        "format": "zip" if start.startswith(ZIP_START) else "legacy",
        "nested": list(nested),
        "others": {".".join(keys): len(found[keys]) for keys in networks if keys != nested},
        "args": args.state if isinstance(args, Inert) else {},
    }


def _state_dicts(tree: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yields the tensors of each dictionary in a checkpoint by name, with the keys above them; no dictionary twice."""
    seen: set[int] = set()
    pending: collections.deque[tuple[tuple[str, ...], Any]] = collections.deque([((), tree)])
    while pending:
        keys, node = pending.popleft()
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        leaves = {str(name): leaf for name, leaf in node.items() if isinstance(leaf, Tensor)}
        if leaves:
            yield keys, leaves
        if len(keys) < MAX_DEPTH:
            pending += [((*keys, key), value) for key, value in node.items() if isinstance(key, str)]


def _plain(names: Collection[str]) -> list[str]:
    wrapper = _wrapper(names)
    return [name.removeprefix(wrapper) for name in names]


def _choose(fitting: Sequence[tuple[str, ...]], networks: Sequence[tuple[str, ...]], prefix: str) -> tuple[str, ...]:
    """Chooses among the keys above several networks; () stands for the top of the file.

    Args:
      fitting: the keys of the networks of which no tensor is missing or unknown; all if there is none.
      networks: the keys of all networks, among which `prefix` chooses.
      prefix: see :func:`read`.

    Raises:
      ConfigError: neither `prefix` nor NESTED decides.
    """
    asked = [keys for keys in networks if keys and prefix.startswith(f"{'.'.join(keys)}.")]
    if asked:
        return max(asked, key=len)

    def rank(keys: tuple[str, ...]) -> list[int]:
        # Weights at the top come after the keys of NESTED, and before other keys.
        return [NESTED.index(key) if key in NESTED else len(NESTED) + 1 for key in keys] or [len(NESTED)]

    best = min(map(rank, fitting))
    first = [keys for keys in fitting if rank(keys) == best]
    if len(first) > 1:
        listed = some([f"{'.'.join(keys)}." for keys in first], ", ")
        raise ConfigError(f"holds several networks, {listed}: choose one with `convert import` (--prefix)")
    return first[0]


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file; an error leaves no partial file.

    Raises:
      CheckpointError: the file cannot be written, or the disk is full.
    """
    path = expanduser(path).absolute()
    if path.exists() and not path.is_file():  # a rename would put a file in the place of a device or a pipe
        raise CheckpointError(f"{path}: cannot be written (not a regular file)")
    dense = {name: np.asarray(a, order="C") for name, a in arrays.items()}  # ascontiguousarray makes scalars vectors
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_free_space(path.parent, sum(a.nbytes for a in dense.values()) + 2**20)
        with whole(path) as partial:
            partial.touch()
            mode = partial.stat().st_mode  # that of any new file; safetensors gives its own file to the owner alone
            safetensors.numpy.save_file(dense, partial, dict(metadata))
            partial.chmod(mode)
    except (OSError, safetensors.SafetensorError) as e:  # the latter if the disk is full
        raise CheckpointError(f"{path}: cannot be written ({getattr(e, 'strerror', e)})") from None
