"""Checkpoints: saved in the background, verified when read, the one before used if the newest is damaged.

A checkpoint is the folder ``workdir/checkpoints/STEP``, written by Orbax under a temporary name and renamed when complete. It
holds three items: ``params``, ``rest`` (everything else of the training state) and ``meta`` (JSON). Both array items are nested
dictionaries whose keys are the names of the state's own tree, so that a checkpoint can be read without the code that made it.

Orbax does not notice flipped bytes in array data, and deletes old checkpoints file by file. So ``meta`` carries a checksum of
every array and of itself, and nothing that is read is used before it was verified.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from crate_jax import config as config_lib
from crate_jax.errors import CheckpointError
from crate_jax.workdir import check_free_space

PyTree = Any

FOLDER = "checkpoints"
DAMAGED = "damaged"  # where unusable checkpoints newer than the one used are moved to
IGNORED_CHANGES = ("log.", "checkpoint.", "evaluation.")  # config keys that do not touch the training state
VERSIONS_OF = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_ITEMS = ("params", "rest")
_SHOWN = 5  # arrays named in one message

log = logging.getLogger(__name__)


class _DamagedError(Exception):
    """What was read is not what was written."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint: arrays placed as the abstract trees asked, `meta` as given to `save` plus what it added."""

    step: int
    params: PyTree
    rest: PyTree
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: the run's folder; the caller holds its lock (`crate_jax.workdir.lock`).
      keep: how many checkpoints stay; an older one is deleted only when a newer one is complete.

    Raises:
      CheckpointError: the folder cannot be created.
    """

    def __init__(self, workdir: str | os.PathLike[str], keep: int) -> None:
        _quiet_orbax()
        self.folder = Path(workdir).absolute() / FOLDER
        self._saving: int | None = None  # the step whose save may still be running
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_names=(*_ITEMS, "meta"),
                options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
            )
        except OSError as e:
            raise CheckpointError(f"{self.folder}: cannot be used for checkpoints ({e.strerror})") from None

    def latest(self) -> int | None:
        """Returns the newest step on disk, verified or not; None if there is none."""
        return max(_steps(self.folder), default=None)

    def save(self, step: int, params: PyTree, rest: PyTree, meta: Mapping[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied, so that their buffers may be donated at once.

        A step that is already on disk is left as it is.

        Args:
          step: optimiser steps done.
          params: nested dictionaries of arrays.
          rest: any tree of arrays, typed keys and numbers.
          meta: JSON-like; must hold the config under 'config'. 'step', 'versions' and 'arrays' are added.

        Raises:
          CheckpointError: this save, or the one before it, could not be written; checkpoints completed earlier are intact.
        """
        self.wait()
        if step in _steps(self.folder):
            return
        arrays = {"params": _arrays(params), "rest": _arrays(rest)}
        count = sum(len(leaves) for leaves in arrays.values())
        # 4 KiB per array and 1 MiB in all: Orbax's own files and the file system's blocks.
        size = sum(x.nbytes for leaves in arrays.values() for x in leaves.values())
        check_free_space(self.folder, size + 4096 * count + 2**20)
        items = {name: ocp.args.StandardSave(_nest(_not_empty(leaves))) for name, leaves in arrays.items()}
        self._saving = step
        try:
            saved = self._manager.save(
                step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(_seal(step, meta, arrays)))
            )
        except Exception as e:
            raise self._save_failed(e) from e
        if not saved:
            raise CheckpointError(
                f"checkpoint of step {step}: {self.folder} holds a newer one, step {self.latest()}; use another workdir"
            )

    def restore(self, abstract_params: PyTree, abstract_rest: PyTree, config: Mapping[str, Any]) -> Restored | None:
        """Reads the newest usable checkpoint.

        Unusable ones are named in the log; those newer than the one used are moved to ``checkpoints/damaged``, so
        that the run can save these steps again.

        Args:
          abstract_params: tree of `jax.ShapeDtypeStruct` (or arrays); their shardings say where to place what is read.
          abstract_rest: the same for `rest`.
          config: the present configuration.

        Returns:
          the checkpoint, or None if the folder holds none at all.

        Raises:
          CheckpointError: checkpoints exist and none is usable, or the state of `config` has other arrays than the checkpoint.
        """
        self.wait()
        wanted = {"params": _targets(abstract_params), "rest": _targets(abstract_rest)}
        problems: dict[int, str] = {}
        for step in sorted(_steps(self.folder), reverse=True):
            folder = self.folder / str(step)
            try:
                meta = _read_meta(folder)
                _require_fit(folder, meta, wanted, config)
                read = {item: _read(folder, meta, item, targets) for item, targets in wanted.items()}
            except CheckpointError:
                raise
            except Exception as e:  # Orbax and TensorStore raise anything, bare Exception included
                problems[step] = _one_line(e)
                log.warning("checkpoint of step %d (%s) cannot be used: %s", step, folder, problems[step])
                continue
            self._set_aside(problems)
            changed = _changes(meta["config"], config)
            if changed:
                log.warning("resuming step %d with a changed config: %s", step, "; ".join(changed))
            params = jax.tree.unflatten(jax.tree.structure(abstract_params), read["params"].values())
            rest = jax.tree.unflatten(jax.tree.structure(abstract_rest), read["rest"].values())
            return Restored(step, params, rest, meta)
        if problems:
            raise CheckpointError(_none_usable(self.folder, problems))
        return None

    def wait(self) -> None:
        """Waits for the running save.

        Raises:
          CheckpointError: that save could not be written.
        """
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._save_failed(e) from e
        self._saving = None

    def close(self) -> None:
        """Waits for the running save and ends the background threads; raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _save_failed(self, e: Exception) -> CheckpointError:
        step, self._saving = self._saving, None
        self._remove_unfinished()  # a full disk has its room back
        self._manager.reload()
        return CheckpointError(
            f"checkpoint of step {step} could not be written to {self.folder}: {_one_line(e)}; "
            f"newest checkpoint there: {self.latest()}"
        )

    def _remove_unfinished(self) -> None:
        # Done here and not by Orbax, which does it in the background: free space is measured before a save.
        if jax.process_index() == 0:
            for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)

    def _set_aside(self, steps: Iterable[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                (self.folder / DAMAGED).mkdir(exist_ok=True)
                target = self.folder / DAMAGED / str(step)
                copy = 0
                while target.exists():
                    copy += 1
                    target = target.with_name(f"{step}.{copy}")
                (self.folder / str(step)).rename(target)
                log.warning("moved the unusable checkpoint of step %d to %s", step, target)
        self._manager.reload()


def read_params(workdir: str | os.PathLike[str], step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the verified parameters of a run, for `config.init_from` and for tools.

    Args:
      workdir: the run's folder, or its ``checkpoints`` folder. Nothing in it is changed.
      step: which checkpoint; None: the newest usable one.

    Returns:
      nested dictionaries of NumPy arrays, and the checkpoint's meta.

    Raises:
      CheckpointError: no such folder or step, no checkpoint in it, or none that is usable.
    """
    _quiet_orbax()
    folder = Path(workdir).expanduser().absolute()
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected the workdir of another run")
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    steps = sorted(_steps(folder), reverse=True)
    if not steps:
        raise CheckpointError(f"{folder}: holds no checkpoint; expected the workdir of a run that has saved one")
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder}: holds no checkpoint of step {step}; it holds {', '.join(map(str, steps))}")
    problems: dict[int, str] = {}
    for candidate in steps if step is None else [step]:
        try:
            meta = _read_meta(folder / str(candidate))
            entries = meta["arrays"]["params"]
            targets = {name: np.empty(e["shape"], jnp.dtype(e["dtype"])) for name, e in entries.items()}
            return _nest(_read(folder / str(candidate), meta, "params", targets)), meta
        except Exception as e:
            problems[candidate] = _one_line(e)
            log.warning("checkpoint of step %d (%s) cannot be used: %s", candidate, folder / str(candidate), _one_line(e))
    raise CheckpointError(_none_usable(folder, problems))


