"""Sweeps: what is run, what is skipped, what continues, and what the table and the figure say."""

from __future__ import annotations

import csv
import functools
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import sweep as sweep_config
from crate_jax.errors import CheckpointError, ConfigError, NonFiniteError, UserError
from crate_jax.jobs import sweep, sweep_table
from crate_jax.parallel.interrupt import Interrupt, Interrupted
from tests.conftest import ROOT

pytestmark = [pytest.mark.one_python, pytest.mark.usefixtures("one_device")]

TINY = {
    "steps": 4, "batch_size": 16, "encoder.width": 16, "encoder.depth": 1, "encoder.heads": 2, "decoder.depth": 1,
    "decoder.heads": 2, "log.pictures": 0, "log.tensorboard": False, "log.report": False,
}  # fmt: skip


def tiny(arg: str = "base=quickstart,debug", **changes):
    """A sweep over models of one block on the digits."""
    c = sweep_config.get_config(arg)
    for key, value in {**TINY, **changes}.items():
        *section, leaf = key.replace("__", ".").split(".")
        (c[section[0]] if section else c)[leaf] = value
    return c


def summaries(folder) -> dict[str, dict]:
    return {p.parent.name: json.loads(p.read_text()) for p in sorted(folder.glob("*/summary.json"))}


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


TWO_BY_TWO = dict(sweep__key="encoder.lam", sweep__values=(0.1, 5.0), sweep__seeds=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_device):
    """A sweep of two values and two seeds; tests only read it, or run it again."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, sweep.run(tiny(**TWO_BY_TWO), str(folder))


def test_each_value_and_seed_gets_the_run_it_would_have_alone(finished):
    folder, result = finished
    names = [f"encoder.lam={v},seed={s}" for v in ("0.1", "5") for s in (0, 1)]
    assert sorted(summaries(folder)) == names and result["failed"] == []
    for name in names:
        config = json.loads((folder / name / "config.json").read_text())
        assert f"encoder.lam={config['encoder']['lam']:g},seed={config['seed']}" == name
        assert config["job"] == "pretrain" and config["sweep"] == {
            "key": "", "values": [], "seeds": 1, "judge": [], "judge_steps": 0
        }  # fmt: skip
    assert len({s["params_sha256"] for s in summaries(folder).values()}) == 4


@pytest.mark.slow
def test_runs_of_minutes_have_the_same_steps_and_can_get_more_values(tmp_path, monkeypatch):
    """The sweep measures once a run has begun; what a later start would measure does not count then."""
    seconds = [9.0, 0.3, 0.4]
    monkeypatch.setattr(sweep.pace, "measured", lambda *_: seconds.pop())
    keys = dict(sweep__key="encoder.lam", steps=0, minutes=0.015)
    with pytest.raises(ConfigError, match="the warm-up takes 4 steps, the run has"):  # before any run; measures
        sweep.run(tiny(**keys, sweep__values=(0.1,), optimizer__warmup_steps=4, encoder__width=8), str(tmp_path))
    assert seconds == [9.0, 0.3]
    for values in ((0.1,), (5.0, 0.1), (5.0, 0.1)):
        result = sweep.run(tiny(**keys, sweep__values=values), str(tmp_path))
        assert result["failed"] == [] and seconds == [9.0]
        found = summaries(tmp_path)
        assert [summary["steps"] for summary in found.values()] == [3] * len(values)
    with pytest.raises(ConfigError, match="lam=5,seed=0: .*warmup_steps=4: the warm-up takes 4 steps, the run has"):
        sweep.run(tiny(**keys, sweep__values=(5.0,), optimizer__warmup_steps=4), str(tmp_path))


def test_table_csv_and_json_hold_the_numbers_of_the_summaries(finished):
    folder, result = finished
    text = (folder / "table.md").read_text()
    assert result["table"] == text and "`encoder.lam`: 4 of 4 runs finished" in text
    header, *rows = table_rows(text)
    rows, differences = rows[:2], rows[2:]
    assert [row[:2] for row in rows] == [["0.1", "2"], ["5", "2"]]
    assert [row[:2] for row in differences] == [["encoder.lam", "seeds"], ["5", "2"]]
    names = {"probe %": "probe_top1", "untrained k-NN %": "knn_top1_untrained", "pixels probe %": "probe_top1_pixels"}
    for value, row in zip(("0.1", "5"), rows, strict=True):
        runs = [summaries(folder)[f"encoder.lam={value},seed={s}"] for s in (0, 1)]
        for shown, name in names.items():
            a, b = (100 * r[name] for r in runs)
            mean, std, *ends = map(float, re.findall(r"-?[\d.]+", row[header.index(shown)]))
            assert (len(ends) == 2) == (name == "probe_top1")  # the interval of the mean
            assert mean == pytest.approx((a + b) / 2, abs=0.051)
            assert std == pytest.approx(abs(a - b) / 2**0.5, abs=0.051)  # of two, with n - 1
        mean = float(row[header.index("loss")].split(" ± ")[0])
        assert mean == pytest.approx(sum(r["loss"] for r in runs) / 2, rel=1e-3)
    lines = list(csv.DictReader((folder / "sweep.csv").open()))
    records = json.loads((folder / "sweep.json").read_text())
    for line, record in zip(lines, records, strict=True):
        assert float(line["probe_top1"]) == record["probe_top1"] == summaries(folder)[line["folder"]]["probe_top1"]
        assert record["status"] == "done" and float(line["value"]) == record["value"]


@pytest.mark.slow
def test_judges_score_each_run_once_on_their_own_data(finished, tmp_path, monkeypatch):
    """On another set than that of pre-training; what a judge found is kept, and a run's config does not change."""
    folder, _ = finished
    for split, count in (("train", 9), ("test", 4)):
        for label, colour in (("red", (250, 9, 9)), ("blue", (9, 9, 250))):
            (tmp_path / "set" / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), colour).save(tmp_path / "set" / split / label / f"{i}.png")
    name = f"logreg@folder:{tmp_path / 'set'}"
    shutil.copytree(folder, tmp_path / "sweep")
    c = tiny(**TWO_BY_TWO, sweep__judge=("knn", name))
    header, *rows = table_rows(sweep.run(c, str(tmp_path / "sweep"))["table"])
    rows, against = rows[:2], rows[2]
    assert against == ["encoder.lam", "seeds", *(column for column in header if column in against[2:])]
    assert {f"{name} %", "knn %"} < set(against)
    records = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [record[f"judge {name}"] for record in records] == [1.0] * 4  # colours, not digits
    for record in records:
        (home,) = (tmp_path / "sweep" / record["folder"] / "judged").glob("knn-*")
        (line,) = (home / "results.jsonl").read_text().splitlines()
        assert json.loads(line)["top1"] == record["judge knn"] < 1 and json.loads(line)["data"] == "digits"
        assert json.loads(line)["train_images"] == 1437 and json.loads(line)["pool"] == "mean"  # the run's
    assert [row[header.index(f"{name} %")] for row in rows] == ["100.0 ± 0.0"] * 2  # equal: not an interval
    monkeypatch.setattr(sweep.evaluate, "run", lambda *args: 1 / 0)
    sweep.run(c, str(tmp_path / "sweep"))
    assert sweep.run(tiny(**TWO_BY_TWO), str(tmp_path / "sweep"))["failed"] == []


