"""Images that stop coming in the middle of a run: what the device has is saved, and the same command continues it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest

from crate_jax.data import pipeline, reading
from crate_jax.jobs import train
from crate_jax.parallel.interrupt import Interrupted
from crate_jax.training.clock import PARTS, RESTARTS
from tests.jobs.test_resume import tiny

pytestmark = [pytest.mark.one_python, pytest.mark.usefixtures("one_device")]


@pytest.fixture
def hang_before(monkeypatch):
    """A function that makes the images of a step hang, after `act` if it is given."""
    answer, whole = threading.Event(), pipeline.TrainPipeline._from_memory
    monkeypatch.setattr(reading, "_left_behind", False)
    monkeypatch.setattr(reading, "SIGNAL_SECONDS", 0.3)

    def hang(step, act=lambda: None):
        def batches(self, augmenter, first):
            for number, batch in enumerate(whole(self, augmenter, first), first + 1):
                if number == step:
                    act()
                    answer.wait(60)
                yield batch

        monkeypatch.setattr(pipeline.TrainPipeline, "_from_memory", batches)

    yield hang
    answer.set()


@pytest.mark.slow
def test_a_run_without_images_saves_and_continues_with_the_same_bits(hang_before, tmp_path):
    keys = {"steps": 4, "save.every": 100, "log.every": 1, "data.prefetch": 1}
    began = time.monotonic()
    hang_before(3, threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start)
    with pytest.raises(Interrupted, match="SIGTERM at step 2, state saved .waited") as stopped:
        train.run(tiny(**keys), str(tmp_path / "run"))
    assert stopped.value.exit_code == 143
    hang_before(3)
    with pytest.raises(reading.Stalled, match="waited 1 s for the next batch; .*; stopped at step 2, state saved"):
        train.run(tiny(**keys, **{"data.stall_seconds": 1.0}), str(tmp_path / "run"))
    hang_before(0)
    ends, took = [], {}
    for name in ("run", "whole"):
        ends.append(train.run(tiny(**keys), str(tmp_path / name)))
        took[name] = time.monotonic() - began
        began = time.monotonic()
    for end in ends:
        shares = {part: end["goodput"][part] for part in PARTS}
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
        assert {part for part, share in shares.items() if not share} == ({RESTARTS} if end is ends[1] else set())
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["goodput"] == ends[0]["goodput"]
    seconds = ends[0]["goodput"]["wall_seconds"]
    assert seconds * ends[0]["goodput"]["input"] > 0.3 and seconds * ends[0]["goodput"]["restarts"] > 0.2
    assert 0.6 * took["whole"] < ends[1]["goodput"]["wall_seconds"] < took["whole"] and seconds < took["run"]
    assert ends[0]["params_sha256"] == ends[1]["params_sha256"] and ends[0]["loss"] == ends[1]["loss"]