def init_encoder(params: PyTree, other: PyTree, what: str) -> PyTree:
    """Returns `params` with the encoder's arrays replaced by those of another run's parameters.

    A `mask_token` on one side only is allowed: whether there is one depends on the corruption, not on the encoder.

    Args:
      params: nested dictionaries with the key 'encoder'; dtypes and shardings stay as they are here.
      other: the same, as from `read_params`.
      what: where `other` comes from, for messages, such as ``"config.init_from=DIR"``.

    Raises:
      CheckpointError: lists every array that is missing, unexpected or of another shape.
    """
    if not isinstance(other, Mapping) or "encoder" not in other:
        raise CheckpointError(f"{what}: its parameters have no 'encoder'")
    ours, theirs = flatten(params["encoder"]), flatten(other["encoder"])
    wrong = []
    for name in sorted(ours.keys() ^ theirs.keys()):
        side, has = ("this run", "lacks") if name in theirs else ("this run", "has")
        if name.split("/")[-1] == "mask_token":
            log.info("%s: %s encoder/%s only on one side; %s %s it", what, "found", name, side, has)
        else:
            wrong.append(f"encoder/{name}: {'not in this configuration' if name in theirs else 'not in the checkpoint'}")
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name].shape != theirs[name].shape:
            wrong.append(f"encoder/{name}: checkpoint {theirs[name].shape}, config {ours[name].shape}")
    if wrong:
        raise CheckpointError(f"{what}: its encoder does not fit: {'; '.join(wrong)}")
    replaced = [_placed_like(theirs[name], leaf) if name in theirs else leaf for name, leaf in ours.items()]
    return {**params, "encoder": jax.tree.unflatten(jax.tree.structure(params["encoder"]), replaced)}


