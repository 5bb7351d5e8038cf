"""docs/adding_a_part.md, followed literally: a method in one file and one row trains, resumes and is judged."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "adding_a_part.md"
pytestmark = pytest.mark.one_python


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the package and the configs with what the page says to add."""
    page = PAGE.read_text()
    code, row = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    file = re.search(r"one file, `(crate_jax/methods/(\w+)\.py)`", page)
    assert file is not None
    folder = tmp_path_factory.mktemp("checkout")
    for part in ("crate_jax", "configs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / file[1]).write_text(code)
    table = folder / "crate_jax" / "methods" / "__init__.py"
    text = table.read_text()
    new = text.replace("from crate_jax.methods import (\n", f"from crate_jax.methods import (\n    {file[2]},\n", 1)
    head, rows = new.split("METHODS: dict[str, Row] = {\n")
    table.write_text(f"{head}METHODS: dict[str, Row] = {{\n{row}{rows}")
    return folder


def command_line(checkout: Path, env: dict, *args: str) -> str:
    command = [sys.executable, "-m", "crate_jax.main", "--config=configs/quickstart.py:debug", *args]
    env = env | {"JAX_NUM_CPU_DEVICES": "2"}
    result = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def test_the_page_has_a_method_that_trains_resumes_and_is_judged(checkout, cli_env, tmp_path):
    """Under a penalty, on two devices. The run that continues from step 4 ends with the same bits, its target too."""
    words = re.search(r"--config=configs/quickstart.py (--config\.method=\w+)", PAGE.read_text())
    assert words is not None
    args = (
        words[1], "--config.penalty.name=so", "--config.penalty.weight=1e-4", "--config.steps=7",
        "--config.save.every=4", "--config.whitebox.every=4",
    )  # fmt: skip
    command_line(checkout, cli_env, *args, f"--workdir={tmp_path / 'whole'}")
    whole = json.loads((tmp_path / "whole" / "summary.json").read_text())
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "7")
    (tmp_path / "broken" / "summary.json").unlink()
    quiet = ("--config.whitebox.every=0", "--config.log.report=False")
    out = command_line(checkout, cli_env, *args, *quiet, f"--workdir={tmp_path / 'broken'}")
    assert "continuing from step 4" in out
    broken = json.loads((tmp_path / "broken" / "summary.json").read_text())
    assert (broken["steps"], broken["params_sha256"]) == (7, whole["params_sha256"])
    one, two = (meta(tmp_path / name) for name in ("whole", "broken"))
    assert "carried/online/kernel" in one["arrays"]["rest"]
    assert one["arrays"] == two["arrays"]  # shapes and checksums of all that is saved

    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "uniformity" in line]
    assert logged and all(line["z_std"] > 0 and line["penalty"] > 0 and line["uniform"] < 0 for line in logged)
    assert any(name.startswith("whitebox/encoder/") for line in lines for name in line)
    assert 0 < whole["knn_top1"] <= 1 and whole["report"]


def test_micro_batches_are_refused(checkout, cli_env, tmp_path):
    """The page's method couples the images of a batch."""
    command = [sys.executable, "-m", "crate_jax.main", "--config=configs/quickstart.py:debug"]
    command += ["--config.method=uniformity", "--config.accumulate=2", f"--workdir={tmp_path / 'run'}"]
    result = subprocess.run(command, cwd=checkout, env=cli_env, capture_output=True, text=True, timeout=400)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(errors) == 1
    assert "config.accumulate=2: must be 1" in errors[0] and "'uniformity'" in errors[0]


def meta(workdir: Path) -> dict:
    return json.loads((workdir / "checkpoints" / "7" / "meta" / "metadata").read_text())["body"]
