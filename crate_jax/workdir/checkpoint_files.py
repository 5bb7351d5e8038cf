"""One checkpoint on disk: its names, its meta, and how its arrays are read and verified.

The folder of a step holds the items ``params`` and ``rest`` (arrays, in nested dictionaries whose keys spell the names
of the state's tree, so that they can be read without the code that made them) and ``meta``: JSON with the config, the
versions, and shape, dtype and checksum of every array, under a digest of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

from crate_jax.errors import CheckpointError, some
from crate_jax.parallel import distributed
from crate_jax.parallel.parameters import names
from crate_jax.validation import changed_keys
from crate_jax.workdir.checksum import checksums

ITEMS = ("params", "rest")
META = "meta"
VERSIONS_OF = ("crate-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
IGNORED_CHANGES = ("log.", "save.", "evaluation.", "mesh.")  # config keys that do not touch the training state


class DamagedError(Exception):
    """What was read is not what was written.

    Attributes:
      told: whether this process is one to say so: process 0, and the first one that noticed.
    """

    def __init__(self, message: str, told: bool = True) -> None:
        super().__init__(message)
        self.told = told


def agree(problem: str) -> None:
    """Makes what one process cannot use damaged for all, so that all go on to the same checkpoint.

    Args:
      problem: this process's; empty: it has none. All processes must call it.

    Raises:
      DamagedError: some process has a problem.
    """
    me, everyone = jax.process_index(), distributed.processes()
    first = -distributed.largest(-(me if problem else everyone))
    if first < everyone:
        raise DamagedError(problem or f"process {first} cannot read it, see its log", told=me in (0, first))


def steps(folder: Path) -> list[int]:
    """Returns the steps that `folder` holds a complete checkpoint of, damaged or not, newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()), reverse=True)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turns names with slashes into nested dictionaries.

    >>> nest({"encoder/norm/scale": 1.0, "encoder/norm/bias": 0.0})
    {'encoder': {'norm': {'scale': 1.0, 'bias': 0.0}}}
    """
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def storable(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dictionaries of one item; Orbax refuses arrays of size 0, so they stay in the meta alone."""
    return nest({name: x for name, x in arrays.items() if x.size})


def make_meta(step: int, meta: Mapping[str, Any], arrays: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, Any]:
    """Returns `meta` with 'step', 'versions' and 'arrays' added, under a digest, as JSON gives it back.

    Raises:
      ValueError: `meta` has no 'config', which a later restore compares with its own.
      TypeError: a value that is not JSON and not a ConfigDict.
    """
    if "config" not in meta:
        raise ValueError("checkpoint meta: the key 'config' is missing")
    entries = {}
    for item, leaves in arrays.items():
        sums = checksums(leaves)
        entries[item] = {name: {**_signature(x), "checksum": sums[name]} for name, x in leaves.items()}
    added = {"step": step, "versions": _versions(), "arrays": entries}
    body = json.loads(json.dumps({**meta, **added}, default=_config_as_dict))
    return {"sha256": _digest(body), "body": body}


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "unknown"
    return found


