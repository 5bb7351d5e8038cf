"""One checkpoint on disk: its names, its meta, and how its arrays are read and verified.

The folder of a step holds the items ``params`` and ``rest``: arrays in nested dictionaries, whose keys are the names in
the state's tree, so that they can be read without the code that saved them. The item ``meta`` is JSON with the config,
the versions, and the shape, dtype and checksum of every array; a digest protects it.
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
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from crate_jax.errors import CheckpointError, some
from crate_jax.parallel import distributed
from crate_jax.parallel.parameters import names
from crate_jax.validation import changed_keys
from crate_jax.workdir.checksum import checksums


class _RootLogger:
    """A block in which nothing gives the root logger a handler, as absl does at its first message if there is none.

    After that `logging.basicConfig` of whoever uses the library would do nothing. In the block stands the handler that
    Python uses where there is none: what is printed stays the same.
    """

    def __init__(self) -> None:
        self.handler: logging.Handler | None = None

    def __enter__(self) -> None:
        if not logging.root.handlers:
            self.handler = logging.lastResort or logging.NullHandler()
            logging.root.addHandler(self.handler)

    def __exit__(self, *_: object) -> None:
        if self.handler is not None:
            logging.root.removeHandler(self.handler)
            self.handler = None


with _RootLogger():  # Orbax logs while it is imported
    import orbax.checkpoint as ocp

ITEMS = ("params", "rest")
META = "meta"
MAX_STEP = 2**31 - 1  # that processes can tell each other
VERSIONS_OF = ("crate-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
IGNORED_CHANGES = ("log.", "save.", "evaluation.", "mesh.")  # config keys that do not change the training state


class DamagedError(Exception):
    """What was read is not what was written.

    Attributes:
      logged_here: whether this process logs it: process 0 does, and the first process that noticed it.
    """

    def __init__(self, message: str, logged_here: bool = True) -> None:
        super().__init__(message)
        self.logged_here = logged_here


def agree(problem: str) -> None:
    """Raises in all processes if one of them has a problem, so that all continue with the same checkpoint.

    All processes must call it.

    Args:
      problem: this process's problem; '': it has none.

    Raises:
      DamagedError: a process has a problem.
    """
    me, everyone = distributed.process(), distributed.processes()
    first = -distributed.max_over_processes(-(me if problem else everyone))
    if first < everyone:
        raise DamagedError(problem or f"process {first} cannot read it, see its log", logged_here=me in (0, first))


def steps(folder: Path) -> list[int]:
    """Returns the steps whose complete checkpoints, damaged or not, are in `folder`, newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if is_step(p.name) and p.is_dir()), reverse=True)


def is_step(name: str) -> bool:
    """Returns whether the folder of a step has this name: ``7`` is one, ``007`` and other scripts' digits are not."""
    return re.fullmatch("0|[1-9][0-9]{0,9}", name) is not None and int(name) <= MAX_STEP


def strays(folder: Path) -> list[Path]:
    """Returns what is in `folder` under a number, or what Orbax or a person could take for one, and is no step's."""
    return sorted(p for p in folder.iterdir() if p.name.isdecimal() and not (is_step(p.name) and p.is_dir()))


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turns names with slashes into nested dictionaries.

    >>> nest({"encoder/norm/scale": 1.0, "encoder/norm/bias": 0.0})
    {'encoder': {'norm': {'scale': 1.0, 'bias': 0.0}}}
    """
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def storable(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dictionaries of one item, without arrays of size 0.

    Orbax refuses these arrays; only the meta holds them.
    """
    return nest({name: x for name, x in arrays.items() if x.size})


def make_meta(step: int, meta: Mapping[str, Any], arrays: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, Any]:
    """Returns `meta` with 'step', 'versions' and 'arrays' added and with a digest, as JSON that was written and read.

    Args:
      step: optimiser steps done.
      meta: a JSON-like mapping with the config under 'config'.
      arrays: the arrays of each item, by name.

    Raises:
      ValueError: `meta` has no 'config', which a later restore compares with its own config.
      TypeError: a value is neither JSON nor a ConfigDict.
    """
    if "config" not in meta:
        raise ValueError("checkpoint meta: the key 'config' is missing")
    entries = {}
    for item, leaves in arrays.items():
        sums = checksums(leaves)
        entries[item] = {name: {**_signature(x), "checksum": sums[name]} for name, x in leaves.items()}
    added = {"step": step, "versions": versions(), "arrays": entries}
    body = json.loads(json.dumps({**meta, **added}, default=_config_as_dict))
    return {"sha256": _digest(body), "body": body}


