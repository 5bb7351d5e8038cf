"""The command line in real processes: runs, resumes, stops, is killed, and complains in one line."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from absl import logging as absl_logging
from PIL import Image

from crate_jax import main
from tests.conftest import ROOT

pytestmark = pytest.mark.one_python

QUICK = "--config=configs/quickstart.py:debug"
# One block and the digits' size of images in all runs here: what the first compiles, the others find in the cache.
SMALL = [
    QUICK, "--config.batch_size=16", "--config.encoder.width=16", "--config.encoder.depth=1",
    "--config.encoder.heads=2", "--config.decoder.depth=1", "--config.decoder.heads=2",
    "--config.log.tensorboard=False",
]  # fmt: skip
TWELVE = [*SMALL, "--config.steps=12", "--config.log.pictures_every=6", "--config.save.every=6"]
SUMMARY = {
    "steps", "loss", "images_per_sec", "knn_top1", "probe_top1", "probe_top1_untrained", "params_sha256", "pictures",
}  # fmt: skip


def summary(workdir: Path) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def one_line_error(result: subprocess.CompletedProcess) -> str:
    """The error line of a failed command; there must be exactly one and no traceback."""
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr[-2000:]
    return errors[0]


def test_the_log_escapes_what_a_terminal_would_obey():
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s\nsecond line", ("\x1b[2J\r\udcff",), None)
    assert main.PrintableFormatter("%(message)s").format(record) == "\\x1b[2J\\r\\udcff\nsecond line"


def test_a_machine_without_tpus_is_no_news():
    """JAX tells it on every start, and later ones that there is no proxy; what keeps a TPU from working is shown."""
    start = "Unable to initialize backend 'tpu': "
    told = [
        start + "INTERNAL: Failed to open libtpu.so: libtpu.so: cannot open",
        "Unable to initialize backend 'proxy': The 'proxy' backend requires the address of an IFRT Proxy server.",
        start + "in use by process 7",
        "cuda",
    ]
    records = [logging.LogRecord("x", logging.INFO, "", 0, text, (), None) for text in told]
    verbosity = absl_logging.get_verbosity()
    main.set_up_log(process=0)
    absl_logging.set_verbosity(verbosity)
    shown = logging.getLogger("jax._src.xla_bridge").filter
    assert [bool(shown(record)) for record in records] == [False, False, True, True]


@pytest.fixture(scope="module")
def finished(run_cli, tmp_path_factory):
    """A finished run of twelve steps; tests copy it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    result = run_cli([*TWELVE, f"--workdir={workdir}"])
    assert result.returncode == 0, result.stderr[-2000:]
    return workdir, result


def test_a_run_leaves_what_it_should(finished):
    workdir, result = finished
    written = summary(workdir)
    assert written.keys() >= SUMMARY
    assert written["steps"] == 12
    assert all(np.isfinite(written[k]) for k in ("loss", "images_per_sec", "knn_top1", "probe_top1_untrained"))
    config = json.loads((workdir / "config.json").read_text())
    assert config["steps"] == 12 and config["encoder"]["name"] == "crate"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    for name in ("reconstruction_0000006.png", "reconstruction_0000012.png"):
        pixels = np.asarray(Image.open(workdir / "pictures" / name))
        assert pixels.std() > 10
    assert "of them the encoder's" in result.stderr and "under weight decay" not in result.stderr
    assert "trained encoder" in result.stdout and "raw pixels" in result.stdout
    assert written["pictures"] in result.stdout


def test_running_again_changes_nothing(finished, run_cli, tmp_path):
    """Scores are computed again where the pictures of a summary are gone; then the command only prints them."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    moved = summary(workdir) | {"pictures": str(tmp_path / "gone")}
    (workdir / "summary.json").write_text(json.dumps(moved))
    command = [*TWELVE, f"--workdir={workdir}"]
    results = [run_cli(command)]
    before, after = summary(finished[0]), summary(workdir)
    for key in SUMMARY - {"pictures"}:
        assert before[key] == after[key], key

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != ".lock"}

    left = files()
    results.append(run_cli(command))
    assert [r.returncode for r in results] == [0, 0], [r.stderr[-2000:] for r in results]
    assert ["finished before" in r.stderr for r in results] == [False, True]
    assert results[0].stdout == results[1].stdout and "trained encoder" in results[1].stdout
    assert files() == left and len(left) > 20


@pytest.mark.slow
def test_a_run_without_stdout_and_stderr_ends_with_0(cli_env, tmp_path):
    """As after `>&- 2>&-`: the streams' numbers must not go to the next files, into which libraries would write."""
    workdir = tmp_path / "run"
    script = f"exec {sys.executable} -m crate_jax.main {QUICK} --config.steps=2 >&- 2>&-"
    result = subprocess.run(["sh", "-c", f"{script} --workdir={workdir}"], cwd=ROOT, env=cli_env, timeout=200)
    assert result.returncode == 0
    assert summary(workdir)["steps"] == 2