def test_a_judge_has_its_recipe_and_its_task():
    c = tiny(sweep__key="checkpoint", sweep__judge=("finetune_mae@food101", "segment_upernet@folder:X", "knn"))
    c.data.source, c.data.data_dir = "folder:HERE", "TFDS"
    mae, upernet, knn = (judge.config(c, "RUN") for judge in sweep.judges(c))
    assert (mae.job, upernet.job, knn.job) == ("finetune", "segment", "evaluate")
    assert (mae.data.source, mae.data.eval_split, mae.data.data_dir) == ("tfds:food101", "validation", "TFDS")
    assert (upernet.data.source, knn.data.source) == ("folder:X", "folder:HERE")
    assert (mae.epochs, mae.optimizer.layer_decay, upernet.steps, mae.checkpoint) == (100, 0.65, 160_000, "RUN")
    c.sweep.judge_steps = 700
    mae, upernet, _ = (judge.config(c, "RUN") for judge in sweep.judges(c))
    assert (mae.steps, mae.epochs, mae.optimizer.warmup_share, mae.optimizer.warmup_epochs) == (700, 0, 0.05, 0)
    assert (upernet.steps, upernet.optimizer.warmup_share) == (700, 1500 / 160_000)


@pytest.mark.slow
def test_runs_that_exist_are_judged_on_several_tasks_without_training(finished, tmp_path):
    folder, _ = finished
    runs = (str(folder / "encoder.lam=0.1,seed=1"),)
    judges = ("knn", "finetune_crate@digits")
    c = tiny("over=transfer,base=quickstart,debug", sweep__values=runs, sweep__judge=judges, sweep__judge_steps=2)
    header, *rows = table_rows(sweep.run(c, str(tmp_path / "w"))["table"])
    assert header == ["checkpoint", "seeds", "knn %", "finetune_crate@digits %"]
    assert [row[0] for row in rows] == list(runs)
    records = json.loads((tmp_path / "w" / "sweep.json").read_text())
    for record, run in zip(records, runs, strict=True):
        home = tmp_path / "w" / record["folder"]
        assert {p.name for p in home.iterdir()} == {"judged"}  # no run of its own
        (judged,) = (home / "judged").glob("finetune_crate_digits-*")
        line = json.loads((judged / "results.jsonl").read_text())
        assert (
            run in line["checkpoint"] and line["steps"] == 2 and line["top1"] == record["judge finetune_crate@digits"]
        )
    with pytest.raises(ConfigError, match="config.sweep.judge is empty"):
        sweep.expand(tiny(sweep__key="checkpoint", sweep__values=runs))


