"""Each moment of a run belongs to one part of its wall time."""

from __future__ import annotations

import time
import types

import pytest

from crate_jax.training import clock as clocks, loop
from crate_jax.workdir import starts


@pytest.fixture
def tick(monkeypatch):
    """A function that lets seconds pass."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def test_the_parts_sum_to_the_wall_time(tick):
    clock = clocks.Clock()
    tick(3.0)
    clock.turn(clocks.STEPS)
    tick(5.0)
    with clock.spent(clocks.EVALUATION):
        tick(7.0)
        with pytest.raises(OSError), clock.spent(clocks.SAVING):
            tick(11.0)
            raise OSError
        tick(0.5)
    tick(0.25)
    goodput = clock.goodput()
    assert goodput.pop("wall_seconds") == 26.75 and goodput.keys() == clocks.PARTS.keys()
    seconds = {part: share * 26.75 for part, share in goodput.items() if share}
    assert seconds == pytest.approx({"other": 3.0, "steps": 5.25, "evaluation": 7.5, "saving": 11.0})


def test_a_start_that_continues_is_a_restart_up_to_its_first_step(tick):
    clock = clocks.Clock()
    tick(2.0)
    clock.resume({"steps": 40.0, "restarts": 1.0, "a part of another version": 9.0}, lost=6.0)
    tick(3.0)
    clock.turn(clocks.INPUT)
    tick(0.5)
    seconds = {part: x for part, x in clock.seconds().items() if x}
    assert seconds == {"steps": 40.0, "restarts": 12.0, "input": 0.5}


def test_a_wait_is_one_for_images_only_once_the_device_is_idle(tick):
    class Batches:
        def within(self, seconds):
            tick(seconds)
            return False

        def __next__(self):
            tick(2.0)
            return "batch"

    class Loss:
        polls = 0

        def is_ready(self):
            self.polls += 1
            return self.polls > 30

    run = types.SimpleNamespace(clock=clocks.Clock(), _pending=[({"loss": Loss()}, 0, None)])
    run.clock.turn(clocks.STEPS)
    assert loop.Loop._next(run, Batches()) == "batch"
    seconds = run.clock.seconds()
    assert seconds["input"] == 2.0 and seconds["steps"] == pytest.approx(30 * loop.BUSY_POLL)


def test_speed_leaves_out_the_first_interval(monkeypatch):
    now = iter([0.0, 0.0, 10.0, 10.0, 11.0, 11.0, 13.0, 13.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    speed = clocks.Speed()
    speed.restart()
    speed.add(100)
    assert speed.recent() == speed.average() == 10.0
    speed.add(100)
    speed.add(100)
    assert speed.recent() == speed.average() == pytest.approx(200 / 3)
    assert speed.recent() == 0.0


def test_time_in_which_no_process_ran_is_not_lost():
    """Seen: a finished run that was started again an hour later, for not a step, had 84 % of its time in restarts."""
    first, second = ({"time": f"2026-01-01T0{hour}:00:00+00:00"} for hour in (0, 1))
    start, later = map(starts.seconds, (first, second))
    assert starts.lost([first], start + 60, start + 95) == 35  # killed 35 s after its checkpoint
    assert starts.lost([first, second], start + 60, later + 7) == 7  # the second start lived for 7 s
    assert starts.lost([first, second], start + 60, later - 3) == 0  # it opened the records and saved nothing
    assert starts.lost([first], start, None) == starts.lost([{}], start, start + 9) == 0
