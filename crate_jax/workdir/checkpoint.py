"""Checkpoints are saved in the background and verified when read; if the newest is damaged, an older one is used.

A checkpoint is the folder ``workdir/checkpoints/STEP`` (`crate_jax.workdir.checkpoint_files` says what it holds). Orbax
writes it under a temporary name and renames it when it is complete. Orbax does not notice flipped bytes in array data,
and it deletes old checkpoints file by file; so we compare checksums before we use what was read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from crate_jax.errors import CheckpointError
from crate_jax.parallel import distributed
from crate_jax.parallel.parameters import names
from crate_jax.validation import flatten
from crate_jax.workdir import bucket, checkpoint_files as files, starts
from crate_jax.workdir.checkpoint_files import ocp
from crate_jax.workdir.folder import check_free_space, expanduser, readable

log = logging.getLogger(__name__)

PyTree = Any

FOLDER = "checkpoints"
REMOVE_SECONDS = 10.0  # time to remove the files of a save that failed
AVERAGES = "ema/"  # how the names of the parameters' moving averages begin in `rest`
PATTERN = "*?[\\"  # characters of patterns of file names
DAMAGED = "damaged"  # the folder to which unusable checkpoints are moved that are newer than the one used


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint.

    Attributes:
      step: optimiser steps done.
      params: the parameters, placed as the abstract tree says.
      rest: the rest of the state, placed as the abstract tree says.
      meta: the meta that was saved, with the keys that `save` added.
      other_run: the id of the run that saved it, if that is not the workdir's run.
    """

    step: int
    params: PyTree
    rest: PyTree
    meta: dict[str, Any]
    other_run: str = ""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: the run's folder; the caller holds its lock (`crate_jax.workdir.folder.lock`).
      keep: number of checkpoints to keep; an older one is deleted only when a newer one is complete.

    Attributes:
      folder: where the checkpoints are.
      run: the run's id, the same in every process; '' before `restore` if no start of the run is on record.

    Raises:
      CheckpointError: the folder cannot be created, something in the way of a checkpoint cannot be moved, or Orbax
        cannot save into a folder of this name.
    """

    def __init__(self, workdir: str | os.PathLike[str], keep: int) -> None:
        self.folder = Path(workdir).absolute() / FOLDER
        # Orbax looks for the parts of a checkpoint by a pattern that begins with this path. With such a character it
        # finds none, and saves without an error what nothing can read.
        if set(PATTERN) & set(str(self.folder)):
            raise CheckpointError(
                f"workdir {self.folder.parent}: its path must not have one of the characters {' '.join(PATTERN)}, "
                "since checkpoints there could not be read; choose another --workdir"
            )
        self._saving: int | None = None  # the step whose save may still be running
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.quiet_orbax())
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_unfinished()
                distributed.run_in_first(self._move_strays)
                self._manager = ocp.CheckpointManager(
                    self.folder,
                    item_names=(*files.ITEMS, files.META),
                    options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
                )
            except OSError as e:
                raise CheckpointError(f"{self.folder}: cannot be used for checkpoints ({e.strerror})") from None
            self.run = distributed.text_of_first(starts.run_of(self.folder.parent) if distributed.first() else "")
            self._quiet = stack.pop_all()  # until `close`, since Orbax saves in the background

    def latest(self) -> int | None:
        """Returns the step of the newest checkpoint on disk, verified or not; None if there is none."""
        return max(files.steps(self.folder), default=None)

    def save(self, step: int, params: PyTree, rest: PyTree, meta: Mapping[str, Any]) -> None:
        """Starts to save and returns when the arrays are copied, so that their buffers may be donated at once.

        If a checkpoint of this step is on disk, nothing is done.

        Args:
          step: optimiser steps done.
          params: nested dictionaries of arrays.
          rest: any tree of arrays, typed keys and numbers.
          meta: a JSON-like mapping with the config under 'config'. 'run', 'step', 'versions' and 'arrays' are added.

        Raises:
          CheckpointError: this save, or the one before it, could not be written; earlier checkpoints are intact.
        """
        self.wait()
        # One host may see the folder before another.
        if distributed.max_over_processes(int(step in files.steps(self.folder))):
            return
        arrays = {"params": _arrays(params), "rest": _arrays(rest)}
        leaves = [x for item in arrays.values() for x in item.values()]
        # 4 KiB per array and 1 MiB once are for Orbax's own files and the file system's blocks.
        needed = sum(x.nbytes for x in leaves) + 4096 * len(leaves) + 2**20
        distributed.run_in_first(lambda: check_free_space(self.folder, needed))  # it raises in all processes or in none
        trees = {item: files.storable(x) for item, x in arrays.items()}
        items: dict[str, Any] = {item: ocp.args.StandardSave(tree) for item, tree in trees.items() if tree}
        items[files.META] = ocp.args.JsonSave(files.make_meta(step, {**meta, starts.RUN: self.run}, arrays))
        self._saving = step
        try:
            saved = self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as e:
            raise self._save_failed(e) from e
        if not saved:
            raise CheckpointError(
                f"checkpoint of step {step}: {self.folder} holds a later one, of step {self.latest()}; choose "
                "another --workdir"
            )

    def restore(self, abstract_params: PyTree, abstract_rest: PyTree, config: Mapping[str, Any]) -> Restored | None:
        """Reads the newest usable checkpoint, which may be another run's: `Restored.other_run` says so.

        The log names unusable checkpoints; those newer than the one used are moved to ``checkpoints/damaged``, so that
        the run can save these steps again.

        Args:
          abstract_params: a tree of `jax.ShapeDtypeStruct` (or arrays), like the parameters; their shardings say where
            to place the arrays that are read.
          abstract_rest: such a tree, like the rest of the state.
          config: the present configuration.

        Returns:
          The checkpoint, or None if the folder holds no checkpoint.

        Raises:
          CheckpointError: checkpoints exist but none is usable, or the newest one with a readable meta does not hold
            the arrays that `config` needs.
        """
        self.wait()
        wanted = {"params": _targets(abstract_params), "rest": _targets(abstract_rest)}
        problems: dict[int, str] = {}
        for step in self._candidates():
            folder = self.folder / str(step)
            try:
                meta = files.read_meta(folder)
                named = {item: files.with_saved_names(meta, item, targets) for item, targets in wanted.items()}
                files.require_fit(folder, meta, named, config)
                read = {item: files.read_arrays(folder, meta, item, targets) for item, targets in named.items()}
            except files.DamagedError as e:
                problems[step] = _warn_unusable(step, folder, e)
                continue
            self._set_aside(problems, step)
            known = flatten(meta["config"])  # a key that came later had no other value than its default
            changed = [change for change in files.changes(meta, config) if change.partition(":")[0] in known]
            if changed:
                log.warning("resuming step %d with a changed config: %s", step, "; ".join(changed))
            params = jax.tree.unflatten(jax.tree.structure(abstract_params), read["params"].values())
            rest = jax.tree.unflatten(jax.tree.structure(abstract_rest), read["rest"].values())
            its_run = meta.get(starts.RUN, "")  # a version without ids saved it
            self._know_run(its_run)
            return Restored(step, params, rest, meta, its_run if its_run != self.run else "")
        if problems:
            raise CheckpointError(_none_usable(self.folder, problems))
        self._know_run("")
        return None

    def _know_run(self, found: str) -> None:
        self.run = self.run or found or distributed.text_of_first(starts.new_run())

    def _candidates(self) -> Iterator[int]:
        """Yields the steps on disk, newest first; every process yields a step that any process sees."""
        step = -1
        while (step := distributed.max_over_processes(max(self._steps(below=step), default=-1))) >= 0:
            yield step

    def _steps(self, below: int) -> list[int]:
        return [step for step in files.steps(self.folder) if below < 0 or step < below]

    def wait(self) -> None:
        """Waits for the running save.

        Raises:
          CheckpointError: this save could not be written.
        """
        if self._saving is None:
            return
        step = self._saving
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            failed = self._save_failed(e)
            if not isinstance(e, OSError) or step not in files.steps(self.folder):
                raise failed from e
            # It is under its name, so it is complete: what failed came after it.
            log.warning("checkpoint of step %d is saved; an older one cannot be deleted: %s", step, files.one_line(e))
        self._saving = None

    def close(self) -> None:
        """Waits for the running save and ends the background threads.

        Raises:
          CheckpointError: this save could not be written.
        """
        try:
            self.wait()
        finally:
            with self._quiet:
                self._manager.close()

    def _save_failed(self, e: Exception) -> CheckpointError:
        files.orbax_failed()
        step, self._saving = self._saving, None
        self._remove_unfinished()  # this frees space on a full disk
        self._manager.reload()
        return CheckpointError(
            f"checkpoint of step {step} could not be written to {self.folder}: {files.one_line(e)}; "
            f"newest checkpoint there: {self.latest()}"
        )

    def _remove_unfinished(self) -> None:
        # Orbax would do it in the background, too late: a save first measures the free space.
        if distributed.first():
            # Threads of Orbax may still be writing other files of the step that failed.
            deadline = time.monotonic() + REMOVE_SECONDS
            while (left := list(self.folder.glob("*.orbax-checkpoint-tmp*"))) and time.monotonic() < deadline:
                for path in left:
                    shutil.rmtree(path, ignore_errors=True)
                if any(path.exists() for path in left):
                    time.sleep(0.1)

    def _set_aside(self, steps: Iterable[int], used: int) -> None:
        """Moves unusable checkpoints away; the run goes on from the step `used`."""

        def move() -> None:
            for step in steps:
                target = _move_away(self.folder / str(step))
                log.warning(
                    "moved the unusable checkpoint of step %d to %s; the run goes on from step %d, and the steps from "
                    "there to %d are done again", step, target, used, step,
                )  # fmt: skip

        distributed.run_in_first(move)
        self._manager.reload()

    def _move_strays(self) -> None:
        for path in files.strays(self.folder):
            log.warning("moved %s, which is no checkpoint, to %s", path, _move_away(path))


def _move_away(path: Path) -> Path:
    """Moves a checkpoint into the folder DAMAGED, or gives it another name where it is; returns the new path.

    Who may not write to a folder may not move it into another one, but may rename it.

    Raises:
      CheckpointError: neither is possible.
    """
    for target in (path.parent / DAMAGED / path.name, path.with_name(f"{path.name}.{DAMAGED}")):
        try:
            target.parent.mkdir(exist_ok=True)
            free, copy = target, 0
            while os.path.lexists(free):
                copy += 1
                free = target.with_name(f"{target.name}.{copy}")
            return path.rename(free)
        except OSError as e:
            problem = e.strerror
    raise CheckpointError(
        f"{path}: cannot be used, nor moved away ({problem}); move it, and run the same command again"
    )


def _arrays(tree: PyTree) -> dict[str, jax.Array]:
    return {name: x if isinstance(x, jax.Array) else jnp.asarray(x) for name, x in names(tree).items()}


def _targets(tree: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here)
        for name, x in names(tree).items()
    }


def _warn_unusable(step: int, folder: Path, e: files.DamagedError) -> str:
    if e.logged_here:
        log.warning("checkpoint of step %d (%s) cannot be used: %s", step, folder, e)
    return str(e)


def _none_usable(folder: Path, problems: Mapping[int, str]) -> str:
    each = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
    return f"{folder}: no usable checkpoint ({each}); repair it, or choose another --workdir to start anew"


def of_step(path: str | os.PathLike[str]) -> tuple[str, int] | None:
    """The run and the step, if a path names one checkpoint of a run, ``RUN/checkpoints/STEP``, here or in a bucket.

    Args:
      path: any path or address that a user gives for weights.

    Returns:
      The run's workdir and the step, which need not be there; None for other paths, also for a folder of such a name
      that holds something else, such as the workdir of a run.

    Raises:
      UserError: the home folder of the path is not known, or its bucket cannot be read.
    """
    if bucket.is_address(path):
        address = os.fspath(path).rstrip("/")
        run, _, last = address.rpartition(f"/{FOLDER}/")
        if not bucket.is_address(run) or not files.is_step(last):
            return None
        inside = {name.partition("/")[0] for name in bucket.Bucket(address).names()}
    else:
        given = expanduser(path)
        whole = given.absolute()
        if whole.parent.name != FOLDER or not files.is_step(whole.name) or whole.is_file():
            return None
        run, last = str((given if len(given.parts) > 2 else whole).parents[1]), whole.name
        inside = {p.name for p in whole.iterdir()} if whole.is_dir() else set()
    if inside and inside.isdisjoint((*files.ITEMS, files.META)):
        return None
    return run, int(last)


def read_params(
    workdir: str | os.PathLike[str], step: int | None = None, judged: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the verified parameters of a run, for `config.init_from` and for tools.

    Args:
      workdir: the run's folder, or its ``checkpoints`` folder, or a path that :func:`of_step` knows. Nothing in it is
        changed.
      step: the checkpoint's step; None: the step that `workdir` names, or the newest usable checkpoint.
      judged: whether to read the parameters that evaluations use, which the run's method chooses: for example a target
        network or moving averages.

    Returns:
      Nested dictionaries of NumPy arrays, and the checkpoint's meta.

    Raises:
      CheckpointError: there is no such folder or step, or the folder holds no usable checkpoint.
    """
    if step is None and (named := of_step(workdir)):
        workdir, step = named
    folder = readable(workdir, step).absolute()
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder or file; expected weights or the workdir of a run")
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    steps, shown = files.steps(folder), str(folder)
    if step is not None and bucket.is_address(workdir):  # the copy has this step alone, and some that are gone there
        steps, shown = bucket.steps(os.fspath(workdir)), os.fspath(workdir)
    if not steps:
        raise CheckpointError(f"{shown}: holds no checkpoint; expected the workdir of a run that has saved one")
    if step is not None and step not in steps:
        raise CheckpointError(f"{shown}: holds no checkpoint of step {step}; it holds {', '.join(map(str, steps))}")
    problems: dict[int, str] = {}
    for candidate in steps if step is None else [step]:
        try:
            with files.quiet_orbax():
                meta = files.read_meta(folder / str(candidate))
                params = _read_params(folder / str(candidate), meta, judged)
        except files.DamagedError as e:
            problems[candidate] = _warn_unusable(candidate, folder / str(candidate), e)
        else:
            return files.nest(params), meta
    raise CheckpointError(_none_usable(folder, problems))


def _read_params(folder: Path, meta: dict[str, Any], judged: bool) -> dict[str, Any]:
    """Reads the parameters, or those that evaluations use, by name."""
    if not judged:
        return files.read_arrays(folder, meta, "params", files.host_targets(meta, "params"))
    places = meta.get("judged")
    if places is None:  # a version saved it whose methods carried no state
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
    """Hashes names, dtypes, shapes and bytes of all arrays, in the order of their names, to 64 hexadecimal digits.

    The hash does not depend on how the arrays lie on devices. If other processes hold parts of an array, all processes
    must call this function: it gathers such arrays one at a time.

    >>> params_sha256({"b": np.zeros(2)}) == params_sha256({"b": jnp.zeros(2, np.float32)})  # float64 and float32
    False
    """
    digest = hashlib.sha256()
    for name, x in sorted(names(params).items()):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            x = multihost_utils.process_allgather(x, tiled=True)
        x = np.ascontiguousarray(jax.device_get(x))
        digest.update(f"{name} {x.dtype} {x.shape}\n".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()
