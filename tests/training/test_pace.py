"""A run of so many minutes: its steps are decided once, and every later start keeps them."""

from __future__ import annotations

import json

import pytest

from configs import quickstart
from crate_jax.config import keys_of_time, validate
from crate_jax.errors import ConfigError
from crate_jax.jobs import train
from crate_jax.training import pace

pytestmark = [pytest.mark.one_python, pytest.mark.usefixtures("one_device")]


def tiny(**keys):
    c = quickstart.get_config("debug")
    c.steps, c.log.pictures, c.log.report, c.log.tensorboard = 0, 0, False, False
    c.batch_size, c.encoder.width, c.encoder.depth, c.encoder.heads = 16, 16, 1, 2
    c.decoder.depth, c.decoder.heads = 1, 2
    c.optimizer.warmup_steps, c.optimizer.warmup_share = 0, 0.4
    c.update(keys)
    return c


@pytest.mark.slow
def test_a_run_of_minutes_is_the_run_of_its_steps(tmp_path):
    """The record of the first start decides: 0.3 s per step are 5 steps in 1.5 s, whatever the machine does."""
    for name, keys in (("minutes", {"minutes": 0.025}), ("steps", {"steps": 5})):
        (tmp_path / name).mkdir()
        (tmp_path / name / pace.FILE).write_text(json.dumps({pace.KEY: 300_000}))
        train.run(tiny(**keys), str(tmp_path / name))
    by_minutes, by_steps = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("minutes", "steps"))
    assert by_minutes["steps"] == by_steps["steps"] == 5
    assert by_minutes["params_sha256"] == by_steps["params_sha256"]
    stored = json.loads((tmp_path / "minutes" / "config.json").read_text())
    assert (stored["steps"], stored["minutes"]) == (5, 0.0), "the stored config makes the same run elsewhere"


@pytest.mark.slow
def test_the_first_start_measures_and_later_ones_do_not(tmp_path, monkeypatch):
    first = train.run(tiny(minutes=1e-4), str(tmp_path))
    record = (tmp_path / pace.FILE).read_text()
    duration = json.loads(record)[pace.KEY]
    assert first["steps"] == pace.steps_in(1e-4, duration)
    assert json.loads(record)[pace.CONFIG]["devices"] == "1 x cpu"
    monkeypatch.setattr(pace, "measured", lambda *_: pytest.fail("measured again"))
    steps = first["steps"] + 2
    assert train.run(tiny(minutes=steps * duration / 60e6), str(tmp_path))["steps"] == steps
    assert (tmp_path / pace.FILE).read_text() == record


def test_a_pace_of_another_config_counts_only_once_there_is_a_checkpoint(tmp_path, monkeypatch, caplog):
    """Seen: another batch size in the same folder had the steps of the first one, before anything was trained."""
    caplog.set_level("INFO")
    seconds = [0.3, 0.1, 9.0]
    monkeypatch.setattr(pace, "measured", lambda *_: seconds.pop(0))

    def steps(**keys):
        config = tiny(minutes=0.05, **keys)
        validate(config)
        return pace.decided(config, None, None, None, tmp_path, None, keys_of_time(config)).steps

    assert steps() == steps(seed=3, optimizer={"lr": 1e-3}, log={"every": 7}) == 10
    assert json.loads((tmp_path / pace.FILE).read_text())[pace.CONFIG]["batch_size"] == 16
    assert steps(batch_size=64) == steps(batch_size=64) == 30 and len(seconds) == 1
    assert "changed since: batch_size: 16 -> 64; the time" in caplog.text
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    assert "keeps its number of steps" not in caplog.text
    assert steps(encoder={"width": 32}, data={"image_size": (16, 16)}, batch_size=64) == 30 and len(seconds) == 1
    assert caplog.text.count("keeps its number of steps") == 1
    assert "changed: data.image_size: [8, 8] -> [16, 16]; encoder.width: 16 -> 32; set" in caplog.text
    (tmp_path / "checkpoints" / "4").rmdir()
    (tmp_path / pace.FILE).write_text(json.dumps({pace.KEY: 100_000}))
    assert steps(batch_size=8) == 30 and len(seconds) == 1, "the record of an older version does not say its config"


@pytest.mark.parametrize("minutes", [36e3, 1e16, 1e308])
def test_minutes_of_more_steps_than_an_int32_counts_are_an_error(minutes):
    assert pace.steps_in(35e3, 1000) == 2_100_000_000
    with pytest.raises(ConfigError, match="^config.minutes=.*: more than 2147483647 steps of 0.001 s; at most 3.58e"):
        pace.steps_in(minutes, 1000)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"microseconds_per_step": 41}', 41),
        ('{"microseconds_per_step": 0.5}', 0),
        ('{"microseconds_per_step": -3}', 0),
        ('{"microseconds_per_step": 1e300}', 0),
        ('{"microseconds_per_step": 5000000000}', 0),
        ('{"microseconds_per_step": 41, "config": []}', 0),
        ('{"microseconds_per', 0),
        ("{}", 0),
    ],
)
def test_a_damaged_record_is_none(tmp_path, text, found):
    assert pace.recorded(tmp_path) == 0
    (tmp_path / pace.FILE).write_text(text)
    assert pace.recorded(tmp_path) == found