def versions() -> dict[str, str]:
    """The versions of this library and of the libraries that it computes with, by name."""
    found = {}
    for name in VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # this is a checkout that is not installed
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
      DamagedError: the meta is missing or is not what was written, or the folder has the name of another step.
    """
    path = folder / META / "metadata"
    stored: Any = None
    problem = ""
    try:
        if path.exists() and not path.is_file():  # to open a pipe could take for ever
            raise OSError(0, "not a regular file")
        stored = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(stored, dict) and set(stored) == {"sha256", "body"}
        if not whole or _digest(stored["body"]) != stored["sha256"]:
            problem = f"{path.relative_to(folder)} is not what was saved (wrong checksum)"
        elif not _is_complete(stored["body"]):
            problem = (
                f"{path.relative_to(folder)} is not in the format of this version; another version may have written it"
            )
        elif str(stored["body"]["step"]) != folder.name:
            problem = f"it is the checkpoint of step {stored['body']['step']}, under another name"
    except OSError as e:
        problem = f"{path.relative_to(folder)}: {e.strerror}"
    except (ValueError, RecursionError):
        problem = f"{path.relative_to(folder)} is not valid JSON"
    agree(problem)
    return stored["body"]


def _is_complete(body: Any) -> bool:
    """Returns whether a meta has the entries that are read: step, config, and each array's shape, dtype, checksum."""
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
    """Returns NumPy targets for `read_arrays`, with the shapes and dtypes in the meta.

    Raises:
      DamagedError: the meta has an impossible shape or dtype.
    """
    try:
        return {name: np.empty(e["shape"], jnp.dtype(e["dtype"])) for name, e in meta["arrays"][item].items()}
    except (TypeError, ValueError) as e:  # there is no such dtype, or the size is too large for an array
        raise DamagedError(f"{META}: {item} holds an impossible array ({one_line(e)})") from None


def read_arrays(folder: Path, meta: Mapping[str, Any], item: str, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Reads and verifies all arrays of one item; all processes must call it.

    Args:
      folder: the checkpoint's folder.
      meta: the result of `read_meta`.
      item: 'params' or 'rest'.
      targets: for each name a `jax.ShapeDtypeStruct` with a sharding, or a NumPy array if the array shall be read to
        the host.

    Returns:
      The arrays by name, in the order of `targets`.

    Raises:
      DamagedError: an array is missing or is not what was written.
    """
    read: dict[str, Any] = {}
    stored = storable(targets)
    if stored:
        problem = ""
        try:
            # A Checkpointer would not do: if one process cannot read, the others wait for it.
            with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
                read = names(handler.restore(epath.Path(folder / item), args=ocp.args.StandardRestore(stored)))
        except Exception as e:  # Orbax and TensorStore raise anything, bare Exception included
            orbax_failed()
            there = (folder / item).is_dir()
            problem = f"{item} cannot be read ({one_line(e)})" if there else f"{item} is missing"
        agree(problem)  # before the checksums, which all processes compute together
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
    # Each process has read its own copy of a replicated array, so the processes may find different sums.
    agree(f"{item}: the content of {some(wrong, ', ')} is not what was saved (wrong checksum)" if wrong else "")
    return read


def _empty(target: Any) -> Any:
    if isinstance(target, np.ndarray):
        return target
    return jnp.zeros(target.shape, target.dtype, device=target.sharding)


def with_saved_names(meta: Mapping[str, Any], item: str, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the targets of an item, in the same order, under the names that the checkpoint uses.

    Version 0.1 and earlier saved the state of the penalty as ``objective``.
    """
    renamed = item == "rest" and any(name.startswith("objective/") for name in meta["arrays"][item])
    old = {name: re.sub("^penalty/", "objective/", name) if renamed else name for name in targets}
    return {old[name]: target for name, target in targets.items()}


def require_fit(
    folder: Path, meta: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]
) -> None:
    """Checks that the checkpoint holds exactly the arrays of the present configuration.

    Args:
      folder: the checkpoint's folder, for the message.
      meta: the result of `read_meta`.
      wanted: for each item, arrays with the present shapes and dtypes, by name.
      config: the present configuration.

    Raises:
      CheckpointError: an array differs; the message names the config keys that changed, then the first such arrays.
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
            f"{some(wrong, '; ')}. Set back the keys on which these arrays depend, or choose another "
            "--workdir"
        )


def _show(entry: Mapping[str, Any]) -> str:
    shape = str(tuple(entry["shape"]))
    return shape if entry["dtype"] == "float32" else f"{shape} {entry['dtype']}"


def changes(meta: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Lists ``"key: old -> new"`` for every changed key, except keys that do not change the training state."""
    return [line for line in changed_keys(meta["config"], config) if not line.startswith(IGNORED_CHANGES)]