def _placed_like(value: Any, leaf: Any) -> Any:
    value = np.asarray(value).astype(leaf.dtype)
    return jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value


def params_sha256(params: PyTree) -> str:
    """Hashes names, dtypes, shapes and bytes of all arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name, x in sorted(flatten(params).items()):
        x = np.ascontiguousarray(jax.device_get(x))
        digest.update(f"{name} {x.dtype} {x.shape}\n".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()


# --- names ---------------------------------------------------------------------------------------


def flatten(tree: PyTree) -> dict[str, Any]:
    """Flattens a tree to ``{"encoder/blocks/attention/kernel": leaf}``, in the tree's own order of leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def _steps(folder: Path) -> list[int]:
    return [int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()] if folder.is_dir() else []


# --- arrays ---------------------------------------------------------------------------------------


def _arrays(tree: PyTree) -> dict[str, jax.Array]:
    return {name: x if isinstance(x, jax.Array) else jnp.asarray(x) for name, x in flatten(tree).items()}


def _targets(tree: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here)
        for name, x in flatten(tree).items()
    }


def _not_empty(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in leaves.items() if x.size}  # Orbax refuses arrays of size 0


def _mix(x: jax.Array) -> jax.Array:
    """A bijection on uint32 in which each input bit moves about half of the output bits (MurmurHash3's finaliser)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array of real numbers or keys as uint32, one word per element (several, on a last axis, if it is wider)."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = 8 * x.dtype.itemsize
    if bits == 64:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    """Two 32-bit checksums per array, [len(leaves), 2] uint32.

    Each word is mixed with its position by a bijection before the sums modulo 2**32. So any change to one word
    changes the first sum for certain, and any other change (swapped or shifted blocks included) goes unseen with
    probability 2**-64. Integer sums have no order: neither sharding nor device count matters, and each device
    reads only what it holds.
    """
    out = []
    for x in leaves:
        words = _words(x)
        index = jnp.zeros(words.shape, jnp.uint32)
        stride = 1
        for axis in reversed(range(words.ndim)):
            index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
            stride *= words.shape[axis]
        position = _mix(index + np.uint32(0x9E3779B9))
        mixed = _mix(words ^ position)
        out.append(jnp.stack([jnp.sum(s, dtype=jnp.uint32) for s in (mixed, mixed * (position | 1))]))
    return jnp.stack(out)


def checksums(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Returns 16 hexadecimal digits per array, computed on the device the arrays are on."""
    if not leaves:
        return {}
    sums = np.asarray(_sums(list(leaves.values())))
    return {name: f"{a:08x}{b:08x}" for name, (a, b) in zip(leaves, sums.tolist(), strict=True)}