@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT)),
    ],
)
def test_a_signal_saves_and_the_same_command_continues(signum, run_cli, cli_env, tmp_path):
    """Exit status 128 + signal, one line, the step saved; the run is long, so it cannot end by itself.

    Until then a second process on the workdir is refused, and the first goes on.
    """
    workdir = tmp_path / "run"
    flags = [*SMALL, "--config.steps=100000", "--config.save.every=100000", f"--workdir={workdir}"]
    command = [sys.executable, "-m", "crate_jax.main", *flags]
    process = subprocess.Popen(command, cwd=ROOT, env=cli_env, stderr=subprocess.PIPE, text=True)
    try:
        metrics = workdir / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
            time.sleep(0.05)
        refused = run_cli(flags)
        assert process.poll() is None
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()  # a run that ignored the signal would go on after the tests
    assert f"in use by process {process.pid}" in one_line_error(refused)
    assert process.returncode == 128 + signum, stderr[-2000:]
    last = stderr.strip().splitlines()[-1]
    assert "the same command continues it" in last and "Traceback" not in stderr
    step = int(last.split("at step ")[1].split(",")[0])
    assert (workdir / "checkpoints" / str(step)).is_dir()


def test_a_signal_before_the_first_step_is_one_line(cli_env, tmp_path):
    # So many steps that on a busy machine, too, the signal comes before the last.
    flags = [*SMALL, "--config.steps=100000", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "crate_jax.main", *flags]
    process = subprocess.Popen(command, cwd=ROOT, env=cli_env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / ".lock").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=200)
    finally:
        process.kill()  # a run that ignored the signal would go on after the tests
    assert process.returncode == 128 + signal.SIGINT, stderr[-2000:]
    assert "SIGINT" in stderr.splitlines()[-1] and "Traceback" not in stderr


def test_a_changed_config_that_does_not_fit_is_named_key_by_key(finished, run_cli, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    line = one_line_error(run_cli([*SMALL, "--config.steps=20", "--config.encoder.width=8", f"--workdir={workdir}"]))
    assert "encoder.width" in line and "checkpoint (1, 16, 16), config (1, 8, 8)" in line


def test_a_run_that_is_further_than_asked_for_is_named(finished, run_cli, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    line = one_line_error(run_cli([*SMALL, "--config.steps=6", f"--workdir={workdir}"]))
    assert "6 steps" in line and "already at step 12" in line
    assert summary(workdir)["steps"] == 12


@pytest.mark.slow
def test_init_from_takes_the_encoder_of_another_run(finished, run_cli, tmp_path):
    """Another corruption may continue from it; another width may not."""
    start = [*SMALL, f"--config.init_from={finished[0]}", "--config.corruption.name=rop"]
    result = run_cli([*start, "--config.steps=2", "--config.log.parameters", f"--workdir={tmp_path / 'a'}"])
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(r"\nencoder/.* decay", result.stderr) and ", under weight decay " in result.stderr
    assert "encoder taken from step 12" in result.stderr
    line = one_line_error(run_cli([*start, "--config.encoder.width=32", f"--workdir={tmp_path / 'b'}"]))
    assert "encoder/blocks" in line and "init_from" in line
    line = one_line_error(run_cli([*SMALL, f"--config.init_from={tmp_path / 'none'}", f"--workdir={tmp_path / 'c'}"]))
    assert "no such folder" in line


def test_weights_that_are_not_finite_are_not_saved(run_cli, tmp_path):
    """The loss of step 1 is finite, its update is not: a checkpoint of it could never be continued."""
    flags = ["--config.optimizer.lr=1e39", "--config.optimizer.warmup_steps=0", "--config.save.every=1"]
    line = one_line_error(run_cli([*SMALL, *flags, f"--workdir={tmp_path}"]))
    assert "not finite after step 1; no checkpoint was saved yet" in line
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


def make_folder(root: Path, count: int = 24) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, colour in (("red", 0), ("blue", 2)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (20, 30, 3), np.uint8)
                pixels[..., colour] += 120
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


@pytest.mark.slow
def test_a_folder_of_images_trains(run_cli, tmp_path):
    """Folder with labels: k-NN separates red from blue; a file that is no image is named and counted."""
    root = make_folder(tmp_path / "images")
    (root / "train" / "red" / "bro\x1bk\nen.jpg").write_bytes(b"not a JPEG")
    flags = [*SMALL, f"--config.data.source=folder:{root}", "--config.log.report=False"]
    result = run_cli([*flags, "--config.data.max_undecodable=0.2", "--config.steps=8", f"--workdir={tmp_path / 'run'}"])
    assert result.returncode == 0, result.stderr[-2000:]
    assert "skipping undecodable image train/red/bro\\x1bk\\nen.jpg" in result.stderr and "\x1b" not in result.stderr
    assert summary(tmp_path / "run")["knn_top1_pixels"] == 1.0


def test_images_without_labels_train_without_an_evaluation(run_cli, tmp_path):
    root = make_folder(tmp_path / "images", 8)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(root.rglob("*.jpg"))):
        shutil.copy(path, flat / f"{i}.jpg")
    flags = [*SMALL, f"--config.data.source=folder:{flat}", "--config.log.report=False"]
    result = run_cli([*flags, f"--workdir={tmp_path / 'run'}"])
    assert result.returncode == 0, result.stderr[-2000:]
    written = summary(tmp_path / "run")
    assert written["probe_top1"] is None and written["pictures"] and written["rankme"] > 1


def test_the_status_is_right_also_where_the_message_has_no_room(cli_env, tmp_path):
    """A log on the disk that is full."""
    command = [sys.executable, "-m", "crate_jax.main", QUICK, "--config.job=sleep", f"--workdir={tmp_path / 'w'}"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, cwd=ROOT, env=cli_env, stderr=full, timeout=300).returncode == 2
