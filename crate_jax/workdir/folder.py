"""Locks the folder that a run writes to, and checks its free space before a checkpoint is written."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from crate_jax.errors import CheckpointError, UserError
from crate_jax.parallel import distributed
from crate_jax.workdir import bucket, readback
from crate_jax.workdir.whole import remove_left

log = logging.getLogger(__name__)

LOCK_NAME = ".lock"
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+")  # of an address; dbfs:/ and file:/ have one slash
LATE_SECONDS = 60.0  # for up to a minute NFS may still report that there is no such file


STARTS = "starts.jsonl"  # the record of a run's starts
# Beside a lock each of these shows that a folder is a workdir of this library, the first two that of a training run.
KEPT = (bucket.CHECKPOINTS, STARTS, "sweep.json", "results.jsonl", "alignment.json")


def is_workdir(folder: str | bytes) -> bool:
    """Whether a folder is a workdir, found without listing it; a lock alone may be another program's."""

    def there(name: str) -> bool:
        return os.path.lexists(os.path.join(os.fsencode(folder), os.fsencode(name)))

    return there(LOCK_NAME) and any(map(there, KEPT))


def require_no_model(folder: Path, what: str) -> None:
    """Refuses a folder of weights, whose config.json `what` would replace.

    Raises:
      UserError: config.json is that of a model of Hugging Face or timm, or of a model that was exported for them.
    """
    try:
        about = readback.parse((folder / "config.json").read_text(encoding="utf-8", errors="replace")) or {}
    except OSError:
        return
    if key := next((key for key in ("model_type", "architectures", "architecture") if key in about), None):
        raise UserError(
            f"{folder}: its config.json is that of a model ({key}: {about[key]!r:.60}), and {what} would replace it; "
            "choose another folder"
        )


def require_no_run(folder: Path, what: str) -> None:
    """Refuses a folder that holds a training run or a model, whose config.json `what` would replace.

    Raises:
      UserError: it does.
    """
    require_no_model(folder, what)
    if any((folder / name).exists() for name in KEPT[:2]):
        raise UserError(
            f"{folder}: holds a training run, whose config.json {what} would replace; choose another folder"
        )


@contextlib.contextmanager
def lock(workdir: str | os.PathLike[str], shown: str = "") -> Iterator[Path]:
    """Creates `workdir` if it does not exist and locks it for this process.

    For an address in a bucket this is a local folder, whose contents are copied there (`crate_jax.workdir.mirror`).

    The kernel holds the lock (flock), so it ends with the process, even after `kill -9`; the file of the lock stays,
    and means nothing by itself. In a run of several processes only the first one takes the lock; if it fails, all fail.

    Args:
      workdir: the folder, or the address.
      shown: what messages call a folder that is in use; '': its path.

    Yields:
      The absolute path of the folder.

    Raises:
      UserError: the folder cannot be created or written to, another process holds the lock, or not all processes of the
        run see the same folder.
    """
    if bucket.is_address(workdir):
        from crate_jax.workdir import mirror  # here: it imports this file

        with mirror.lock(os.fspath(workdir)) as folder:
            yield folder
        return
    folder = distributed.run_in_first(lambda: _create(workdir)) or expanduser(workdir).absolute()
    file = distributed.run_in_first(lambda: _take(folder, shown or str(folder)))
    with file or contextlib.nullcontext():
        seen = file is not None or _appears(folder / LOCK_NAME)
        if not seen:
            log.error("workdir %s: this process does not see it", folder)
        if distributed.max_over_processes(int(not seen)):
            raise UserError(f"workdir {folder}: must be the same folder for all processes, on a shared file system")
        yield folder


def expanduser(path: str | os.PathLike[str]) -> Path:
    """Returns the path with the home folder in place of a leading ``~`` or ``~NAME``.

    Every path that a user gives goes through this function or `readable`, so that none begins with a scheme such as
    ``gs://``, which would become a local folder of the name ``gs:``.

    Raises:
      UserError: there is no such user, or the user has no home folder; or the path begins with a scheme.

    >>> str(expanduser("runs/quickstart"))
    'runs/quickstart'
    """
    scheme = SCHEME.match(os.fspath(path))
    if scheme:
        raise UserError(
            f"{os.fspath(path)}: must be a path on a local or mounted file system, without {scheme[0]}; mount or copy "
            "what is there"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{os.fspath(path)}: the home folder of {Path(path).parts[0]} is not known; write the full path"
        ) from None