# --- meta -----------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back: tuples as lists, a ConfigDict as a dictionary."""

    def convert(x: Any) -> Any:
        if isinstance(x, ConfigDict):
            return x.to_dict()
        raise TypeError(f"checkpoint meta: {type(x).__name__} cannot be written as JSON")

    return json.loads(json.dumps(value, default=convert))


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _seal(step: int, meta: Mapping[str, Any], arrays: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, Any]:
    entries = {}
    for item, leaves in arrays.items():
        sums = checksums(leaves)
        entries[item] = {name: {**_signature(x), "checksum": sums[name]} for name, x in leaves.items()}
    versions = {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    body = _plain({**meta, "step": step, "versions": versions, "arrays": entries})
    return {"sha256": _digest(body), "body": body}


def _signature(x: Any) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta" / "metadata"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _DamagedError("meta/metadata is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise _DamagedError("meta/metadata is not valid JSON") from None
    if not isinstance(stored, dict) or set(stored) != {"sha256", "body"} or _digest(stored["body"]) != stored["sha256"]:
        raise _DamagedError("meta/metadata is not what was saved (wrong checksum)")
    return stored["body"]


# --- reading ----------------------------------------------------------------------------------------


def _read(folder: Path, meta: Mapping[str, Any], item: str, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Reads and verifies one item, in the order of `targets`; any exception means that it is damaged."""
    if not (folder / item).is_dir():
        raise _DamagedError(f"{item} is missing")
    read: dict[str, Any] = {}
    stored = _not_empty(targets)
    if stored:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            read = flatten(checkpointer.restore(folder / item, args=ocp.args.StandardRestore(_nest(stored))))
    for name, target in targets.items():
        if not target.size:
            read[name] = target if isinstance(target, np.ndarray) else jnp.zeros(target.shape, target.dtype, device=target.sharding)
        elif name not in read or _signature(read[name]) != _signature(target):
            raise _DamagedError(f"{item}: {name} is missing or has another shape")
    read = {name: read[name] for name in targets}
    entries = meta["arrays"][item]
    wrong = [name for name, value in checksums(read).items() if value != entries[name]["checksum"]]
    if wrong:
        raise _DamagedError(f"{item}: the content of {_some(wrong, ', ')} is not what was saved (wrong checksum)")
    return read


def _require_fit(
    folder: Path, meta: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]
) -> None:
    wrong = []
    for item, targets in wanted.items():
        old = meta["arrays"][item]
        new = {name: _signature(x) for name, x in targets.items()}
        for name in sorted(old.keys() | new.keys()):
            if name not in new:
                wrong.append(f"{name}: only in the checkpoint")
            elif name not in old:
                wrong.append(f"{name}: not in the checkpoint")
            elif any(old[name][k] != new[name][k] for k in ("shape", "dtype")):
                wrong.append(f"{name}: checkpoint {_show(old[name])}, config {_show(new[name])}")
    if wrong:
        changed = _changes(meta["config"], config)
        raise CheckpointError(
            f"checkpoint {folder} does not fit this configuration. Changed keys: "
            f"{'; '.join(changed) or 'none (another version of the code?)'}. Arrays that differ: {_some(wrong, '; ')}. "
            "Set these keys back, or choose another --workdir"
        )


def _show(entry: Mapping[str, Any]) -> str:
    shape = tuple(entry["shape"])
    return f"{shape}" if entry["dtype"] == "float32" else f"{shape} {entry['dtype']}"


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [line for line in config_lib.changed_keys(old, new) if not line.startswith(IGNORED_CHANGES)]


def _some(names: list[str], separator: str) -> str:
    more = f"{separator}and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more


def _none_usable(folder: Path, problems: Mapping[int, str]) -> str:
    each = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
    return f"{folder}: no usable checkpoint ({each}). Move the folder away to start from the beginning"


def _one_line(e: BaseException) -> str:
    if isinstance(e, _DamagedError):
        return str(e)
    text = " ".join(str(e).split())
    return f"{type(e).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


class _NoOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


def _quiet_orbax() -> None:
    # Orbax tells every step of its work through absl, and prints the traceback of errors that it also
    # raises; these reach the user as one line of ours.
    absl = logging.getLogger("absl")
    if not any(isinstance(f, _NoOrbax) for f in absl.filters):
        absl.addFilter(_NoOrbax())
