"""A workdir in a bucket: the run works in a folder of this machine, whose contents a thread copies to the bucket.

A bucket has no lock of the kernel's, no rename and no append. So the run's folder is a local one, where everything is
as in any other run, and the bucket holds a copy of it under the same names. The bucket is what counts: a start brings
the local folder to the bucket's state, unless the last process that wrote to the bucket worked in this same folder,
which then is at least as new.

At any moment the objects of the bucket are a state from which a run can continue: each object is written whole; a
checkpoint counts once its marker, which is written last, says what it consists of; and the records are copied before a
checkpoint to which they lead.

Who writes to the bucket is said by a lease, an object that its holder renews, each time only if it is still its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from crate_jax.errors import UserError
from crate_jax.parallel import distributed
from crate_jax.parallel.interrupt import Interrupted
from crate_jax.workdir import bucket as buckets, folder as folders
from crate_jax.workdir.bucket import CHECKPOINTS, LEASE, MARKER, Bucket, Sums
from crate_jax.workdir.metrics import writing
from crate_jax.workdir.whole import whole

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0  # without a renewal, after which another start may take the workdir over
RENEW_SECONDS = 10.0
COPY_SECONDS = 15.0  # between two copies, unless there is a new checkpoint, which is copied at once
LOOK_SECONDS = 1.0  # between two looks for one
POLL_SECONDS = 0.5
SCRATCH_OF = ".bucket.json"  # the file of the local folder that names the lease under which it was last in use

_scratches: dict[Path, str] = {}  # for each local folder that this process has used its address


def shown(path: str) -> str:
    """A path for people: of a file in a workdir that is in a bucket the address there."""
    for scratch, address in _scratches.items():
        if Path(path).is_relative_to(scratch):
            return f"{address}/{Path(path).relative_to(scratch).as_posix()}"
    return path


def _now() -> float:
    """Seconds that also count while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LostError(UserError):
    """Another process has taken over the lease."""


