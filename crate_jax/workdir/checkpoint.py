"""Checkpoints: saved in the background, verified when read, the one before used if the newest is damaged.

A checkpoint is the folder ``workdir/checkpoints/STEP``, written by Orbax under a temporary name and renamed when it is
complete (what is in it: `crate_jax.workdir.checkpoint_files`). Orbax does not notice flipped bytes in array data, and
deletes old checkpoints file by file; so nothing that is read is used before its checksum was compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from crate_jax.errors import CheckpointError
from crate_jax.parallel import distributed
from crate_jax.parallel.parameters import names
from crate_jax.workdir import checkpoint_files as files
from crate_jax.workdir.folder import check_free_space, expanduser

PyTree = Any

FOLDER = "checkpoints"
REMOVE_SECONDS = 10.0  # for the remains of a save that failed
AVERAGES = "ema/"  # where `rest` holds the moving average of the parameters
DAMAGED = "damaged"  # where unusable checkpoints newer than the one used are moved to


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint: arrays placed as the abstract trees asked, `meta` with what `save` added to it."""

    step: int
    params: PyTree
    rest: PyTree
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: the run's folder; the caller holds its lock (`crate_jax.workdir.folder.lock`).
      keep: how many checkpoints stay; an older one is deleted only when a newer one is complete.

    Raises:
      CheckpointError: the folder cannot be created.
    """

    def __init__(self, workdir: str | os.PathLike[str], keep: int) -> None:
        files.quiet_orbax()
        self.folder = Path(workdir).absolute() / FOLDER
        self._saving: int | None = None  # the step whose save may still be running
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            _barrier("unfinished checkpoints removed")
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_names=(*files.ITEMS, files.META),
                options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
            )
        except OSError as e:
            raise CheckpointError(f"{self.folder}: cannot be used for checkpoints ({e.strerror})") from None

    def latest(self) -> int | None:
        """Returns the newest step on disk, verified or not; None if there is none."""
        return max(files.steps(self.folder), default=None)

    def save(self, step: int, params: PyTree, rest: PyTree, meta: Mapping[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied, so that their buffers may be donated at once.

        A step that is already on disk is left as it is.

        Args:
          step: optimiser steps done.
          params: nested dictionaries of arrays.
          rest: any tree of arrays, typed keys and numbers.
          meta: JSON-like; must hold the config under 'config'. 'step', 'versions' and 'arrays' are added.

        Raises:
          CheckpointError: this save, or the one before it, could not be written; those completed earlier are intact.
        """
        self.wait()
        if distributed.largest(int(step in files.steps(self.folder))):  # one host may see it before another
            return
        arrays = {"params": _arrays(params), "rest": _arrays(rest)}
        leaves = [x for item in arrays.values() for x in item.values()]
        # 4 KiB per array and 1 MiB in all: Orbax's own files and the file system's blocks.
        needed = sum(x.nbytes for x in leaves) + 4096 * len(leaves) + 2**20
        distributed.by_first(lambda: check_free_space(self.folder, needed))  # all stop, or none
        trees = {item: files.storable(x) for item, x in arrays.items()}
        items: dict[str, Any] = {item: ocp.args.StandardSave(tree) for item, tree in trees.items() if tree}
        items[files.META] = ocp.args.JsonSave(files.make_meta(step, meta, arrays))
        self._saving = step
        try:
            saved = self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as e:
            raise self._save_failed(e) from e
        if not saved:
            raise CheckpointError(
                f"checkpoint of step {step}: {self.folder} holds a later one, {self.latest()}; choose another --workdir"
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
          CheckpointError: checkpoints exist and none is usable, or the newest with a readable meta holds other arrays
            than the state of `config`.
        """
        self.wait()
        wanted = {"params": _targets(abstract_params), "rest": _targets(abstract_rest)}
        problems: dict[int, str] = {}
        for step in self._candidates():
            folder = self.folder / str(step)
            try:
                meta = files.read_meta(folder)
                named = {item: files.as_named(meta, item, targets) for item, targets in wanted.items()}
                files.require_fit(folder, meta, named, config)
                read = {item: files.read_arrays(folder, meta, item, targets) for item, targets in named.items()}
            except files.DamagedError as e:
                problems[step] = _warn_unusable(step, folder, e)
                continue
            self._set_aside(problems)
            changed = files.changes(meta, config)
            if changed:
                logging.warning("resuming step %d with a changed config: %s", step, "; ".join(changed))
            params = jax.tree.unflatten(jax.tree.structure(abstract_params), read["params"].values())
            rest = jax.tree.unflatten(jax.tree.structure(abstract_rest), read["rest"].values())
            return Restored(step, params, rest, meta)
        if problems:
            raise CheckpointError(_none_usable(self.folder, problems))
        return None

    def _candidates(self) -> Iterator[int]:
        """The steps on disk, newest first; one that any process sees, all go through."""
        step = -1
        while (step := distributed.largest(max(self._steps(below=step), default=-1))) >= 0:
            yield step

    def _steps(self, below: int) -> list[int]:
        return [step for step in files.steps(self.folder) if below < 0 or step < below]

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
            f"checkpoint of step {step} could not be written to {self.folder}: {files.one_line(e)}; "
            f"newest checkpoint there: {self.latest()}"
        )

    def _remove_unfinished(self) -> None:
        # Not left to Orbax, which does it in the background: a save starts by measuring the free space.
        if jax.process_index() == 0:
            # Its threads may still be writing other files of the step that failed.
            deadline = time.monotonic() + REMOVE_SECONDS
            while (left := list(self.folder.glob("*.orbax-checkpoint-tmp*"))) and time.monotonic() < deadline:
                for path in left:
                    shutil.rmtree(path, ignore_errors=True)
                if any(path.exists() for path in left):
                    time.sleep(0.1)

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
                logging.warning("moved the unusable checkpoint of step %d to %s", step, target)
        _barrier("damaged checkpoints set aside")
        self._manager.reload()


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _arrays(tree: PyTree) -> dict[str, jax.Array]:
    return {name: x if isinstance(x, jax.Array) else jnp.asarray(x) for name, x in names(tree).items()}


def _targets(tree: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here)
        for name, x in names(tree).items()
    }


def _warn_unusable(step: int, folder: Path, e: files.DamagedError) -> str:
    if e.told:
        logging.warning("checkpoint of step %d (%s) cannot be used: %s", step, folder, e)
    return str(e)


def _none_usable(folder: Path, problems: Mapping[int, str]) -> str:
    each = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
    return f"{folder}: no usable checkpoint ({each}); repair it, or choose another --workdir to start anew"


def read_params(
    workdir: str | os.PathLike[str], step: int | None = None, judged: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the verified parameters of a run, for `config.init_from` and for tools.

    Args:
      workdir: the run's folder, or its ``checkpoints`` folder. Nothing in it is changed.
      step: which checkpoint; None: the newest usable one.
      judged: those that evaluations use instead: a target network, moving averages, as the run's method says.

    Returns:
      nested dictionaries of NumPy arrays, and the checkpoint's meta.

    Raises:
      CheckpointError: no such folder or step, no checkpoint in it, or none that is usable.
    """
    files.quiet_orbax()
    folder = expanduser(workdir).absolute()
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected the workdir of another run")
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    steps = files.steps(folder)
    if not steps:
        raise CheckpointError(f"{folder}: holds no checkpoint; expected the workdir of a run that has saved one")
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder}: holds no checkpoint of step {step}; it holds {', '.join(map(str, steps))}")
    problems: dict[int, str] = {}
    for candidate in steps if step is None else [step]:
        try:
            meta = files.read_meta(folder / str(candidate))
            params = _read_params(folder / str(candidate), meta, judged)
        except files.DamagedError as e:
            problems[candidate] = _warn_unusable(candidate, folder / str(candidate), e)
        else:
            return files.nest(params), meta
    raise CheckpointError(_none_usable(folder, problems))