def scored(monkeypatch, score):
    """Judges that give score(config) in place of their work; returns the list of the judged configs."""
    asked = []

    def run(config, home):
        asked.append(config)
        os.makedirs(home)
        line = {config.protocol.metric: score(config)}
        (Path(home) / "results.jsonl").write_text(json.dumps(line) + "\n")
        return line

    for job in (sweep.evaluate, sweep.finetune):
        monkeypatch.setattr(job, "run", run)
    return asked


def test_a_score_is_kept_for_the_same_judge_and_the_same_encoder_only(finished, tmp_path, monkeypatch):
    """Also two judges whose names become the same where a name has no slash are two."""
    asked = scored(monkeypatch, lambda c: 0.1 * len(asked))
    both = ("logreg@folder:a/b", "logreg@folder:a_b", "finetune_crate@digits")
    c = tiny(**TWO_BY_TWO, sweep__judge=both)
    setting = sweep.expand(c)[0]

    def judge(encoder, **changes):
        c.sweep.update(changes)
        record, known = {"status": "done", "folder": "F"}, {str(tmp_path / setting.name): encoder}
        return list(sweep._judged(c, tmp_path, setting, record, known, Interrupt()).values())[2:]

    first = judge("E")
    assert first == pytest.approx([0.1, 0.2, 0.3]) and judge("E") == first
    assert judge("E", judge_steps=2) == pytest.approx([0.1, 0.2, 0.4])  # probes have no steps
    assert judge("other", judge_steps=0) == pytest.approx([0.5, 0.6, 0.7])
    assert judge("E") == first and len(asked) == 7
    runs = sorted(finished[0].glob("*=*"))
    moved = shutil.copytree(runs[0], tmp_path / "moved")
    one, same, other = (sweep._encoder(str(run), "") for run in (runs[0], moved, runs[1]))
    assert one == same != other


@pytest.mark.slow
def test_a_judge_that_diverges_leaves_its_score_out_and_each_run_is_read_once(finished, tmp_path, monkeypatch):
    bad, good = (str(finished[0] / f"encoder.lam={lam},seed=1") for lam in ("0.1", "5"))
    asked = scored(monkeypatch, lambda c: diverge() if c.checkpoint == bad else 0.25)

    def diverge():
        raise NonFiniteError("the loss is nan")

    read, load = [], sweep.pretrained.load
    monkeypatch.setattr(sweep.pretrained, "load", lambda *args: read.append(args[0]) or load(*args))
    c = tiny("over=transfer,base=quickstart,debug,seeds=2", sweep__values=(bad, good), sweep__judge=("finetune_crate",))
    result = sweep.run(c, str(tmp_path / "w"))
    assert read == [bad, good] and len(asked) == 4
    records = json.loads((tmp_path / "w" / "sweep.json").read_text())
    assert [record["judge finetune_crate"] for record in records] == [None, None, 0.25, 0.25]
    assert result["failed"] == [f"{record['folder']}, judged by finetune_crate" for record in records[:2]]


def test_a_signal_ends_a_sweep_between_two_judges(finished, tmp_path, monkeypatch):
    """The first score is kept, and the same command goes on."""
    first, second = (str(finished[0] / f"encoder.lam={lam},seed=1") for lam in ("0.1", "5"))
    asked = scored(monkeypatch, lambda c: Interrupt.came() or os.kill(os.getpid(), signal.SIGTERM) or 0.25)
    c = tiny("over=transfer,base=quickstart,debug", sweep__values=(first, second), sweep__judge=("knn", "logreg"))
    with pytest.raises(Interrupted, match="stopped by SIGTERM before logreg judged"):
        sweep.run(c, str(tmp_path / "w"))
    assert len(asked) == 1
    asked = scored(monkeypatch, lambda c: 0.5)
    sweep.run(c, str(tmp_path / "w"))
    records = json.loads((tmp_path / "w" / "sweep.json").read_text())
    assert [(r["judge knn"], r["judge logreg"]) for r in records] == [(0.25, 0.5), (0.5, 0.5)] and len(asked) == 3


