"""What a run records does not depend on where it was stopped, saved or looked at, nor on how many processes it has."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from crate_jax.evals.frozen import FrozenEvaluation
from crate_jax.jobs import train
from crate_jax.parallel.interrupt import Interrupted
from crate_jax.training import loop
from crate_jax.training.observer import Observer, Picture
from tests.jobs.test_resume import tiny

pytestmark = [pytest.mark.one_python, pytest.mark.usefixtures("one_device")]


def records(workdir: Path) -> list[dict]:
    """Its lines, without what depends on time."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_sec"} for line in lines]


@pytest.fixture
def stop(monkeypatch):
    """A function that calls `act` when so many observers have looked; it is given the number of the next look."""

    def before(number: int, act) -> None:
        looks, look = iter(range(number + 1)), loop.Loop._look

        def counted(self, step, observer):
            if next(looks, None) == number:
                act()
            look(self, step, observer)

        monkeypatch.setattr(loop.Loop, "_look", counted)

    yield before


def killed() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def cheap(monkeypatch):
    """Observers that cost nothing, and count their looks: a number, a group of them, a picture named as a number is."""
    seen: dict[str, int] = {}

    def looking(name, found):
        def look(judged):
            seen[name] = seen.get(name, 0) + 1
            return found

        return look

    def observers(config, *_):
        drawn = Picture("loss", np.zeros((2, 2, 3), np.uint8))
        return [
            Observer("evaluation", config.evaluation.every, "score", looking("score", {"score": 1.0}), lambda _: {}),
            Observer("layers", 1, "layer", looking("layer", {"layer/a": 1.0, "layer/b": 2.0})),
            Observer("pictures", 1, "pictures/loss", looking("drawn", drawn)),
        ]

    monkeypatch.setattr(train, "observers", observers)
    return seen


def test_a_signal_during_an_evaluation_loses_none(cheap, stop, tmp_path):
    """It came in the look at step 2, so step 3 was saved and nobody looked at it."""
    c = tiny(steps=5, **{"evaluation.every": 1})
    stop(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="at step 3, state saved"):
        train.run(c, str(tmp_path / "run"))
    assert cheap == {"score": 2, "layer": 2, "drawn": 2}
    train.run(c, str(tmp_path / "run"))
    train.run(c, str(tmp_path / "whole"))
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    names = [sorted(p.name for p in (tmp_path / name / "pictures").iterdir()) for name in ("run", "whole")]
    assert names[0] == names[1] == [f"loss_{step:07d}.png" for step in range(1, 6)]
    assert cheap == {"score": 8, "layer": 10, "drawn": 10}


@pytest.mark.parametrize("number", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (6, 8, 9))])
def test_a_kill_between_two_looks_repeats_none(cheap, stop, tmp_path, number):
    """At a step that was just saved: those that have looked do not look again."""
    c = tiny(steps=5, **{"evaluation.every": 1, "save.every": 3})
    stop(number, killed)
    with pytest.raises(KeyboardInterrupt):
        train.run(c, str(tmp_path))
    train.run(c, str(tmp_path))
    assert cheap == {"score": 4, "layer": 5, "drawn": 5}


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 2, 3])
def test_the_marks_of_what_looks_are_what_it_writes(stop, tmp_path, number):
    """The run's own evaluation, picture and measure of layers: each is there once, whichever came before the kill."""
    keys = {"evaluation.every": 2, "whitebox.every": 2, "log.pictures": 2, "log.pictures_every": 2, "save.every": 2}
    c = tiny(steps=5, **keys)
    stop(number, killed)
    with pytest.raises(KeyboardInterrupt):
        train.run(c, str(tmp_path))
    if number == 3:  # all have looked at step 2, and the kill came at step 4
        shutil.rmtree(tmp_path / "checkpoints" / "4")
    train.run(c, str(tmp_path))
    for name in ("rankme", "whitebox/encoder/rate/01"):
        assert [r["step"] for r in records(tmp_path) if name in r and r["step"] < 5] == [2, 4]
    assert len(list((tmp_path / "pictures").iterdir())) == 3


@pytest.fixture
def without_scores(monkeypatch):
    monkeypatch.setattr(FrozenEvaluation, "final_scores", lambda *_: {"knn_top1": None})


@pytest.mark.slow
def test_the_loss_of_a_run_does_not_depend_on_its_stops(without_scores, monkeypatch, tmp_path):
    """The mean of the steps since the last multiple of config.log.every, however the run was saved or lengthened."""
    keys = {"log.every": 4, "optimizer.schedule": "constant", "optimizer.warmup_epochs": 0.0}
    whole = train.run(tiny(steps=7, **keys), str(tmp_path / "whole"))
    every = train.run(tiny(steps=7, **keys | {"log.every": 1}), str(tmp_path / "every"))
    losses = [r["loss"] for r in records(tmp_path / "every")]
    assert [(r["step"], r["loss"]) for r in records(tmp_path / "whole")] == [
        (4, np.mean(losses[:4])),
        (7, np.mean(losses[4:])),
    ]
    assert whole["loss"] == np.mean(losses[4:]) != every["loss"] == losses[-1]

    saved = train.run(tiny(steps=7, **keys | {"save.every": 2}), str(tmp_path / "saved"))
    after = loop.Loop._after

    def ended(self, step, *args):
        if step in (3, 6):
            os.kill(os.getpid(), signal.SIGTERM)
        after(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_after", ended)
        for step in (3, 6):
            with pytest.raises(Interrupted, match=f"at step {step}, state saved"):
                train.run(tiny(steps=7, **keys), str(tmp_path / "stopped"))
    stopped = train.run(tiny(steps=7, **keys), str(tmp_path / "stopped"))
    for name, summary in (("saved", saved), ("stopped", stopped)):
        assert (summary["loss"], summary["params_sha256"]) == (whole["loss"], whole["params_sha256"])
        assert records(tmp_path / name) == records(tmp_path / "whole")

    shorter = train.run(tiny(steps=6, **keys), str(tmp_path / "longer"))
    assert shorter["loss"] == np.mean(losses[4:6])
    assert train.run(tiny(steps=7, **keys), str(tmp_path / "longer"))["loss"] == whole["loss"]


def test_undecodable_images_of_all_processes_are_counted(without_scores, monkeypatch, tmp_path):
    """Process 0 writes: its number is the sum over the processes, of which the others here have found ten each time."""
    monkeypatch.setattr(loop.distributed, "sum_over_processes", lambda value: value + 10)
    train.run(tiny(steps=3, **{"log.every": 2, "save.every": 1}), str(tmp_path))
    assert [r["undecodable"] for r in records(tmp_path)] == [20, 10]