def _config_as_dict(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return value.to_dict()
    raise TypeError(f"checkpoint meta: a {type(value).__name__} cannot be written as JSON")


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _signature(x: Any) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads and verifies the meta of the checkpoint in `folder`; all processes must call it.

    Raises:
      DamagedError: it is missing or is not what was written.
    """
    path = folder / META / "metadata"
    stored: Any = None
    problem = ""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(stored, dict) and set(stored) == {"sha256", "body"}
        if not whole or _digest(stored["body"]) != stored["sha256"]:
            problem = f"{path.relative_to(folder)} is not what was saved (wrong checksum)"
        elif not _is_complete(stored["body"]):
            problem = f"{path.relative_to(folder)} is not as this version writes it: of another one?"
    except OSError as e:
        problem = f"{path.relative_to(folder)}: {e.strerror}"
    except ValueError:
        problem = f"{path.relative_to(folder)} is not valid JSON"
    agree(problem)
    return stored["body"]


def _is_complete(body: Any) -> bool:
    """Whether a meta has what is read of it: the step, the config, and shape, type and checksum of every array."""
    kinds = {"step": int, "config": dict, "arrays": dict}
    if not isinstance(body, dict) or not all(isinstance(body.get(key), kind) for key, kind in kinds.items()):
        return False
    if not all(isinstance(body["arrays"].get(item), dict) for item in ITEMS):
        return False
    return all(_is_entry(entry) for item in ITEMS for entry in body["arrays"][item].values())


def _is_entry(entry: Any) -> bool:
    try:
        sizes = entry["shape"] if "checksum" in entry and isinstance(entry["dtype"], str) else None
        return isinstance(sizes, list) and all(type(n) is int and n >= 0 for n in sizes)
    except (KeyError, TypeError):
        return False


def host_targets(meta: Mapping[str, Any], item: str) -> dict[str, np.ndarray]:
    """Returns NumPy targets for `read_arrays`, from the shapes and dtypes that the meta names."""
    try:
        return {name: np.empty(e["shape"], jnp.dtype(e["dtype"])) for name, e in meta["arrays"][item].items()}
    except (TypeError, ValueError) as e:  # no such type, or a size beyond what an array can have
        raise DamagedError(f"{META}: {item} holds an array that cannot be ({one_line(e)})") from None


def read_arrays(folder: Path, meta: Mapping[str, Any], item: str, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Reads and verifies all arrays of one item; all processes must call it.

    Args:
      folder: of the checkpoint.
      meta: from `read_meta`.
      item: 'params' or 'rest'.
      targets: by name, `jax.ShapeDtypeStruct` with a sharding, or NumPy arrays for arrays on the host.

    Returns:
      the arrays in the order of `targets`.

    Raises:
      DamagedError: something is missing or is not what was written.
    """
    read: dict[str, Any] = {}
    stored = storable(targets)
    if stored:
        problem = ""
        try:
            # Not through a Checkpointer, which lets processes that could read wait for one that could not.
            with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
                read = names(handler.restore(epath.Path(folder / item), args=ocp.args.StandardRestore(stored)))
        except Exception as e:  # Orbax and TensorStore raise anything, bare Exception included
            there = (folder / item).is_dir()
            problem = f"{item} cannot be read ({one_line(e)})" if there else f"{item} is missing"
        agree(problem)  # before checksums, which all processes take together
    lacking = ""
    for name, target in targets.items():
        if not target.size:
            read[name] = _empty(target)
        elif name not in read or _signature(read[name]) != _signature(target):
            lacking = f"{item}: {name} is missing or has another shape"
    agree(lacking)
    read = {name: read[name] for name in targets}
    entries = meta["arrays"][item]
    wrong = [name for name, value in checksums(read).items() if value != entries[name]["checksum"]]
    # What lies whole in each process was read by each: the sums need not be the same.
    agree(f"{item}: the content of {some(wrong, ', ')} is not what was saved (wrong checksum)" if wrong else "")
    return read


def _empty(target: Any) -> Any:
    if isinstance(target, np.ndarray):
        return target
    return jnp.zeros(target.shape, target.dtype, device=target.sharding)


def as_named(meta: Mapping[str, Any], item: str, targets: Mapping[str, Any]) -> dict[str, Any]:
    """The targets of an item under the names that the checkpoint has for them, in the same order.

    Up to version 0.1 the state of the penalty was saved as ``objective``.
    """
    renamed = item == "rest" and any(name.startswith("objective/") for name in meta["arrays"][item])
    old = {name: re.sub("^penalty/", "objective/", name) if renamed else name for name in targets}
    return {old[name]: target for name, target in targets.items()}


def require_fit(
    folder: Path, meta: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]
) -> None:
    """Checks that the checkpoint holds exactly the arrays of the present configuration.

    Args:
      folder: of the checkpoint, for the message.
      meta: from `read_meta`.
      wanted: shapes and dtypes by name, per item.
      config: the present configuration.

    Raises:
      CheckpointError: names the config keys that changed, then the first arrays that differ.
    """
    wrong = []
    for item, targets in wanted.items():
        old = meta["arrays"][item]
        new = {name: _signature(x) for name, x in targets.items()}
        for name in [*new, *(name for name in old if name not in new)]:
            if name not in new:
                wrong.append(f"{name}: only in the checkpoint")
            elif name not in old:
                wrong.append(f"{name}: not in the checkpoint")
            elif any(old[name][k] != new[name][k] for k in ("shape", "dtype")):
                wrong.append(f"{name}: checkpoint {_show(old[name])}, config {_show(new[name])}")
    if wrong:
        changed = "; ".join(changes(meta, config)) or "none (another version of the code?)"
        raise CheckpointError(
            f"checkpoint {folder} does not fit this configuration. Changed keys: {changed}. Arrays that differ: "
            f"{some(wrong, '; ')}. Set these keys back, or choose another --workdir"
        )


def _show(entry: Mapping[str, Any]) -> str:
    shape = str(tuple(entry["shape"]))
    return shape if entry["dtype"] == "float32" else f"{shape} {entry['dtype']}"


def changes(meta: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Lists ``"key: old -> new"`` for every key that differs, except those that do not touch the training state."""
    return [line for line in changed_keys(meta["config"], config) if not line.startswith(IGNORED_CHANGES)]


def one_line(e: BaseException) -> str:
    """Returns what `e` says in one line, without TensorStore's long description of the array."""
    text = " ".join(str(e).split())
    for spec in (" [tensorstore_spec", " See full TensorStore details"):
        text = text.partition(spec)[0]
    if len(text) > 500:
        text = f"{text[:150]} ... {text[-300:]}"  # TensorStore says the cause last
    return f"{type(e).__name__}: {text}"


class _NotOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "asyncio":
            text = record.getMessage()
            return not ("never retrieved" in text and any(sign in text.lower() for sign in _ITS_FILES))
        return _ORBAX not in record.pathname


_ORBAX = f"{os.sep}orbax{os.sep}checkpoint{os.sep}"
_ITS_FILES = ("tensorstore", "orbax-checkpoint", _ORBAX)  # one of which an error about them names
_FILTER = _NotOrbax()


def quiet_orbax() -> None:
    """Keeps Orbax's own words out of the log and off the terminal; what it raises, we say in one line.

    It tells every step of its work at level INFO and prints the traceback of errors that it also raises. And when the
    read of one array fails it closes its event loop under all the others, each of which then prints a traceback.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_FILTER)  # a second time has no effect
    before = sys.unraisablehook
    if getattr(before, "__name__", "") == "no_orbax":
        return

    def no_orbax(args: sys.UnraisableHookArgs) -> None:
        code = getattr(args.object, "cr_code", None)
        if str(args.exc_value) != "Event loop is closed" and _ORBAX not in getattr(code, "co_filename", ""):
            before(args)

    sys.unraisablehook = no_orbax