def one_line(e: BaseException) -> str:
    """Returns the type and the text of `e` in one line, without TensorStore's long description of the array.

    >>> one_line(ValueError("damaged   file"))
    'ValueError: damaged file'
    """
    text = " ".join(str(e).split())
    for spec in (" [tensorstore_spec", " See full TensorStore details"):
        text = text.partition(spec)[0]
    if len(text) > 500:
        text = f"{text[:150]} ... {text[-300:]}"  # TensorStore names the cause last
    return f"{type(e).__name__}: {text}"


_ORBAX = f"{os.sep}orbax{os.sep}checkpoint{os.sep}"
_ITS_FILES = ("tensorstore", "orbax-checkpoint", _ORBAX)  # an error about Orbax's files names one of these


class _NotOrbax(logging.Filter):
    """Lets a record through if neither Orbax nor asyncio on behalf of Orbax made it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "asyncio":
            text = record.getMessage()
            return not ("never retrieved" in text and any(sign in text.lower() for sign in _ITS_FILES))
        return _ORBAX not in record.pathname


class _Quiet:
    """What `quiet_orbax` changes in this process, and how often it is open."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.opened = 0
        self.failed = False  # whether Orbax failed, so that its threads may still print
        self.filter = _NotOrbax()
        self.hook: Callable[[sys.UnraisableHookArgs], Any] | None = None  # ours
        self.before = sys.unraisablehook
        self.raw_bytes: Callable[..., int] | None = None
        self.root = _RootLogger()

    def __enter__(self) -> None:
        with self.lock:
            self.opened += 1
            if self.opened == 1:
                self.begin()

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.opened -= 1
            if not self.opened:
                self.end()

    def begin(self) -> None:
        self.root.__enter__()
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(self.filter)  # to add it again has no effect
        if sys.unraisablehook is not self.hook:
            self.before = sys.unraisablehook
            sys.unraisablehook = self.hook = self.make_hook(self.before)
        with contextlib.suppress(ImportError, AttributeError):  # another version of Orbax has it elsewhere
            from orbax.checkpoint._src.serialization import tensorstore_utils

            self.raw_bytes, tensorstore_utils.get_tensorstore_raw_bytes = (
                tensorstore_utils.get_tensorstore_raw_bytes, no_bytes,
            )  # fmt: skip

    def end(self) -> None:
        self.root.__exit__()
        logging.getLogger("absl").removeFilter(self.filter)
        if not self.failed:
            logging.getLogger("asyncio").removeFilter(self.filter)
            if sys.unraisablehook is self.hook:  # else somebody's hook may call ours
                sys.unraisablehook = self.before
        if self.raw_bytes is not None:
            from orbax.checkpoint._src.serialization import tensorstore_utils

            if tensorstore_utils.get_tensorstore_raw_bytes is no_bytes:
                tensorstore_utils.get_tensorstore_raw_bytes = self.raw_bytes

    def make_hook(self, before: Callable[[sys.UnraisableHookArgs], Any]) -> Callable[[sys.UnraisableHookArgs], Any]:
        """A new function each time: one that was used before may be called by `before`."""
        sign = _ORBAX  # when Python ends, it is not there any more

        def no_orbax(args: sys.UnraisableHookArgs) -> None:
            code = getattr(args.object, "cr_code", None)
            of_orbax = str(args.exc_value) == "Event loop is closed" or sign in getattr(code, "co_filename", "")
            if not (of_orbax and (self.opened or self.failed)):
                before(args)

        return no_orbax


def no_bytes(direction: Any = None) -> int:
    """Stands for a function of Orbax that asks TensorStore at each save how much it has written, for a message.

    TensorStore never frees the lists in which it answers: about 40 kB per save.
    """
    return 0


_QUIET = _Quiet()


def quiet_orbax() -> contextlib.AbstractContextManager[None]:
    """A block that keeps Orbax's messages off log and terminal; we report the errors that it raises in one line.

    Orbax logs every step of its work at level INFO, and prints the traceback of errors that it also raises. When it
    fails to read one array it closes its event loop while it reads others, and each of these prints a traceback.

    This holds for the whole process, so it ends with the last of the blocks, which may be nested and in several
    threads. After a failure of Orbax's in a block (`orbax_failed`), what hides tracebacks of its background work stays:
    they come when its reads end, or when Python collects them, whenever that is.
    """
    return _QUIET


def orbax_failed() -> None:
    """Says that Orbax has raised an error in a block of `quiet_orbax`."""
    _QUIET.failed = True