def test_devices_divide_the_batches_of_what_trains():
    c = tiny(sweep__key="encoder.lam", sweep__values=(0.1,), batch_size=24, accumulate=2)
    c.sweep.judge = ("finetune_crate@digits", "knn")
    judging = [judge.config(c, "") for judge in sweep.judges(c)]
    judging[0].batch_size, judging[1].evaluation.batch_size = 40, 7
    settings = sweep.expand(c)
    assert sweep._common_batch(c, settings, judging) == 4
    c.sweep.key = "checkpoint"
    assert sweep._common_batch(c, settings, judging) == 40 and sweep._common_batch(c, settings, judging[1:]) == 7


def test_folders_of_different_values_have_different_names_that_a_disk_takes():
    texts = ["runs/a/b", "runs/a_b", "runs_a_b", "x" * 300, "x" * 301, "é" * 300]
    names = [sweep._plain(text) for text in texts]
    assert len(set(names)) == 6 and names[2] == "runs_a_b" and max(len(n.encode()) for n in names) == 100
    assert sweep._plain("é/", "made") != sweep._plain("é/", "made again") != sweep._plain("é/")


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ("svm@digits", "'svm@digits' is not a judge; write PROTOCOL, PROTOCOL@TASK or PROTOCOL@SOURCE"),
        ("knn@mars", "knn@mars: config string: task=mars is not one of"),
        ("knn,knn", "knn is listed twice"),
        ("logreg@folder:nowhere", "nowhere"),
    ],
)
def test_judges_that_cannot_judge_are_named_before_any_run(judge, words, tmp_path):
    with pytest.raises(UserError, match=words):
        sweep.run(tiny(**TWO_BY_TWO, sweep__judge=(judge,)), str(tmp_path))
    assert not list(tmp_path.glob("*=*"))


def test_the_figure_is_drawn_twice(finished):
    folder, _ = finished
    pixels = np.asarray(Image.open(folder / "sweep.png").convert("RGB"))
    assert pixels.shape[1] > 1000 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert (folder / "sweep.svg").read_text().rstrip().endswith("</svg>")


def test_running_again_trains_nothing_and_more_values_keep_the_old_runs(finished):
    folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*=*/**/*") if p.is_file()}
    table = (folder / "table.md").read_text()
    assert sweep.run(tiny(**TWO_BY_TWO), str(folder))["table"] == table
    less = tiny(**TWO_BY_TWO | {"sweep__values": (5.0,)}, log__every=1)  # how it is logged makes no other run
    assert table_rows(sweep.run(less, str(folder))["table"])[1][:2] == ["5", "2"]
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*=*/**/*") if p.is_file()} == before
    assert sweep.run(tiny(**TWO_BY_TWO), str(folder))["table"] == table


def test_a_run_that_was_killed_before_its_report_is_not_finished(tmp_path):
    """The run writes its summary, then the report, then the summary with the report's place."""
    setting = sweep.expand(tiny(**TWO_BY_TWO))[0]
    (home := tmp_path / setting.name).mkdir()
    assert not sweep._is_finished(home, setting)
    (home / "config.json").write_text(setting.config.to_json())
    for text, done in ((None, False), ('{"loss": 0.9}', False), ('{"loss": 0.9, "report": null}', True), ("{", False)):
        if text is not None:
            (home / "summary.json").write_text(text)
        assert sweep._is_finished(home, setting) == done, text


def test_a_folder_with_a_run_of_another_config_is_named_before_anything_runs(finished):
    folder, _ = finished
    changed = tiny(**TWO_BY_TWO | {"sweep__values": (0.3, 5.0)}, optimizer__lr=5e-4)
    with pytest.raises(ConfigError, match=r"encoder.lam=5,seed=0 holds a run of another config \(optimizer.lr: 0.002 "):
        sweep.run(changed, str(folder))
    assert not (folder / "encoder.lam=0.3,seed=0").exists()


@pytest.mark.slow
def test_a_run_that_diverges_is_recorded_and_the_others_go_on(tmp_path, capsys):
    c = tiny(sweep__key="optimizer.lr", sweep__values=(1e30, 1e-3), optimizer__clip_norm=0.0, steps=6)
    result = sweep.run(c, str(tmp_path))
    assert result["failed"] == ["optimizer.lr=1e30,seed=0"]
    failed, done = json.loads((tmp_path / "sweep.json").read_text())
    assert failed["status"] == "failed" and "the loss is" in failed["error"] and done["status"] == "done"
    header, first, second = table_rows(result["table"])
    assert first[:3] == ["1e30", "0 + 1 failed", "-"] and second[:2] == ["0.001", "1"]
    assert "* `optimizer.lr=1e30,seed=0` failed: the loss is" in result["table"]
    with pytest.raises(NonFiniteError, match="in optimizer.lr=1e30,seed=0; all other runs are finished"):
        sweep.show(result)  # status 2, after the table
    assert result["table"] in capsys.readouterr().out


