"""docs/claims.md: each command is one that the library takes, and runs."""

from __future__ import annotations

import re
import shlex
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags
from PIL import Image

from crate_jax import config_files
from crate_jax.__main__ import CONFIG_NEEDED, JOBS
from crate_jax.config import validate
from crate_jax.jobs import sweep
from tests.conftest import ROOT

pytestmark = pytest.mark.one_python

PAGE = (ROOT / "docs/claims.md").read_text()
ROWS = dict(re.findall(r"^\| ([A-Z]-[A-Z0-9a-z]+) \|.*\| ([^|]*) \|$", PAGE, re.M))  # row -> verdict
BLOCKS = re.findall(r"^    # (.+)\n((?:    [^#].*\n)+)", PAGE, re.M)
COMMANDS = [(rows, line.strip()) for rows, lines in BLOCKS for line in lines.splitlines()]
OURS = [(rows, line) for rows, line in COMMANDS if line.startswith("crate-jax ")]


def config_of(argv: list[str], monkeypatch) -> ConfigDict:
    """The config that a command line gives, checked where that needs no checkpoint."""
    monkeypatch.setattr(sys, "argv", argv)  # which ml_collections reads
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    values(argv)
    if values.config.job == "pretrain":
        validate(values.config)
    if values.config.job == "sweep":
        sweep.expand(values.config)  # which checks each run
    return values.config


def argv(line: str) -> list[str]:
    """The arguments of `crate-jax JOB ...`, with the path of its config."""
    _, job, *rest = shlex.split(line)
    assert job in JOBS
    if not any(word.startswith("--config=") for word in rest):
        assert job not in CONFIG_NEEDED
        rest.insert(0, f"--config={job}")
    name, colon, words = next(w for w in rest if w.startswith("--config=")).removeprefix("--config=").partition(":")
    found = f"--config={config_files.find(name)}{colon}{words}"
    return ["crate-jax", *(found if w.startswith("--config=") else w for w in rest)]


def test_rows_and_commands_fit_together():
    assert len(ROWS) > 45 and len(OURS) > 25
    named = {row for rows, _ in BLOCKS for row in rows.split(", ")}
    assert named <= set(ROWS)
    assert [row for row, verdict in ROWS.items() if verdict.startswith("not run") and row not in named] == [
        "O-DET"  # which its row explains
    ]  # fmt: skip
    assert not [row for row, verdict in ROWS.items() if verdict == "no command" and row in named]


@pytest.mark.parametrize(("rows", "line"), OURS, ids=[f"{rows}: {line[10:40]}" for rows, line in OURS])
def test_a_command_is_one_that_the_library_takes(rows, line, monkeypatch, tmp_path):
    config = config_of(argv(line), monkeypatch)
    job = line.split()[1]
    assert config.job == job
    small = tiny(line, tmp_path, tmp_path)
    assert job == "sweep" or "config.sweep" not in " ".join(small)
    config_of(["crate-jax", *small], monkeypatch)


@pytest.fixture(scope="module")
def places(tmp_path_factory, run_cli):
    """What stands for the capitals of the commands: a folder of images of two classes, one of pairs, and two runs."""
    folder = tmp_path_factory.mktemp("claims")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 12)):
        for label in ("a", "b"):
            (folder / "images" / split / label).mkdir(parents=True)
            for i in range(count):
                x = rng.integers(0, 255, (32, 32, 3), np.uint8)
                Image.fromarray(x).save(folder / "images" / split / label / f"{i}.png")
        for kind, top in (("images", 255), ("masks", 2)):
            (folder / "pairs" / split / kind).mkdir(parents=True)
            for i in range(count):
                x = rng.integers(0, top, (32, 32, 3) if kind == "images" else (32, 32), np.uint8)
                Image.fromarray(x).save(folder / "pairs" / split / kind / f"{i}.png")
    for encoder in ("crate", "vit"):
        words = [f"--config=configs/cifar10.py:encoder={encoder},corruption=mask,debug", "--config.save.every=1"]
        source = f"--config.data.source=folder:{folder / 'images'}"
        run_cli([*words, "--config.save.keep=9", source, f"--workdir={folder / encoder}"])
    return folder


# Two values of each `over=` of a sweep.
RATIOS, PENALTIES = "0.25,0.5", "'none','srip:1e-4'"
TWO = {
    "mask_ratio": RATIOS, "rop_ratio": RATIOS, "lam": "0.1,5.0", "guide": "0.0,0.1", "penalty": PENALTIES,
    "gamma": PENALTIES,
}  # fmt: skip


def tiny(line: str, places, workdir) -> list[str]:
    """The arguments of the same command, on a few images and for a few steps."""
    line = re.sub(r"--workdir=\w+", f"--workdir={workdir}", line)
    line = line.replace(",RUN_SRIP", "")  # there are two runs
    for name in ("CRATE_RUN", "VIT_RUN", "RUN_NONE", "RUN_SO", "RUN"):
        line = re.sub(rf"(?<=[=,']){name}\b", str(places / ("vit" if name in ("VIT_RUN", "RUN_SO") else "crate")), line)
    line = re.sub(r"folder:(IN|DIR)\b|(?<=@)(cifar10|imagenet)\b", f"folder:{places / 'images'}", line)
    line = re.sub(r",\w+@(?!folder)\w+", "", line)  # one task stands for all
    line = line.replace("folder:PAIRS", f"folder:{places / 'pairs'}")
    if line.split()[1] == "sweep" and ("finetune_" in line or "segment_" in line):
        line += " --config.sweep.judge_steps=2"
    if "task=" in line:
        line = re.sub(r",task=\w+", "", line) + f" --config.data.source=folder:{places / 'images'}"
    if "report" not in line:
        line = re.sub(r"(--config=\w+)(:?)", lambda m: f"{m[1]}:debug{',' if m[2] else ''}", line, count=1)
        line = line.replace("base=crate_mae", "base=cifar10").replace("base=rop_vitb", "base=cifar10")
    if "over=transfer" in line and "sweep.judge" not in line:
        line += f" --config.sweep.judge=finetune_crate@folder:{places / 'images'} --config.sweep.judge_steps=2"
    if "sweep" in line:
        line = line.replace("seeds=3", "seeds=1")
        if "key=epochs" in line:
            line = re.sub("values=[0-9,]+", "values=0.1,0.2 --config.steps=0", line)
        over = line.partition("over=")[2].partition(",")[0]
        if over in TWO and "sweep.values" not in line:
            line += f' --config.sweep.values="{TWO[over]}"'
    line = re.sub(" --config.epochs=[1-9][0-9]*", "", line)  # `debug` counts steps
    line = re.sub(r"(--config\.(optimizer\.warmup_)?steps)=[1-9][0-9]*", r"\1=2", line)
    return argv(line)[1:]


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "line"), OURS, ids=[f"{rows}: {line[10:40]}" for rows, line in OURS])
def test_a_command_runs(rows, line, places, run_cli, tmp_path):
    done = run_cli([f"--job={line.split()[1]}", *tiny(line, places, tmp_path / "w")])
    assert done.returncode == 0, done.stderr[-2000:]
