"""The profiler's trace: which steps it holds, and where it lies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from crate_jax.errors import ConfigError
from crate_jax.parallel import distributed
from crate_jax.training.trace import Trace

pytestmark = pytest.mark.one_python


def run(trace: Trace, steps: range) -> None:
    """What the loop does with a trace."""
    state = jnp.zeros(3)
    for step in steps:
        trace.begin(step, state)
        with trace.step(step):
            state = state + 1
        trace.end(step, state)
    trace.close()


def traced(folder) -> list[list[int]]:
    """The steps in each trace under a folder, as XProf's own reader finds them."""
    found = []
    for path in sorted((folder / "plugins" / "profile").glob("*/*.xplane.pb")):
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "train"]
        found.append(sorted(dict(event.stats)["step_num"] for event in events))
    return found


@pytest.mark.parametrize(
    ("steps", "total", "done", "wanted"),
    [
        ((3, 4), 7, range(1, 8), [3, 4]),
        ((2, 9), 5, range(4, 6), [4, 5]),  # a run of 5 steps that continues after step 3
    ],
)
def test_a_trace_holds_the_steps_asked_for(steps, total, done, wanted, tmp_path, caplog):
    caplog.set_level("INFO")
    run(Trace(steps, total, tmp_path), done)
    assert traced(tmp_path) == [wanted]
    (line,) = [r.getMessage() for r in caplog.records if r.name.endswith("trace")]
    (where,) = (tmp_path / "plugins" / "profile").iterdir()
    assert line == f"profile of steps {wanted[0]} to {wanted[1]}: {where}; `xprof {tmp_path}` shows it"


def test_no_trace_without_the_key_after_its_steps_or_in_another_process(tmp_path, monkeypatch):
    run(Trace((), 7, tmp_path), range(1, 8))
    run(Trace((1, 2), 7, tmp_path), range(3, 8))
    monkeypatch.setattr(distributed, "first", lambda: False)
    run(Trace((3, 4), 7, tmp_path), range(1, 8))
    assert not list(tmp_path.iterdir())


def test_steps_that_the_run_does_not_have_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="config.log.profile=8,9: the run has only 7 steps"):
        Trace((8, 9), 7, tmp_path)