class KillAtStart(logging.Handler):
    """Sends this process SIGTERM when a run says that it starts to train."""

    def emit(self, record):
        if record.msg.startswith("training %d"):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_signal_stops_the_sweep_after_the_step_and_the_sweep_continues(finished, tmp_path, caplog):
    caplog.set_level(logging.INFO, "crate_jax")
    folder = shutil.copytree(finished[0], tmp_path / "sweep")
    c = tiny(sweep__key="encoder.lam", sweep__values=(5.0, 0.3, 0.4))
    trainer, killer = logging.getLogger("crate_jax.training.loop"), KillAtStart()
    trainer.addHandler(killer)
    try:
        with pytest.raises(Interrupted, match="SIGTERM at step 1, state saved, in encoder.lam=0.3,seed=0") as caught:
            sweep.run(c, str(folder))
    finally:
        trainer.removeHandler(killer)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert not (folder / "encoder.lam=0.4,seed=0").exists()
    assert "1 of 3 runs finished" in (folder / "table.md").read_text()
    caplog.clear()
    c.sweep.values = (5.0, 0.3)
    assert "2 of 2 runs finished" in sweep.run(c, str(folder))["table"]
    assert caplog.text.count("continuing from step 1") == 1 and "1 of 2 runs are finished already" in caplog.text