def cache() -> Path | None:
    """The user's folder for caches, XDG_CACHE_HOME or ``~/.cache``; None: the home folder is not known."""
    try:
        return expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache").absolute()
    except UserError:
        return None


def readable(path: str | os.PathLike[str], step: int | None = None) -> Path:
    """Returns a local path at which to read `path`: of a bucket's address the path of a copy on this machine.

    Args:
      path: a path, as for `expanduser`; or an address of `crate_jax.workdir.bucket.fetch`.
      step: the step of the checkpoint to read, if the path is that of a run in a bucket; None: the newest step.

    Raises:
      UserError: `expanduser` or `crate_jax.workdir.bucket.fetch` refuses the path.
    """
    return bucket.fetch(os.fspath(path), step) if bucket.is_address(path) else expanduser(path)


def readable_set(path: str) -> Path:
    """Like `readable`, for a data set, which does not change while a process runs: a bucket is asked once."""
    return _fetched(path) if bucket.is_address(path) else expanduser(path)


_fetched = functools.cache(bucket.fetch)


def _take(folder: Path, shown: str) -> TextIO:
    """Opens and locks the lock file, and writes this process's name into it."""
    try:
        # "a": until we have the lock, the file must keep the line of the process that holds it.
        file = open(folder / LOCK_NAME, "a+", encoding="utf-8")
    except OSError as e:
        raise UserError(f"workdir {folder}: cannot be written to ({e.strerror}); choose another --workdir") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"workdir {shown} is in use by process {holder}; wait for it, stop it, or choose another --workdir"
        ) from None
    except OSError as e:
        file.close()
        raise UserError(
            f"workdir {folder}: its file system cannot lock files ({e.strerror}); choose another --workdir"
        ) from None
    try:
        remove_left(folder)
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as e:
        with contextlib.suppress(OSError):  # `close` tries again to write
            file.close()
        raise UserError(
            f"workdir {folder}: cannot be written to ({e.strerror}); make room, or choose another"
        ) from None
    return file


def _appears(path: Path) -> bool:
    """Returns whether the file exists; waits for it, because network file systems may show a new file late."""
    deadline = time.monotonic() + LATE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _create(workdir: str | os.PathLike[str]) -> Path:
    if not os.fspath(workdir) or SCHEME.match(os.fspath(workdir)):
        raise UserError(
            f"workdir {os.fspath(workdir)!r}: must be a folder on a local or mounted file system, gs://BUCKET/PATH or "
            "s3://BUCKET/PATH"
        )
    folder = expanduser(workdir).absolute()
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # Orbax would fail at the first save, and all training until then would be lost
        raise UserError(f"workdir {folder}: must be a path in UTF-8; choose another --workdir") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"workdir {folder}: is, or lies under, a file; choose another --workdir") from None
    except OSError as e:
        raise UserError(f"workdir {folder}: cannot be created ({e.strerror}); choose another --workdir") from None
    return folder


def check_free_space(path: str | os.PathLike[str], bytes_needed: int) -> None:
    """Checks that the file system of the folder `path` has room for `bytes_needed` more bytes.

    Raises:
      CheckpointError: there is not enough room (the message gives free and needed bytes), or the folder does not exist.
    """
    try:
        free = shutil.disk_usage(path).free
    except OSError as e:
        raise CheckpointError(
            f"{os.fspath(path)} is gone ({e.strerror}); run the same command again to start from what is left"
        ) from None
    if free < bytes_needed:
        raise CheckpointError(
            f"no space left for a checkpoint in {os.fspath(path)}: {bytes_needed / 1e6:,.1f} MB needed, "
            f"{free / 1e6:,.1f} MB free; make room and run the same command again to go on from the last checkpoint"
        )
