"""Workdirs, weights and data in buckets: against a store in memory, and real servers on loopback where installed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import numpy as np
import pytest
import tensorstore

import crate_jax
from crate_jax import data
from crate_jax.config_files import named
from crate_jax.convert.files import weights_file
from crate_jax.errors import CheckpointError, UserError
from crate_jax.jobs import report, train
from crate_jax.workdir import bucket, checkpoint, folder, mirror
from tests.conftest import ROOT, of_the_server

pytestmark = pytest.mark.one_python

STORES = ["memory", "s3", "gs"]
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def gs() -> Iterator[None]:
    """A server of Google's kind that holds the bucket ``photos``: the emulator, with the conditions that it lacks."""
    reason = "no server of Google Cloud Storage: make install-buckets"
    server = pytest.importorskip("gcp_storage_emulator.server", reason=reason)
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    def generation(request, storage) -> str:
        name = request.params.get("object_id") or request.query["name"][0]
        try:
            return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except NotFound:
            return "0"

    def conditional(handler):
        def handle(request, response, storage, *args, **kwargs) -> None:
            now = generation(request, storage)
            if request.query.get("ifGenerationMatch", [now]) != [now]:
                response.status = HTTPStatus.PRECONDITION_FAILED
            elif request.query.get("ifGenerationNotMatch") == [now]:
                response.status = HTTPStatus.NOT_MODIFIED
            else:
                handler(request, response, storage, *args, **kwargs)
                if handler in (objects.get, objects.download):
                    response["x-goog-generation"] = now

        return handle

    with pytest.MonkeyPatch.context() as patch:
        for _, actions in server.HANDLERS:
            for method, handler in actions.items():
                if handler in (objects.insert, objects.get, objects.download, objects.delete):
                    patch.setitem(actions, method, conditional(handler))
        running = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="photos")
        running.start()
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{running._api._httpd.server_port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        yield
        running.stop()


@pytest.fixture(params=STORES)
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty workdir; the folder for copies is ``tmp_path / 'scratch'``."""
    monkeypatch.setenv(bucket.SCRATCH, str(tmp_path / "scratch"))
    if request.param == "memory":
        store = tensorstore.KvStore.open({"driver": "memory"}).result()
        monkeypatch.setattr(bucket, "open_store", lambda scheme, name: store)
    elif request.param == "s3":
        for name, value in of_the_server(request.getfixturevalue("s3")).items():
            monkeypatch.setenv(name, value)
    else:
        request.getfixturevalue("gs")
    return f"{'gs' if request.param == 'gs' else 's3'}://photos/runs/{next(NUMBERS)}/first"


def save(scratch: Path, step: int, size: int = 700) -> None:
    """Writes a checkpoint as Orbax does, under its name when it is whole, and the records up to its step."""
    with (scratch / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {step}}}\n')
    partial = scratch / "checkpoints" / f"{step}.orbax-checkpoint-tmp-1"
    (partial / "params" / "d").mkdir(parents=True)
    for i in range(3):
        (partial / "params" / "d" / str(i)).write_bytes(bytes([step % 256, i]) * size)
    partial.rename(scratch / "checkpoints" / str(step))


def is_whole(step: Path) -> bool:
    number = int(step.name) % 256
    return all((step / "params" / "d" / str(i)).read_bytes() == bytes([number, i]) * 700 for i in range(3))


def contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name[0] != "."}


def steps(scratch: Path) -> list[int]:
    return sorted(int(p.name) for p in (scratch / "checkpoints").glob("*") if p.name.isdecimal())


def elsewhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on as on another machine: with another folder for copies."""
    monkeypatch.setenv(bucket.SCRATCH, str(path))


def test_another_machine_finds_the_workdir_as_it_was_left(address: str, tmp_path: Path, monkeypatch) -> None:
    with folder.lock(address) as scratch:
        for step in (9, 10, 100):
            save(scratch, step)
        (scratch / "pictures").mkdir()
        (scratch / "pictures" / "a b.png").write_bytes(b"\x89PNG")
        (scratch / "summary.json.77.crate_jax.tmp").write_text("unfinished")
    left = contents(scratch)
    elsewhere(tmp_path / "second", monkeypatch)
    with folder.lock(address) as again:
        assert again != scratch
        del left["summary.json.77.crate_jax.tmp"]
        assert contents(again) == left
        assert mirror.shown(str(again / "report.html")) == f"{address}/report.html"
        shutil.rmtree(again / "checkpoints" / "9")
        (again / "pictures" / "a b.png").unlink()
        (again / "metrics.jsonl").write_text("cut\n")
    assert contents(bucket.fetch(address)).keys() == {
        "metrics.jsonl",
        *(f"checkpoints/100/params/d/{i}" for i in range(3)),
    }
    names = bucket.Bucket(address).names()
    assert not any("checkpoints/9/" in name or "pictures" in name for name in names)
    assert (bucket.fetch(address) / "metrics.jsonl").read_text() == "cut\n"


class Killed(BaseException):
    """Ends a copy at one moment."""


def test_at_whatever_moment_a_copy_ends_the_bucket_is_a_state_to_continue_from(tmp_path, monkeypatch) -> None:
    """Before each single request; then the newest checkpoint is whole, and the records reach to it."""
    found = set()
    for requests in itertools.count():
        store = tensorstore.KvStore.open({"driver": "memory"}).result()
        monkeypatch.setattr(bucket, "open_store", lambda scheme, name, store=store: store)
        elsewhere(tmp_path / f"{requests}a", monkeypatch)
        (tmp_path / f"{requests}a").mkdir()
        with folder.lock("gs://b/run") as scratch:
            save(scratch, 9)
        left = iter(range(requests))

        def write(key, data, left=left, real=store.write, **condition):
            if next(left, None) is None:
                raise Killed
            return real(key, data, **condition)

        ended = False
        copy = mirror.Mirror("gs://b/run", scratch)
        with contextlib.suppress(Killed):
            save(scratch, 300)
            shutil.rmtree(scratch / "checkpoints" / "9")
            copy.bucket._store = type(
                "Store", (), {"write": staticmethod(write), "read": store.read, "list": store.list}
            )
            copy.copy(final=True)
            ended = True
        copy._stop()
        elsewhere(tmp_path / f"{requests}b", monkeypatch)
        monkeypatch.setattr(mirror, "LEASE_SECONDS", 0.0)
        with folder.lock("gs://b/run") as scratch:
            newest = max(steps(scratch))
            found.add(newest)
            assert all(is_whole(scratch / "checkpoints" / str(step)) for step in steps(scratch))
            assert f'{{"step": {newest}}}\n' in (scratch / "metrics.jsonl").read_text()
        monkeypatch.undo()
        if ended:
            assert steps(scratch) == [300]
            break
    assert found == {9, 300} and requests > 8


def test_what_the_same_machine_did_after_the_last_copy_is_kept(address: str, monkeypatch) -> None:
    """The lease of a process that was killed here is taken over at once: the kernel's lock says that it is gone."""
    with folder.lock(address) as scratch:
        save(scratch, 9)
    first = mirror.Mirror(address, scratch)
    first._stop()  # as if it were killed
    save(scratch, 40)
    start = time.monotonic()
    with folder.lock(address) as scratch:
        assert steps(scratch) == [9, 40]
    assert time.monotonic() - start < mirror.LEASE_SECONDS / 4
    assert (bucket.fetch(address) / "checkpoints" / "40").is_dir()


@pytest.fixture
def quick_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LEASE_SECONDS", 0.9), ("RENEW_SECONDS", 0.2), ("POLL_SECONDS", 0.05)):
        monkeypatch.setattr(mirror, name, seconds)


def test_a_second_start_is_refused_as_long_as_the_first_lives(address: str, quick_lease, tmp_path, monkeypatch) -> None:
    with folder.lock(address):
        elsewhere(tmp_path / "second", monkeypatch)
        with pytest.raises(UserError, match=rf"workdir {address} is in use by process {os.getpid()} on "):
            folder.lock(address).__enter__()


def test_a_lease_that_nobody_renews_is_taken_over_and_its_holder_writes_no_more(
    address: str, quick_lease, tmp_path, monkeypatch
) -> None:
    signals = []
    monkeypatch.setattr(mirror.os, "kill", lambda *call: signals.append(call))
    with folder.lock(address) as scratch:
        save(scratch, 9)
    hung = mirror.Mirror(address, scratch)
    hung._end.set()
    save(scratch, 50)
    elsewhere(tmp_path / "second", monkeypatch)
    start = time.monotonic()
    with folder.lock(address) as again:
        assert time.monotonic() - start > mirror.LEASE_SECONDS * 0.9
        assert steps(again) == [9]
        with pytest.raises(mirror.LostError, match="has taken it over"):
            hung.copy(final=True)
        hung._end.clear()
        hung._repeat(hung._renew, 0.01)
        assert signals == [(os.getpid(), signal.SIGTERM)]
        with pytest.raises(mirror.LostError):
            hung.finish()
    assert not any("checkpoints/50" in name for name in bucket.Bucket(address).names())


def test_of_several_starts_at_once_one_gets_the_lease(address: str) -> None:
    leases = [mirror.Lease(bucket.Bucket(address)) for _ in range(5)]
    got: list[mirror.Lease] = []

    def start(lease: mirror.Lease) -> None:
        found = lease._bucket.read(bucket.LEASE)
        ready.wait()
        if lease._write(found.generation):
            got.append(lease)

    ready = threading.Barrier(len(leases))
    threads = [threading.Thread(target=start, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].renew()


def test_a_damaged_checkpoint_in_the_bucket_is_not_used_for_reading(address: str, caplog) -> None:
    with folder.lock(address) as scratch:
        save(scratch, 9)
        save(scratch, 10)
    bucket.Bucket(address).write("checkpoints/10/params/d/1", b"other")
    copy = bucket.fetch(address)
    assert is_whole(copy / "checkpoints" / "9")
    assert "checkpoints/10: is damaged" in caplog.text


@pytest.mark.parametrize("copied_by", ["us", "another program"])
def test_an_address_may_name_the_step(address: str, copied_by: str, tmp_path: Path) -> None:
    """It alone is copied, once; of a step that is not there the error says which are, copied or not."""
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(folder.lock(address)) if copied_by == "us" else tmp_path / "local"
        saver = checkpoint.Checkpoints(scratch, keep=3)
        for step in (10, 20):
            saver.save(step, {"encoder": {"w": np.full((3, 5), step, np.float32)}}, {}, {"config": {}})
        saver.close()
    if copied_by != "us":
        files = {p.relative_to(scratch).as_posix(): p for p in scratch.rglob("*") if p.is_file()}
        bucket.Bucket(address).upload(files)
    for path in (f"{address}/checkpoints/10", f"{address}/checkpoints/10/"):
        assert weights_file(path) is None
        params, meta = checkpoint.read_params(path)
        assert meta["step"] == 10 and (params["encoder"]["w"] == 10).all()
    copies = {p.name for p in (tmp_path / "scratch" / "read").rglob("checkpoints/*") if p.is_dir()}
    assert copies == {"10"} and not (bucket.place("read", f"{address}/checkpoints/10")).exists()
    with pytest.raises(CheckpointError, match=f"^{address}: holds no checkpoint of step 15; it holds 20, 10$"):
        checkpoint.read_params(f"{address}/checkpoints/15")
    assert checkpoint.of_step(address) is checkpoint.of_step(f"{address}/checkpoints") is None
    bucket.Bucket(f"{address}/checkpoints/7").write("model.safetensors", b"weights")
    assert weights_file(f"{address}/checkpoints/7") is not None


@pytest.mark.parametrize("address", ["memory", "s3"], indirect=True)  # the emulator refuses such names
def test_nothing_is_written_outside_of_the_copy(address: str, tmp_path: Path) -> None:
    place = bucket.Bucket(address)
    for name in ("../../outside", "a/../../outside", "inside/x", "empty/"):
        place.write(name, b"text")
    assert contents(bucket.fetch(address)) == {"inside/x": b"text"}
    with folder.lock(address) as scratch:
        assert contents(scratch) == {"inside/x": b"text"}
    assert not list(tmp_path.rglob("outside"))


def test_only_what_has_changed_is_read_again(address: str, monkeypatch) -> None:
    place = bucket.Bucket(address)
    place.write("a", b"1")
    place.write("below/b", b"2")
    copy = bucket.fetch(address)
    before = mirror.State.of(copy / "a")
    place.write("below/b", b"3")
    assert contents(bucket.fetch(address)) == {"a": b"1", "below/b": b"3"}
    assert mirror.State.of(copy / "a") == before
    with pytest.raises(UserError, match="there is no such object, and none below it"):
        bucket.fetch(f"{address}x")


def test_readers_of_a_live_run_delete_no_step_that_another_one_reads(address: str) -> None:
    """Seen: what Orbax read went. Copies go an hour after they were fetched, and at once those of a lost run."""

    def upload(*numbers: int) -> None:
        place = bucket.Bucket(address)
        place.delete(place.names())
        for step in numbers:
            for i in range(3):
                place.write(f"checkpoints/{step}/params/d/{i}", bytes([step % 256, i]) * 700)

    def fetched(step: int | None = None) -> list[int]:
        copy = bucket.fetch(address, step)
        assert all(map(is_whole, (copy / "checkpoints").iterdir()))
        return steps(copy)

    upload(100)
    assert fetched() == [100]
    upload(200)
    assert fetched() == [100, 200]
    upload(100, 200)
    assert fetched(100) == [100, 200]
    upload(200, 300)
    copy = bucket.place("read", address) / "checkpoints"
    for step, hours in ((100, 0.9), (200, 1.1)):
        os.utime(copy / str(step), (time.time() - 3600 * hours,) * 2)
    assert fetched() == [100, 300]
    os.utime(copy / "300", (0, 0))
    assert fetched() == [100, 300] and time.time() - (copy / "300").stat().st_mtime < 100, "it is fetched again"
    assert [path.name for path in bucket.fetch(f"{address}/checkpoints", 200).iterdir() if path.is_dir()] == ["200"]
    upload(50)
    assert fetched() == [50], "the newest step is that of the run in the bucket"


def test_data_and_patterns_of_shards(address: str, tmp_path: Path) -> None:
    place = bucket.Bucket(address)
    np.savez(tmp_path / "digits.npz", images=np.zeros((7, 5, 6, 3), np.uint8), labels=np.arange(7) % 2)
    place.upload({"digits.npz": tmp_path / "digits.npz", "other.txt": tmp_path / "digits.npz"})
    config = small(2)
    config.data.source = f"npz:{address}/digits.npz"
    source = data.open_split(config, "train")
    assert source is not None and len(source) == 7
    place.write("digits.npz", b"another")
    (
        bucket.place("read", f"{address}/digits.npz") / "object" / "digits.npz.4711.crate_jax.tmp"
    ).touch()  # of a killed process
    assert [path.name for path in bucket.fetch(f"{address}/digits.npz").parent.iterdir()] == ["digits.npz"]
    pattern = bucket.fetch(f"{address}/dig*.{{npz,tar}}")
    assert contents(pattern.parent).keys() == {"digits.npz"}


def small(steps: int):
    config = named(str(ROOT / "configs" / "quickstart.py") + ":debug")
    config.steps, config.save.every, config.log.every, config.save.keep = steps, 2, 1, 2
    config.log.pictures, config.log.report = 0, False
    return config


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")  # which compiles faster
def test_a_run_continues_on_another_machine_and_is_read_from_the_bucket(s3: str, tmp_path, monkeypatch) -> None:
    for name, value in of_the_server(s3).items():
        monkeypatch.setenv(name, value)
    elsewhere(tmp_path / "first", monkeypatch)
    where = "s3://photos/continued"
    train.run(small(2), where)
    elsewhere(tmp_path / "second", monkeypatch)
    summary = train.run(small(4), where)
    straight = train.run(small(4), str(tmp_path / "straight"))
    assert summary["params_sha256"] == straight["params_sha256"]
    assert [json.loads(line)["step"] for line in (bucket.fetch(where) / "starts.jsonl").open()] == [0, 2]
    here, there = crate_jax.load(tmp_path / "straight"), crate_jax.load(where)
    assert there.name == f"step 4 of {where}"
    images = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    np.testing.assert_array_equal(there.features(images), here.features(images))
    config = named("report")
    config.checkpoint, config.report.sections = where, ("overview",)
    report.run(config, None)
    assert b"continued" in (bucket.fetch(where) / "report.html").read_bytes()


@pytest.mark.slow
def test_killed_in_the_middle_the_same_command_continues_on_another_machine(
    s3: str, cli_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By kill -9, and the local folder is deleted; the weights are those of a run that nobody disturbed."""
    flags = ["--config=configs/quickstart.py:debug", "--config.steps=240", "--config.save.every=20"]
    command = [sys.executable, "-m", "crate_jax.main", *flags, "--config.log.every=10", "--config.log.pictures=0"]

    def start(workdir: str, scratch: str) -> subprocess.Popen[str]:
        env = {**cli_env, **of_the_server(s3), bucket.SCRATCH: str(tmp_path / scratch)}
        return subprocess.Popen(
            [*command, f"--workdir={workdir}"], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    where = "s3://photos/killed"
    for name, value in of_the_server(s3).items():
        monkeypatch.setenv(name, value)
    first = start(where, "a")
    deadline = time.monotonic() + 200
    while not any("checkpoints/" in name for name in bucket.Bucket(where).names()):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.3)
    second = start(where, "b")
    assert "is in use by process" in second.communicate()[0] and second.returncode == 2
    first.kill()
    first.communicate()
    third = start(where, "c")
    told = third.communicate()[0]
    assert third.returncode == 0 and "continuing from step" in told, told
    straight = start(str(tmp_path / "straight"), "d")
    straight.communicate()
    summaries = [json.loads(p.read_text()) for p in tmp_path.rglob("summary.json")]
    assert len(summaries) == 2 and len({s["params_sha256"] for s in summaries}) == 1