class Lease:
    """The lease of a workdir in a bucket.

    No two clocks are compared: who wants the lease watches whether its object changes. The holder changes it every
    RENEW_SECONDS; after LEASE_SECONDS without a change it is free.

    Args:
      bucket: the workdir.

    Attributes:
      id: names this process's lease.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.id = secrets.token_hex(8)
        self._bucket = bucket
        self._count = 0
        self._generation: bytes | None = None
        self._lock = threading.Lock()

    def acquire(self, mine: str) -> bool:
        """Takes the lease, if necessary after it has watched for LEASE_SECONDS that nobody renews it.

        Args:
          mine: the id of a lease whose holder is known to have ended; '': none is known.

        Returns:
          Whether the last holder was `mine`.

        Raises:
          UserError: another process renews it.
        """
        watched: bytes | None = None
        since = _now()
        while True:
            found = self._bucket.read(LEASE)
            held = _parse(found.data)
            if found.exists and held.get("id") != mine and not held.get("released"):
                if watched is None:
                    watched, since = found.generation, _now()
                    log.info("%s: was in use by %s; waits up to %.0f s to see whether it still is",
                             self._bucket.address, held.get("holder"), LEASE_SECONDS)  # fmt: skip
                elif found.generation != watched:
                    raise self._in_use(held)
                if _now() - since < LEASE_SECONDS:
                    time.sleep(POLL_SECONDS)
                    continue
                log.warning("%s: %s no longer renews its lease; it is taken over",
                            self._bucket.address, held.get("holder"))  # fmt: skip
            if self._write(found.generation):
                return bool(mine) and held.get("id") == mine
            if not self._bucket.read(LEASE).exists:
                raise UserError(f"workdir {self._bucket.address}: {LEASE} cannot be written; the store must have "
                                "conditional writes")  # fmt: skip
            watched = b""  # another start was quicker

    def _in_use(self, held: dict[str, Any]) -> UserError:
        return UserError(
            f"workdir {self._bucket.address} is in use by process {held.get('holder', 'unknown')}; wait for it, stop "
            "it, or choose another --workdir"
        )

    def _write(self, expected: bytes, released: bool = False) -> bool:
        self._count += 1  # each time other contents: S3's generation is a digest of them
        holder = f"{os.getpid()} on {socket.gethostname()}"
        record = {"id": self.id, "holder": holder, "count": self._count, "released": released}
        asked = _now()
        generation = self._bucket.write(LEASE, json.dumps(record).encode(), expected)
        if generation is None:
            # A request that was repeated after its answer was lost finds its own first try.
            found = self._bucket.read(LEASE)
            if _parse(found.data) != record:
                return False
            generation = found.generation
        self._generation, self._renewed = generation, asked
        return True

    def renew(self, older: float = 0.0) -> None:
        """Renews the lease, if the last renewal is at least `older` seconds ago.

        Raises:
          LostError: another process has taken it over.
        """
        with self._lock:
            if _now() - self._renewed < older:
                return
            assert self._generation is not None
            if not self._write(self._generation):
                held = _parse(self._bucket.read(LEASE).data)
                raise LostError(
                    f"workdir {self._bucket.address}: process {held.get('holder', 'unknown')} has taken it over, since "
                    f"this process did not renew its lease for {LEASE_SECONDS:.0f} s"
                )

    def release(self) -> None:
        """Gives the lease back, unless another process has taken it over."""
        with self._lock:
            if self._generation is not None:
                self._write(self._generation, released=True)


def _parse(data: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


class State(NamedTuple):
    """What tells a file, or a folder of a step, from a later one of the same name."""

    number: int
    size: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> State:
        """The state of a file or folder.

        Raises:
          OSError: it does not exist.
        """
        found = path.lstat()
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


class Mirror:
    """Keeps a bucket equal to a local folder, as a context: while it is open, two threads copy and renew the lease.

    Args:
      address: the workdir's.
      scratch: the local folder; the caller holds its lock.

    Attributes:
      lease: the lease, which this process holds.

    Raises:
      UserError: the bucket cannot be read or written, or another process uses the workdir.
    """

    def __init__(self, address: str, scratch: Path) -> None:
        self.bucket, self.scratch = Bucket(address), scratch
        self.lease = Lease(self.bucket)
        self._files: dict[str, State] = {}  # what the bucket holds
        self._steps: dict[str, State] = {}
        self._copied = _now()
        self._lost: LostError | None = None
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []
        self.bucket.names()  # raises if there is no such bucket, in which every object seems to be missing
        try:
            mine = str(_parse((scratch / SCRATCH_OF).read_bytes()).get("lease", ""))
        except FileNotFoundError:
            mine = ""
        ours = self.lease.acquire(mine)
        renewing = threading.Thread(target=self._repeat, args=(self._renew, RENEW_SECONDS), daemon=True)
        renewing.start()
        self._threads.append(renewing)
        try:
            if ours:
                self._claim()
            self._restore(keep=ours)
            self._claim()
        except BaseException:
            self._stop()
            with contextlib.suppress(UserError):
                self.lease.release()
            raise

    def _claim(self) -> None:
        """Notes that the local folder is at least as new as what the bucket holds."""
        path = self.scratch / SCRATCH_OF
        # Not `durable`: the files that were downloaded are not, and the note must not outlive them.
        with writing(path), whole(path) as partial:
            partial.write_text(json.dumps({"address": self.bucket.address, "lease": self.lease.id}))

    def _restore(self, keep: bool) -> None:
        """Brings the local folder to the bucket's state.

        Args:
          keep: whether the files of the local folder are at least as new as the bucket's.
        """
        plain, steps = buckets.sorted_names(self.bucket, self.bucket.names())
        plain = [name for name in plain if _is_copied(name)]
        for path in list(self.scratch.rglob("*.tmp")):
            buckets.remove(path)
        for name, step in steps.items():
            if not step.complete:
                log.warning("%s/%s: its upload was not finished; it is deleted", self.bucket.address, name)
                self._drop(name)
        whole = {name: step for name, step in steps.items() if step.complete}
        if not keep:
            local_files, local_steps = _scan(self.scratch)
            for name in {*local_files, *local_steps} - {*plain, *whole}:
                buckets.remove(self.scratch / name)
        self.bucket.download({n: None for n in plain if not (keep and (self.scratch / n).exists())}, self.scratch)
        for name, step in whole.items():
            if step.sums is not None and _sums_below(self.scratch / name) == step.sums:
                self._steps[name] = State.of(self.scratch / name)
            elif not (keep and (self.scratch / name).exists()):
                self._fetch_step(name, step)
        if not keep:
            local_files, _ = _scan(self.scratch)
            self._files = {name: local_files[name] for name in plain if name in local_files}
        if steps or plain:
            log.info("%s: its files are in %s", self.bucket.address, self.scratch)

    def _fetch_step(self, name: str, step: buckets.Step) -> None:
        target = self.scratch / name
        partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")  # a folder, which `whole` could not replace
        buckets.remove(partial)
        for _ in range(2):
            read = self.bucket.download({f"{name}/{file}": None for file in step.names}, partial)
            sums = {file.removeprefix(f"{name}/"): found for file, (_, found) in read.items()}
            if step.sums is None or sums == step.sums:
                break
        else:  # the checkpoint's own checksums decide about its use
            log.warning("%s/%s: its files are not what was written", self.bucket.address, name)
        buckets.remove(target)
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            (partial / name).rename(target)
        buckets.remove(partial)
        self._steps[name] = State.of(target)

    def __enter__(self) -> Self:
        copying = threading.Thread(target=self._repeat, args=(self._copy_if_due, LOOK_SECONDS), daemon=True)
        copying.start()
        self._threads.append(copying)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _repeat(self, act: Any, seconds: float) -> None:
        """Calls `act` again and again; what fails because the bucket cannot be reached is tried again."""
        failed_before = False
        while not self._end.wait(seconds):
            try:
                act()
                failed_before = False
            except LostError as e:
                if self._lost is None:
                    self._lost = e
                    log.error("%s; this process ends", e)
                    os.kill(os.getpid(), signal.SIGTERM)  # a training saves, locally, and ends
                return
            except (UserError, OSError) as e:
                if not failed_before:
                    log.warning("%s; it is tried again", e)
                failed_before = True

    def _renew(self) -> None:
        self.lease.renew()

    def _copy_if_due(self) -> None:
        if _now() - self._copied >= COPY_SECONDS or any(name not in self._steps for name in _newest(self.scratch)):
            self.copy()
            self._copied = _now()

    def finish(self) -> None:
        """Copies all that is not yet in the bucket, and gives the lease back.

        Raises:
          UserError: the bucket cannot be written, or another process has taken the workdir over.
        """
        self._stop()
        if self._lost is not None:
            raise self._lost
        try:
            self.copy(final=True)
        except UserError as e:
            if isinstance(e, LostError):
                raise
            raise UserError(
                f"{e}; what is not in the bucket is in {self.scratch}: the same command on this machine copies it"
            ) from None
        finally:
            with contextlib.suppress(UserError):
                self.lease.release()

    def copy(self, final: bool = False) -> None:
        """Copies what has changed since the last call, and deletes what is gone.

        Args:
          final: whether nothing writes to the folder any more. Else only the newest checkpoint is copied, since an
            older one may be being deleted, file by file.

        Raises:
          UserError: the bucket cannot be written.
        """
        _, steps = _scan(self.scratch)
        files, _ = _scan(self.scratch)  # later: records lead at least to the newest of these steps
        changed = {name: self.scratch / name for name, state in files.items() if self._files.get(name) != state}
        gone = [name for name in self._files if name not in files]
        for name, path in changed.items():
            with contextlib.suppress(FileNotFoundError):
                self.bucket.upload({name: path}, self._check)
                self._files[name] = files[name]
        new = [name for name, state in steps.items() if self._steps.get(name) != state]
        if not final:
            newest = {name.rpartition("/")[0]: name for name in steps}
            new = [name for name in new if name in newest.values()]
        if not all([self._copy_step(name, steps[name], final) for name in new]):
            return
        self._check()
        self.bucket.delete(gone)
        for name in gone:
            del self._files[name]
        for name in [name for name in self._steps if name not in steps]:
            self._drop(name)

    def _check(self) -> None:
        """Nothing is written by a process that stood still, until it has found that the lease is still its own."""
        self.lease.renew(older=LEASE_SECONDS / 2)

    def _copy_step(self, name: str, state: State, final: bool) -> bool:
        """Copies a checkpoint; returns False if it was deleted meanwhile."""
        folder = self.scratch / name
        if name in self._steps:
            self._drop(name)  # another checkpoint of the same step
        files = _files_below(folder)
        marker = f"{name}/{MARKER}"
        if not final and name not in _newest(self.scratch):
            return False
        self._check()
        self.bucket.write(marker, json.dumps({"complete": False}).encode())
        try:
            sums = self.bucket.upload({f"{name}/{file}": folder / file for file in files}, self._check)
            whole = _files_below(folder) == files and State.of(folder) == state
        except FileNotFoundError:
            whole = False
        if not whole:
            self._drop(name)
            return False
        listed = {full.removeprefix(f"{name}/"): found for full, found in sums.items()}
        self._check()
        self.bucket.write(marker, json.dumps({"complete": True, "files": listed}).encode())
        self._steps[name] = state
        return True

    def _drop(self, name: str) -> None:
        """Deletes a checkpoint from the bucket; from the first moment on it does not count."""
        self._check()
        marker = f"{name}/{MARKER}"
        below = [found for found in self.bucket.names() if found.startswith(f"{name}/")]
        self.bucket.write(marker, json.dumps({"complete": False}).encode())
        self.bucket.delete(found for found in below if found != marker)
        self.bucket.delete([marker])
        self._steps.pop(name, None)


def _is_copied(name: str) -> bool:
    """Whether a file belongs into the bucket: not locks, and not what is being written or for this machine only."""
    parts = name.split("/")
    unfinished = any(p.endswith((".tmp", ".partial")) or ".orbax-checkpoint-tmp" in p for p in parts)
    return not unfinished and not parts[-1].startswith(".")


def _scan(folder: Path) -> tuple[dict[str, State], dict[str, State]]:
    """The files outside of checkpoints, and the folders of the steps, the newest last, by their names."""
    files: dict[str, State] = {}
    steps: dict[str, State] = {}
    for parent, below, names in os.walk(folder):
        here = Path(parent)
        inside = here.name == CHECKPOINTS
        found = [name for name in below if inside and buckets.split_step(f"{CHECKPOINTS}/{name}/x")]
        below[:] = [name for name in below if name not in found and _is_copied(f"{name}/x")]
        for name in sorted(found, key=int):
            with contextlib.suppress(FileNotFoundError):
                steps[(here / name).relative_to(folder).as_posix()] = State.of(here / name)
        for name in names:
            path = here / name
            relative = path.relative_to(folder).as_posix()
            with contextlib.suppress(FileNotFoundError):
                if _is_copied(relative) and path.is_file() and not path.is_symlink():
                    files[relative] = State.of(path)
    return files, steps


def _newest(folder: Path) -> set[str]:
    """The newest step of each folder of checkpoints."""
    return set({name.rpartition("/")[0]: name for name in _scan(folder)[1]}.values())


def _files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MARKER)


def _sums_below(folder: Path) -> dict[str, Sums]:
    return {name: buckets.sums_of((folder / name).read_bytes()) for name in _files_below(folder)}


@contextlib.contextmanager
def lock(address: str) -> Iterator[Path]:
    """Takes the lease of a workdir in a bucket and keeps the bucket equal to the folder that it yields.

    All processes of a run must see this folder: they run on one machine, or CRATE_JAX_SCRATCH names a folder of a
    shared file system.

    Yields:
      The absolute path of the local folder, which is locked too.

    Raises:
      UserError: the bucket or the folder cannot be used, or another process uses it.
    """
    address = Bucket(address).address
    with folders.lock(buckets.place("runs", address), address) as scratch:
        mirror = distributed.run_in_first(lambda: Mirror(address, scratch))
        lease = distributed.text_of_first(mirror.lease.id if mirror is not None else "")
        _scratches[scratch] = address

        def finish() -> None:
            if mirror is not None:
                mirror.finish()

        try:
            _require_shared(scratch, lease)
            with mirror or contextlib.nullcontext():
                yield scratch
        except Interrupted:
            distributed.run_in_first(finish)
            raise
        except BaseException:
            try:
                finish()
            except LostError:
                raise
            except UserError as e:
                log.warning("%s", e)
            raise
        else:
            distributed.run_in_first(finish)
            if distributed.first():
                log.info("all files are in %s", address)


def _require_shared(scratch: Path, lease: str) -> None:
    """Checks that this process sees the folder of the first one, not another one of the same name."""
    deadline = time.monotonic() + folders.LATE_SECONDS
    seen = False
    while not seen and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            seen = _parse((scratch / SCRATCH_OF).read_bytes()).get("lease") == lease
        if not seen:
            time.sleep(POLL_SECONDS)
    if distributed.max_over_processes(int(not seen)):
        raise UserError(
            f"{scratch}: must be the same folder for all processes; name one on a shared file system in the "
            f"environment variable {buckets.SCRATCH}, or start all processes on one machine"
        )