@pytest.mark.slow
def test_a_stopped_command_continues_where_it_was(cli_env, tmp_path):
    """SIGTERM in the second run: status 143 and one line; the same command resumes it and leaves the first alone."""
    command = [
        sys.executable, "-m", "crate_jax.main", "--config=configs/sweep.py:base=quickstart,debug",
        *(f"--config.{key}={value}" for key, value in TINY.items() if key != "steps"),
        "--config.steps=600", "--config.log.every=20", "--config.save.every=100000",
        "--config.sweep.values=0.5,0.75", f"--workdir={tmp_path / 'sweep'}",
    ]  # fmt: skip
    first, second = (tmp_path / "sweep" / f"corruption.mask_ratio={v},seed=0" for v in (0.5, 0.75))
    stderr_file = tmp_path / "stderr"  # a pipe that nobody reads would fill up and stop the process
    with stderr_file.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=cli_env, stderr=out, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while not ((second / "metrics.jsonl").exists() and (second / "metrics.jsonl").read_text()):
            assert process.poll() is None and time.monotonic() < deadline, stderr_file.read_text()[-2000:]
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=240)
    stderr = stderr_file.read_text()
    assert status == 128 + signal.SIGTERM, stderr[-2000:]
    last = stderr.strip().splitlines()[-1]
    step = int(re.search(r"stopped by SIGTERM at step (\d+), state saved, in corruption.mask_ratio=0.75", last)[1])
    assert 0 < step < 600 and "the same command continues it" in last and "Traceback" not in stderr
    assert "1 of 2 runs finished" in (tmp_path / "sweep" / "table.md").read_text()
    written = (first / "summary.json").stat().st_mtime_ns
    again = subprocess.run(command, cwd=ROOT, env=cli_env, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "1 of 2 runs are finished already" in again.stderr
    assert again.stderr.count(f"continuing from step {step} of {second}") == 1
    assert (first / "summary.json").stat().st_mtime_ns == written
    assert summaries(tmp_path / "sweep")[second.name]["steps"] == 600
    assert "2 of 2 runs finished" in again.stdout and "--config.sweep.values=0.5,0.75" in again.stdout


def test_damaged_files_of_a_run_are_named(tmp_path):
    setting = sweep.expand(tiny(**TWO_BY_TWO))[0]
    home = tmp_path / setting.name
    home.mkdir()
    (home / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="config.json: is not a JSON object; delete"):
        sweep._is_finished(home, setting)
    for text, what in (("[1]", "is not a JSON object"), ('{"rankme_untrained": "x"}', "where a number belongs")):
        (home / "summary.json").write_text(text)
        with pytest.raises(CheckpointError, match=f"summary.json: .*{what}; delete it and repeat"):
            sweep._record(tmp_path, setting)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT"])
def test_a_signal_reaches_every_open_interrupt_whenever_it_comes(name, request):
    """So a sweep stops too when the signal came while a run was evaluating, and a run when it came before its start."""
    signum = signal.Signals[name]
    if signal.getsignal(signum) == signal.SIG_IGN:  # a shell starts background commands, such as these tests, so
        request.addfinalizer(functools.partial(signal.signal, signum, signal.signal(signum, signal.SIG_DFL)))
    handler = signal.getsignal(signum)
    with Interrupt() as sweep_interrupt:
        with Interrupt() as run_interrupt:
            assert run_interrupt.signal is None and callable(signal.getsignal(signum))
            os.kill(os.getpid(), signum)
            assert run_interrupt.signal == signum
        assert sweep_interrupt.signal == signum
        with Interrupt() as next_run:
            assert next_run.signal == signum
    with Interrupt() as later:
        assert later.signal is None
    assert signal.getsignal(signum) == handler


def test_handlers_that_a_library_sets_meanwhile_are_replaced():
    with Interrupt() as interrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as libtpu sets one in C++
        Interrupt.renew()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.signal is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


BAD = [
    (dict(sweep__key="encoder.lamda"), "no such key to sweep; did you mean encoder.lam"),
    (dict(sweep__key="encoder"), "config.sweep.key='encoder': there is no such key"),
    (dict(sweep__key="job"), "there is no such key to sweep"),
    (dict(sweep__key=""), "config.sweep.key='': there is no such key"),
    (dict(sweep__key="seed"), "seeds go into config.sweep.seeds"),
    (dict(sweep__seeds=0), "config.sweep.seeds=0: must lie in [1, 10000]"),
    (dict(sweep__values=()), "config.sweep.values is empty"),
    (dict(sweep__values=(0.1, "many")), "'many' is not a valid float, which config.encoder.lam is"),
    (dict(sweep__values=(True,)), "True is not a valid float"),
    (dict(sweep__values=("1/14", "1e999999999")), "'1e999999999' is not a valid float"),
    (dict(sweep__values=("1/0",)), "'1/0' is not a valid float"),
    (dict(sweep__values=(f"{10**400}/3",)), "000/3' is not a valid float"),
    (dict(sweep__values=(10**400,)), "000 is not a valid float"),
    (dict(sweep__values=(0.1, 0.5, 0.1)), "0.1 is listed twice"),
    (dict(sweep__key="encoder.depth", sweep__values=(2, 2.5)), "2.5 is not a valid int"),
    (dict(sweep__key="encoder.name", sweep__values=(1,)), "1 is not a valid str"),
    (dict(sweep__key="data.flip", sweep__values=(0.5, 1.5)), "data.flip=1.5,seed=0: config.data.flip=1.5: must lie in"),
    (dict(sweep__key="corruption.rop_ratio"), "no effect with config.corruption.name='mask'; it needs rop"),
    (dict(sweep__key="penalty.weight"), "no effect with config.penalty.name='none'; it needs so or srip"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[m for _, m in BAD])
def test_a_sweep_that_cannot_be_is_one_line(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        sweep.expand(tiny(**TWO_BY_TWO | changes))
    assert "\n" not in str(caught.value)


def test_all_settings_are_checked_before_the_first_runs(tmp_path):
    """The last value does not fit the schedule, the penalty's patterns, or the devices."""
    for changes, message in [
        (dict(sweep__key="optimizer.lr", sweep__values=(1e-3, 1e-9), optimizer__min_lr=1e-6), "must not exceed"),
        (dict(sweep__key="penalty.include", sweep__values=((".*kernel",), ("nothing",)), penalty__name="so",
              penalty__weight=1e-6), "penalty.include"),
        (dict(sweep__key="mesh.data", sweep__values=(1, 3)), "mesh.data=3"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=f"seed=0: .*{message}"):
            sweep.run(tiny(**changes), str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_values_take_the_type_of_their_key():
    """Fractions, lists of texts in one, whole numbers for a float; a penalty of 0 is the run without one."""

    def values(key, *given):
        settings = sweep.expand(tiny(sweep__key=key, sweep__values=given))
        section, leaf = key.rsplit(".", 1)
        return [getattr(s.config, section)[leaf] for s in settings]

    assert values("corruption.mask_ratio", "1/4,0.5") == [0.25, 0.5]
    assert values("encoder.lam", 1, 0.5) == [1.0, 0.5]
    assert values("corruption.name", "mask,rop") == ["mask", "rop"]
    assert values("optimizer.schedule", "cosine", "constant") == ["cosine", "constant"]
    assert values("data.crop_scale", (0.2, 1.0), (0.5, 1.0)) == [(0.2, 1.0), (0.5, 1.0)]
    assert values("save.keep", "1,2") == [1, 2]
    assert penalties("over=penalty,penalty=so,base=quickstart") == [
        ("none", 0.0), ("so", 1e-7), ("so", 1e-6), ("so", 1e-5),
    ]  # fmt: skip


def penalties(arg, **changes):
    settings = sweep.expand(tiny(arg, **changes))
    assert len({s.name for s in settings}) == len(settings)
    return [(s.config.penalty.name, s.config.penalty.weight) for s in settings]


def test_penalties_and_their_weights_are_swept_together():
    assert penalties("over=penalty,base=quickstart") == [("none", 0.0), ("so", 1e-6), ("srip", 1e-4)]
    whole = [("none", 0.0), *(("so", g) for g in (1e-7, 1e-6, 1e-5)), *(("srip", g) for g in (1e-5, 1e-4, 1e-3))]
    assert penalties("over=gamma,base=quickstart") == whole
    own = dict(sweep__key="penalty", sweep__values=("none,so, so:3e-6,srip:1.23456e-3",))
    assert penalties("base=quickstart", **own) == [("none", 0), ("so", 1e-6), ("so", 3e-6), ("srip", 1.23456e-3)]
    settings = sweep.expand(tiny("over=penalty,base=quickstart,seeds=2"))
    assert [s.name for s in settings][1:3] == ["penalty=none,seed=1", "penalty=so_1e-6,seed=0"]


@pytest.mark.parametrize("value", ["l2:1e-3", "so:0", "none:1e-6", "so:much", "so:", ":1e-6", ""])
def test_a_value_that_is_no_penalty_is_named(value):
    if value == "so:":
        assert penalties("base=quickstart", sweep__key="penalty", sweep__values=(value,)) == [("so", 1e-6)]
        return
    with pytest.raises(ConfigError, match=f"sweep.values: '{value}' is not a penalty.*NAME is one of so, srip"):
        penalties("base=quickstart", sweep__key="penalty", sweep__values=(value,))


@pytest.mark.slow
def test_a_sweep_of_penalties_has_a_table_of_accuracies_and_ranks(tmp_path):
    c = tiny("over=penalty,base=quickstart,debug", sweep__values=("so:2e-6",))
    header, so = table_rows(sweep.run(c, str(tmp_path))["table"])
    assert [row[0] for row in (header, so)] == ["penalty", "so:2e-6"]
    assert {"k-NN %", "probe %", "RankMe", "LiDAR", "untrained RankMe", "untrained LiDAR"} <= set(header)
    written = summaries(tmp_path)["penalty=so_2e-6,seed=0"]
    assert so[header.index("LiDAR")] == sweep_table.label(written["lidar"]) and written["lidar"] > 1
    assert json.loads((tmp_path / "penalty=so_2e-6,seed=0" / "config.json").read_text())["penalty"]["name"] == "so"


def test_penalties_are_swept_for_a_joint_method():
    assert penalties("over=penalty,base=joint,method=byol,debug") == [("none", 0.0), ("so", 1e-6), ("srip", 1e-4)]


@pytest.mark.slow
def test_penalties_of_a_joint_method_are_run(tmp_path):
    c = sweep_config.get_config("over=penalty,base=joint,method=simclr,debug")
    c.steps, c.data.source, c.data.image_size, c.log.report, c.log.tensorboard = 2, "digits", (8, 8), False, False
    header, *rows = table_rows(sweep.run(c, str(tmp_path))["table"])
    assert [row[0] for row in rows] == ["none", "so:1e-6", "srip:1e-4"] and "LiDAR" in header


def test_a_method_that_reads_its_images_is_checked_with_them(monkeypatch):
    """The memory of deepclusterv2 has a row for each image. The images are opened once for all runs."""
    opened, real = [], sweep.train.training_images
    monkeypatch.setattr(sweep.train, "training_images", lambda c: opened.append(c) or real(c))
    config = sweep_config.get_config("over=penalty,base=joint,method=deepclusterv2,debug")
    sources = {}
    for setting in sweep.expand(config):
        sweep._check_parts(setting.config, sources)
    assert len(opened) == 1
    config.deepclusterv2.prototypes = (100, 10**6)
    with pytest.raises(ConfigError, match="number of training images"):
        sweep._check_parts(sweep.expand(config)[0].config, sources)


def test_the_config_string_goes_to_the_base():
    c = sweep_config.get_config("over=lam,base=crate_mae,variant=S,seeds=3")
    assert (c.job, c.encoder.width, c.sweep.seeds) == ("sweep", 576, 3) and c.sweep["values"] == (0.1, 0.5, 5.0)
    assert sweep_config.get_config("over=rop_ratio").corruption.name == "rop"  # what it is about goes without saying
    srip = sweep_config.get_config("over=penalty,penalty=srip,base=vit_mae")
    assert srip.sweep["values"] == (0.0, 1e-5, 1e-4, 1e-3)
    with pytest.raises(
        ConfigError, match="unknown key 'variant'.*in base=cifar10; the sweep itself knows over, base, seeds"
    ):
        sweep_config.get_config("variant=S")
    with pytest.raises(ConfigError, match="over=colour is not one of mask_ratio, lam, rop_ratio, penalty, gamma"):
        sweep_config.get_config("over=colour")


def made_up(value, seed=0, **numbers):
    scores = {"loss": 1.0, "steps": 4, "probe_top1": 0.5, "knn_top1": 0.4, "probe_top1_pixels": 0.3, **numbers}
    return {"value": value, "seed": seed, "folder": f"x={value},seed={seed}", "status": "done", **scores}


def axis_of(values, **numbers):
    records = [made_up(v, **numbers) for v in values]
    return sweep_table.figure(tiny(sweep__key="x"), records).axes


def test_only_a_clear_difference_is_bold_and_one_seed_has_no_deviation():
    records = [made_up(1, 0, probe_top1=0.9), made_up(1, 1, probe_top1=0.1), made_up(2, 0, probe_top1=0.6)]
    text = sweep_table.table("x", records, 4, "command")
    header, one, two = table_rows(text)
    at = header.index("probe %")
    assert one[at] == "50.0 ± 56.6 [-458.2, 558.2]" and two[at] == "60.0"
    assert "Two seeds or more for each value would tell" in text
    scores = {1: (0.5, 0.52, 0.49), 2: (0.552, 0.571, 0.54), 3: (0.49, 0.515, 0.5)}
    records = [made_up(v, seed, probe_top1=x) for v, xs in scores.items() for seed, x in enumerate(xs)]
    text = sweep_table.table("x", records, 9, "command")
    _, *rows = table_rows(text)
    assert [row[at] for row in rows[:3]] == [
        "50.3 ± 1.5 [46.5, 54.1]", "**55.4 ± 1.6 [51.6, 59.3]**", "50.2 ± 1.3 [47.0, 53.3]"
    ]  # fmt: skip
    assert rows[3:] == [
        ["x", "seeds", "probe %", "k-NN %"],
        ["2", "3", "+5.1 [+4.9, +5.3], p = 0.00026", "+0.0 for each seed, not tested"],
        ["3", "3", "-0.2 [-2.8, +2.4], within the noise, p = 0.81", "+0.0 for each seed, not tested"],
    ]


@pytest.mark.parametrize(
    ("values", "scale"),
    [((0.25, 0.5, 0.9), "linear"), ((0.1, 0.5, 5.0), "log"), ((0.0, 1e-7, 1e-5), "symlog"), (("a", "b"), "linear")],
)
def test_the_axis_fits_the_values(values, scale):
    axes = axis_of(values)
    assert [ax.get_title() for ax in axes] == ["linear probe", "k-NN"]
    assert axes[0].get_xscale() == scale
    assert [t.get_text() for t in axes[0].get_xticklabels()] == [sweep_table.label(v) for v in values]
    assert axes[0].get_xlabel() == ("x" if scale == "linear" else "x (log scale)")


def test_images_without_labels_get_a_table_and_a_figure_of_the_loss():
    numbers = dict.fromkeys(("probe_top1", "knn_top1", "probe_top1_pixels"))
    records = [made_up(v, **numbers) for v in (1, 2)]
    assert table_rows(sweep_table.table("x", records, 2, ""))[0] == ["x", "seeds", "loss"]
    (ax,) = sweep_table.figure(tiny(sweep__key="x"), records).axes
    assert ax.get_ylabel() == "training loss"


def test_names_in_the_table_are_no_markup_and_no_codes_of_a_terminal():
    """A swept folder, a failed run's name and error may be a stranger's; the table is also printed."""
    odd = "folder:a|b\x1b[31m\n**c**`<img src=x>"
    records = [
        {"value": odd, "seed": 0, "folder": "one", "status": "done", "loss": 0.9},
        {"value": "b", "seed": 0, "folder": f"two {odd}", "status": "failed", "error": f"bad {odd}"},
    ]
    text = sweep_table.table("data.source", records, 2, f"python {odd}")
    assert text.replace("\n", "").isprintable()
    first, second = [re.split(r"(?<!\\) *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    assert len(first) == len(second) == 3
    assert first[0] == r"folder:a\|b\\x1b\[31m\\n\*\*c\*\*\`\<img src=x>"
    lines = text.splitlines()
    assert [line for line in lines if "failed: " in line] == [
        "* `two folder:a|b\\x1b[31m\\n**c**'<img src=x>` failed: bad " + first[0]
    ]
    (row,) = [row for row in csv.DictReader(io.StringIO(sweep_table._csv(records))) if row["folder"] == "one"]
    assert row["value"] == "folder:a|b\\x1b[31m\\n**c**`<img src=x>"
