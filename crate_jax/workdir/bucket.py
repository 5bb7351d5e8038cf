"""The objects of a bucket, ``gs://`` or ``s3://``, read and written through TensorStore, which Orbax brings along.

Credentials are found as TensorStore finds them: for Google the application default credentials or the machine's service
account, for S3 the environment, ``~/.aws`` or the machine's role. ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL`` names
another S3 server, ``TENSORSTORE_GCS_HTTP_URL`` another server of Google's kind.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from crate_jax.errors import UserError
from crate_jax.workdir.whole import remove_left, whole

log = logging.getLogger(__name__)

ADDRESS = re.compile(r"(gs|s3)://([^/]+)(?:/+(.*?))?/*")
IN_FLIGHT = 2**28  # bytes of the objects that are transferred at once; one object may be larger
ATTEMPTS = 6  # of a request, over about 30 seconds
HUNG_SECONDS = 20  # without a byte, after which a request is tried again
READ_SECONDS = 3600.0  # for so long after a step was fetched, a reader may still be reading its copy
SCRATCH = "CRATE_JAX_SCRATCH"  # the environment variable that names the folder of local copies

# What is in the folder of a checkpoint: files below CHECKPOINTS/STEP, at any depth.
CHECKPOINTS = "checkpoints"
_OF_A_STEP = re.compile(rf"((?:.*/)?{CHECKPOINTS}/(?:0|[1-9][0-9]{{0,9}}))/(.+)")
MARKER = ".upload.json"  # says whether the upload of a step is complete, and what it consists of


class Object(NamedTuple):
    """An object that was read.

    Attributes:
      data: its bytes; None: there is no such object, or it is the known one.
      generation: changes with each write; it also stands for the absence of an object.
      exists: whether there is such an object.
    """

    data: bytes | None
    generation: bytes
    exists: bool


class Sums(NamedTuple):
    """Size in bytes and SHA-256 of a file, as 64 hexadecimal digits."""

    size: int
    sha256: str


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the address of a place in a bucket.

    >>> is_address("s3://bucket/run"), is_address("gs://bucket"), is_address("hdfs://host/run"), is_address("gs:/x")
    (True, True, False, False)
    """
    return ADDRESS.fullmatch(os.fspath(path)) is not None