def _read_params(folder: Path, meta: dict[str, Any], judged: bool) -> dict[str, Any]:
    """The parameters by name, or those that evaluations use."""
    if not judged:
        return files.read_arrays(folder, meta, "params", files.host_targets(meta, "params"))
    places = meta.get("judged")
    if places is None:  # of a version whose methods carried nothing
        averages = [name for name in meta["arrays"]["rest"] if name.startswith(AVERAGES)]
        places = {name.removeprefix(AVERAGES): f"rest/{name}" for name in averages}
        places = places or {name: f"params/{name}" for name in meta["arrays"]["params"]}
    arrays: dict[str, Any] = {}
    for item in files.ITEMS:
        if any(place.startswith(f"{item}/") for place in places.values()):
            read = files.read_arrays(folder, meta, item, files.host_targets(meta, item))
            arrays |= {f"{item}/{name}": array for name, array in read.items()}
    return {name: arrays[place] for name, place in places.items()}


def params_sha256(params: PyTree) -> str:
    """Hashes names, dtypes, shapes and bytes of all arrays, in the order of their names.

    However they lie on devices. Arrays of which other processes hold a part are gathered one at a time; all processes
    must call it then.
    """
    digest = hashlib.sha256()
    for name, x in sorted(names(params).items()):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            x = multihost_utils.process_allgather(x, tiled=True)
        x = np.ascontiguousarray(jax.device_get(x))
        digest.update(f"{name} {x.dtype} {x.shape}\n".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()
