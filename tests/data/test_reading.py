"""Images that do not come: who waits names what hangs, gives up in time, and leaves the thread behind."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import types

import grain  # noqa: F401  (the pipeline imports it in its thread, for longer than a test waits)
import numpy as np
import pytest

from crate_jax import config as configs, data
from crate_jax.data import reading, sources
from crate_jax.data.memory import decode_set
from crate_jax.data.undecodable import Undecodable
from crate_jax.parallel.interrupt import Interrupt
from tests.conftest import ROOT


class Hung(sources.SyntheticSource):
    """Synthetic images of 7 x 5 pixels, of which one is not read before `answer` is set."""

    def __init__(self, split: str = "train", hangs: int = 5) -> None:
        super().__init__(split, (7, 5))
        self.hangs, self.answer = hangs, threading.Event()

    def __len__(self) -> int:
        return 9

    def read(self, index: int) -> np.ndarray:
        if index == self.hangs:
            self.answer.wait(5)
        return super().read(index)


@pytest.fixture
def hung(monkeypatch):
    monkeypatch.setattr(reading, "_left_behind", False)
    monkeypatch.setattr(reading, "POLL", 0.02)
    source = Hung()
    yield source
    source.answer.set()


def configured(**keys):
    c = configs.base()
    c.data.update({"image_size": (7, 5), "threads": 2, "stall_seconds": 0.3} | keys)
    return c


NAMED = r"synthetic\[5\] has been read for"


def test_evaluation_images_that_hang_are_named(hung):
    batches = data.eval_batches(configured(), hung, range(9), 3)
    assert len(next(batches)["image"]) == 3
    start = time.monotonic()
    with pytest.raises(reading.Stalled, match=f"waited .* for an evaluation image; {NAMED}") as caught:
        next(batches)
    assert 0.3 <= time.monotonic() - start < 5 and reading._left_behind and caught.value.signum is None


@pytest.mark.parametrize("hangs", [5, 8])
def test_a_set_that_cannot_be_decoded_in_time(hangs, hung, monkeypatch):
    """The headers that are read first, or then a whole image."""
    hung.hangs = hangs
    if hangs == 8:
        monkeypatch.setattr("crate_jax.data.memory.HEADERS", 1)
    with pytest.raises(reading.Stalled, match=rf"synthetic\[{hangs}\] has been read for"):
        decode_set(hung, 1, 2, Undecodable(hung, 0.0), 0.3)


def test_training_batches_that_hang_are_named_and_left(hung, caplog, monkeypatch):
    """A line comes before the deadline; closing the prefetch does not wait for the thread."""
    monkeypatch.setattr("crate_jax.data.memory.HEADERS", 1)
    c = configured(memory_mb=0)
    c.batch_size = 3
    pipeline = data.TrainPipeline(c, hung)
    ready = data.device_prefetch(
        pipeline.batches(), lambda batch: batch, 1, stall_seconds=0.6
    )  # a busy thread reads late
    with caplog.at_level(logging.WARNING), pytest.raises(reading.Stalled, match=f"the next batch; {NAMED}"):
        for _ in range(3):  # an epoch has each image once
            next(ready)
    assert "gives up after config.data.stall_seconds=0.6" in caplog.text
    start = time.monotonic()
    ready.close()
    pipeline.close()
    assert time.monotonic() - start < 0.2 and reading._left_behind
    hung.answer.set()
    ready._thread.join(5)
    assert not ready._thread.is_alive()


def test_what_is_ready_comes_before_the_deadline_counts(hung):
    ready = data.device_prefetch(iter([7, 8]), lambda x: x, 2, stall_seconds=1e-9)
    while not ready.within(0.01):
        pass
    assert ready.within(0) and next(ready) == 7
    ready.close()
    assert not ready.within(0) or next(ready, None) is None


def test_a_signal_ends_a_wait_early_but_not_at_once(hung, monkeypatch):
    monkeypatch.setattr(reading, "SIGNAL_SECONDS", 0.2)
    with Interrupt():
        os.kill(os.getpid(), signal.SIGUSR1)
        start = time.monotonic()
        with pytest.raises(reading.Stalled) as caught:
            list(data.eval_batches(configured(stall_seconds=1e3), hung, range(9), 3))
    assert 0.2 <= time.monotonic() - start < 5 and caught.value.signum == signal.SIGUSR1


@pytest.mark.parametrize("ends", ["by an error", "before all results are taken", "when the last image comes"])
def test_readers_wait_for_what_is_read_but_not_for_ever(ends, hung, monkeypatch):
    comes, begun = ends == "when the last image comes", threading.Event()

    def read(index: int) -> np.ndarray:
        if index == hung.hangs:
            begun.set()
        return hung.read(index)

    monkeypatch.setattr(reading, "SIGNAL_SECONDS", 4.0 if comes else 0.3)
    start = time.monotonic()
    with (
        pytest.raises(KeyError) if ends == "by an error" else contextlib.nullcontext(),
        reading.Readers(2, 9.0) as readers,
    ):
        assert len(next(readers.map(read, [4, 5, 6, 7, 8], "images"))) == 7 and begun.wait(5)
        if ends == "by an error":
            raise KeyError
        if comes:
            hung.answer.set()
    assert reading._left_behind != comes and time.monotonic() - start < 4


@pytest.mark.parametrize("where", ["evaluation", "training"])
def test_a_second_ctrl_c_waits_for_no_image(where, hung, monkeypatch):
    def interrupted(self: reading.Wait) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reading.Wait, "check", interrupted)
    start = time.monotonic()
    if where == "evaluation":
        with pytest.raises(KeyboardInterrupt):
            list(data.eval_batches(configured(), hung, range(9), 3))
    else:
        images = iter(lambda: hung.read(hung.hangs), None)
        with data.device_prefetch(images, lambda x: x, 1, stall_seconds=9.0) as ready, pytest.raises(KeyboardInterrupt):
            next(ready)
    assert time.monotonic() - start < 3 and reading._left_behind


def test_a_worker_whose_words_nobody_reads_ends_with_its_parent(hung, monkeypatch):
    ended, lives, text = threading.Event(), [True, True, False], io.StringIO()
    text.close()  # as a stderr whose reader is gone, it raises
    parent = types.SimpleNamespace(is_alive=lambda: lives.pop(0), join=lambda seconds: None)
    monkeypatch.setattr(reading.multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(reading, "slowest", lambda seconds: f"{len(lives)} has been read for 30 s")
    monkeypatch.setattr(reading.sys, "stderr", text)
    monkeypatch.setattr(reading.os, "_exit", lambda status: ended.set())
    reading.watch_worker(0, 2, 0.3)
    assert ended.wait(5) and not lives


def test_a_thread_that_hangs_does_not_keep_the_process():
    """Python alone would wait for the thread; what was printed is not lost."""
    program = (
        "import threading\n"
        "from crate_jax.data import reading\n"
        "try:\n"
        "    with reading.Readers(1, 0.1) as readers:\n"
        "        list(readers.map(lambda i: threading.Event().wait(20), [0], 'an image'))\n"
        "except reading.Stalled as e:\n"
        "    print(e, end='')\n"
        "reading.leave_if_hung(75)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split("; ")[-1]) == (75, "what hangs is unknown")