class Bucket:
    """The objects whose names begin with an address, by the rest of their names.

    Args:
      address: such as ``s3://bucket/runs/a``.

    Attributes:
      address: the address without a slash at its end.

    Raises:
      UserError: the address is malformed. Each method raises it, in one line, if the bucket cannot be reached.
    """

    def __init__(self, address: str) -> None:
        match = ADDRESS.fullmatch(address)
        if match is None:
            raise UserError(f"{address}: must be gs://BUCKET/PATH or s3://BUCKET/PATH")
        scheme, bucket, path = match.groups(default="")
        self.address = f"{scheme}://{bucket}/{path}".rstrip("/")
        self._path = path
        with self._one_line("cannot be opened"):
            self._store = open_store(scheme, bucket)

    @contextlib.contextmanager
    def _one_line(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except (ValueError, RuntimeError, TimeoutError) as e:  # as TensorStore raises
            text = re.split(r" \[(?:http_response|x-|curl_code|source locations)", " ".join(str(e).split()))[0]
            raise UserError(f"{self.address}: {what} ({text[:300]})") from None

    def _key(self, name: str) -> bytes:
        return "/".join(filter(None, (self._path, name))).encode()

    def names(self) -> list[str]:
        """The names of all objects below the address, in order, except those that are no names of files."""
        import tensorstore as ts

        below = f"{self._path}/" if self._path else ""
        keys = ts.KvStore.KeyRange(below, f"{self._path}0" if below else "")  # "0" follows "/"
        with self._one_line("cannot be listed"):
            found = [key.decode(errors="replace") for key in self._store.list(keys).result()]
        # Servers that stand in for a store's own may list more than was asked for.
        return sorted(name for key in found if key.startswith(below) and _is_name(name := key.removeprefix(below)))

    def read(self, name: str, known: bytes | None = None) -> Object:
        """Reads an object, unless its generation is `known`; the name '' is the object at the address itself."""
        with self._one_line(f"{name or 'the object'} cannot be read"):
            return _object(self._store.read(self._key(name), **_unless(known)).result())

    def write(self, name: str, data: bytes, expected: bytes | None = None) -> bytes | None:
        """Writes an object.

        Args:
          name: its name.
          data: its bytes.
          expected: the generation that it must have for the write to happen, in one operation; None: any.

        Returns:
          Its new generation; None if it had another one than the expected.
        """
        condition = {} if expected is None else {"if_equal": expected}
        with self._one_line(f"{name} cannot be written"):
            return self._store.write(self._key(name), data, **condition).result().generation or None

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; those that do not exist are no error."""
        with self._one_line("objects cannot be deleted"):
            for future in [self._store.write(self._key(name), None) for name in names]:
                future.result()

    def upload(self, files: Mapping[str, Path], before: Callable[[], None] = lambda: None) -> dict[str, Sums]:
        """Writes files as objects, several at once.

        Args:
          files: for each object's name the file.
          before: is called before each write; if it raises, the rest is not written.

        Raises:
          OSError: a file cannot be read.
        """
        sums: dict[str, Sums] = {}
        writes: collections.deque[tuple[int, Any]] = collections.deque()
        with self._one_line("cannot be written"):
            for name, path in files.items():
                data = path.read_bytes()
                sums[name] = sums_of(data)
                while writes and sum(size for size, _ in writes) + len(data) > IN_FLIGHT:
                    writes.popleft()[1].result()
                before()
                writes.append((len(data), self._store.write(self._key(name), data)))
            for _, write in writes:
                write.result()
        return sums

    def download(self, known: Mapping[str, bytes | None], folder: Path) -> dict[str, tuple[bytes, Sums]]:
        """Writes objects to files below a folder, several at once; each file appears whole.

        Args:
          known: for each object's name the generation that need not be read again; None: there is none.
          folder: the folder.

        Returns:
          Generation, size and digest of what was read, by name; without objects that are the known ones, or are gone.

        Raises:
          UserError: a file cannot be written.
        """
        found: dict[str, tuple[bytes, Sums]] = {}
        reads: collections.deque[tuple[str, Any]] = collections.deque()

        def finish() -> None:
            name, future = reads.popleft()
            read = _object(future.result())
            if read.data is None:
                return
            path = folder / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with whole(path) as partial:
                    partial.write_bytes(read.data)
            except OSError as e:
                raise UserError(
                    f"{path}: the copy of {self.address}/{name} cannot be written ({e.strerror}); make room, or name "
                    f"another folder in the environment variable {SCRATCH}"
                ) from None
            found[name] = (read.generation, sums_of(read.data))

        with self._one_line("cannot be read"):
            for name, generation in known.items():
                if len(reads) >= 16:
                    finish()
                reads.append((name, self._store.read(self._key(name), **_unless(generation))))
            while reads:
                finish()
        return found


def open_store(scheme: str, bucket: str) -> Any:
    """Opens a bucket as a key-value store of TensorStore."""
    # Without these a connection over which nothing comes any more is waited for without end.
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(HUNG_SECONDS))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    import tensorstore as ts  # here: half a second, which commands without a bucket need not spend

    retries = {"max_retries": ATTEMPTS, "initial_delay": "1s", "max_delay": "8s"}
    if scheme == "gs":
        gcs = {"driver": "gcs", "bucket": bucket, "context": {"gcs_request_retries": retries}}
        return ts.KvStore.open(gcs).result()
    # By default TensorStore asks first and then writes, between which another process could write.
    spec = {"driver": "s3", "bucket": bucket, "use_conditional_write": True, "context": {"s3_request_retries": retries}}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # else it looks for ~/.aws first, and prints that there is none
        spec["aws_credentials"] = {"type": "environment"}
    return ts.KvStore.open(spec).result()


def _unless(known: bytes | None) -> dict[str, bytes]:
    return {} if known is None else {"if_not_equal": known}


def _object(read: Any) -> Object:
    return Object(
        bytes(read.value) if read.state == "value" else None, bytes(read.stamp.generation), read.state != "missing"
    )


def _is_name(name: str) -> bool:
    """Whether an object's name can be that of a file below a folder: nothing in a bucket is written outside of it.

    >>> [_is_name(name) for name in ("a/b.json", "../b", "/b", "a//b", "a/", "a/./b", "")]
    [True, False, False, False, False, False, False]
    """
    return bool(name) and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def sums_of(data: bytes) -> Sums:
    """The sums of a file's bytes."""
    return Sums(len(data), hashlib.sha256(data).hexdigest())


def split_step(name: str) -> tuple[str, str] | None:
    """The folder of a step and the rest of the name, for the name of a file in a checkpoint; None for other names.

    >>> split_step("checkpoints/40/params/d/x"), split_step("a/checkpoints/007/x"), split_step("checkpoints/40")
    (('checkpoints/40', 'params/d/x'), None, None)
    """
    match = _OF_A_STEP.fullmatch(name)
    return (match[1], match[2]) if match else None


def step_of(bucket: Bucket, name: str) -> str | None:
    """The folder of the step to which a file below a bucket's address belongs; None: it is in no checkpoint."""
    inside = f"{CHECKPOINTS}/" if PurePosixPath(bucket.address).name == CHECKPOINTS else ""
    found = split_step(inside + name)
    return found[0].removeprefix(inside) if found else None


class Step(NamedTuple):
    """A step's checkpoint in a bucket.

    Attributes:
      names: the names of its files, below its folder.
      complete: whether its upload has ended. A step that another program has copied counts as complete.
      sums: size and digest of each file; None if another program has copied the step.
    """

    names: list[str]
    complete: bool
    sums: dict[str, Sums] | None


def sorted_names(bucket: Bucket, names: Iterable[str]) -> tuple[list[str], dict[str, Step]]:
    """Divides names into those outside of checkpoints and the steps, by the folder of each, the newest last."""
    plain: list[str] = []
    steps: dict[str, list[str]] = {}
    for name in names:
        step = step_of(bucket, name)
        if step is None:
            plain.append(name)
        else:
            steps.setdefault(step, []).append(name.removeprefix(f"{step}/"))
    ordered = sorted(steps, key=lambda step: (step.rpartition("/")[0], int(step.rpartition("/")[2])))
    return plain, {step: _step(bucket, step, steps[step]) for step in ordered}


def steps(address: str) -> list[int]:
    """The steps of a run's whole checkpoints in a bucket, newest first; `address` may also be that of their folder.

    Raises:
      UserError: the bucket cannot be read.
    """
    bucket = Bucket(address)
    found = [name.rpartition("/") for name, step in sorted_names(bucket, bucket.names())[1].items() if step.complete]
    return sorted((int(last) for folder, _, last in found if folder in ("", CHECKPOINTS)), reverse=True)


def _step(bucket: Bucket, step: str, names: list[str]) -> Step:
    files = [name for name in names if name != MARKER]
    if files == names:
        return Step(files, True, None)
    try:
        marker = json.loads(bucket.read(f"{step}/{MARKER}").data or b"{}")
        sums = {str(name): Sums(int(size), str(sha)) for name, (size, sha) in marker["files"].items()}
        whole = marker["complete"] is True and sums.keys() <= set(files)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Step(files, False, None)
    return Step([name for name in files if name in sums], whole, sums)


def root() -> Path:
    """The folder of the local copies: CRATE_JAX_SCRATCH, or one in the user's folder for caches."""
    from crate_jax.workdir.folder import cache, expanduser  # here: it imports this file

    if given := os.environ.get(SCRATCH):
        return expanduser(given).absolute()
    below = cache()
    if below is None:
        raise UserError(f"there is no folder for caches; name a folder in the environment variable {SCRATCH}")
    return below / "crate_jax" / "buckets"


def place(kind: str, address: str) -> Path:
    """The folder of the local copy of an address, of one kind of copies; it has the name of the address's last part.

    >>> place("runs", "s3://bucket/b/run/").name, place("read", "s3://a/run") == place("read", "s3://b/run")
    ('run', False)
    """
    address = address.rstrip("/")
    plain = re.sub(r"[^\w.-]+", "-", address)[-80:]
    return root() / kind / f"{plain}-{hashlib.sha256(address.encode()).hexdigest()[:8]}" / PurePosixPath(address).name


INDEX = ".index.json"


def fetch(address: str, step: int | None = None) -> Path:
    """Copies what is at an address to this machine, for reading, and returns the path of the copy.

    What has not changed since an earlier call is not copied again. Of a run's checkpoints only the newest whole one is
    copied, or that of `step`. Every process may call it, also several at once: who fetches a step may read it for an
    hour (READ_SECONDS), since other calls delete the copy of a step that they do not need only when nobody has fetched
    it for so long. A step that is newer than all in the bucket goes at once: it is of a run that was there before, and
    readers would take it for the newest one. So the bucket may have lost a step that is still read from the copy.

    Args:
      address: that of one object; or of a folder, such as a run's workdir; or a pattern with ``*``, ``?``, ``[..]`` or
        ``{..}`` of a webdataset's shards.
      step: the step of the checkpoint.

    Raises:
      UserError: there is nothing at the address, or it cannot be read.
    """
    folder, pattern = _split_pattern(address)
    bucket = Bucket(folder)
    copy = place("read", folder)
    try:
        copy.mkdir(parents=True, exist_ok=True)
        lock = open(copy / ".lock", "w")  # noqa: SIM115
    except OSError as e:
        raise UserError(f"{copy}: cannot be written to ({e.strerror}); see {SCRATCH} in docs/buckets.md") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        names = bucket.names()
        if not names:
            return _fetch_object(bucket, copy)
        if pattern:
            globs = [re.sub(r"\{[^{}]*\}", "*", pattern)]
            names = [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
        _fetch_folder(bucket, copy, names, step, keep_others=bool(pattern))
    return copy / pattern if pattern else copy


def _split_pattern(address: str) -> tuple[str, str]:
    """The folder above a pattern, and the pattern.

    >>> _split_pattern("s3://b/set/{train,val}-{00..09}.tar"), _split_pattern("s3://b/set/")
    (('s3://b/set', '{train,val}-{00..09}.tar'), ('s3://b/set/', ''))
    """
    special = re.search(r"[*?\[{]", address)
    if special is None:
        return address, ""
    cut = address.rindex("/", 0, special.start())
    return address[:cut], address[cut + 1 :]


def _fetch_object(bucket: Bucket, copy: Path) -> Path:
    name = PurePosixPath(bucket.address).name
    folder, path = copy / "object", copy / "object" / name
    known = bytes.fromhex(_index(copy).get(name, "")) if path.is_file() else None
    found = bucket.read("", known)
    if not found.exists:
        raise UserError(f"{bucket.address}: there is no such object, and none below it")
    if found.data is not None:
        try:
            folder.mkdir(exist_ok=True)
            remove_left(folder)
            with whole(path) as partial:
                partial.write_bytes(found.data)
            (copy / INDEX).write_text(json.dumps({name: found.generation.hex()}))
        except OSError as e:
            raise UserError(f"{path}: cannot be written ({e.strerror}); see {SCRATCH} in docs/buckets.md") from None
    return path


def _index(copy: Path) -> dict[str, str]:
    """For each file of a copy the generation of its object, in hexadecimal digits."""
    try:
        index = json.loads((copy / INDEX).read_text())
        return {str(name): bytes.fromhex(generation).hex() for name, generation in index.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _fetch_folder(bucket: Bucket, copy: Path, names: list[str], step: int | None, keep_others: bool) -> None:
    plain, steps = sorted_names(bucket, names)
    index, used = _index(copy), set()
    wanted = {name for name in plain if name not in (LEASE, INDEX, ".lock")}
    by_folder: dict[str, list[str]] = {}
    for name, found in steps.items():
        if found.complete:
            by_folder.setdefault(name.rpartition("/")[0], []).append(name)
    for found_steps in by_folder.values():
        for name in reversed(found_steps):
            if step is not None and name.rpartition("/")[2] != str(step):
                continue
            files = {f"{name}/{file}" for file in steps[name].names}
            _download(bucket, copy, files, index)
            sums = steps[name].sums
            wanted |= files
            used.add(name)
            if sums is None or all(_has(copy / name / file, expected) for file, expected in sums.items()):
                break
            log.warning("%s/%s: is damaged, its files have wrong checksums", bucket.address, name)
    _download(bucket, copy, wanted, index)
    for name in used:
        with contextlib.suppress(OSError):
            os.utime(copy / name)
    if keep_others:
        return
    wanted |= {INDEX, ".lock"}
    paths = {path.relative_to(copy).as_posix(): path for path in sorted(copy.rglob("*"), reverse=True)}
    of_steps = {name: step_of(bucket, name) for name in paths}
    # Now: to delete a step's first files makes its folder a new one.
    read = {step for step in set(of_steps.values()) - used if step and _may_be_read(copy / step, step, by_folder)}
    for relative, path in paths.items():
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.rmdir()  # if it is empty
        elif relative not in wanted and of_steps[relative] not in read:
            path.unlink()


def _may_be_read(path: Path, step: str, complete: Mapping[str, Sequence[str]]) -> bool:
    """Whether the copy of a step that this call does not need stays: another reader has fetched it not long ago.

    Args:
      path: the step's folder in the copy.
      step: its name.
      complete: the complete steps in the bucket, by their folders, the newest last.
    """
    folder, _, number = step.rpartition("/")
    newest = max((int(name.rpartition("/")[2]) for name in complete.get(folder, ())), default=-1)
    try:
        return int(number) <= newest and abs(time.time() - path.stat().st_mtime) < READ_SECONDS
    except OSError:
        return False


def _download(bucket: Bucket, copy: Path, names: Iterable[str], index: dict[str, str]) -> None:
    known = {
        name: bytes.fromhex(index[name]) if name in index and (copy / name).is_file() else None
        for name in sorted(names)
    }
    found = bucket.download(known, copy)
    index |= {name: generation.hex() for name, (generation, _) in found.items()}
    (copy / INDEX).write_text(json.dumps(index))


def _has(path: Path, expected: Sums) -> bool:
    """Whether a file has these sums."""
    try:
        return path.stat().st_size == expected.size and sums_of(path.read_bytes()) == expected
    except OSError:
        return False


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


LEASE = ".lease.json"  # the object that says who writes to a workdir
