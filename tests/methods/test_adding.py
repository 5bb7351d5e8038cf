"""docs/adding_a_part.md, followed literally: a method in one file and one row trains, resumes and is judged."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "adding_a_part.md"
pytestmark = pytest.mark.one_python


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the package and the configs with what the page says to add."""
    page = PAGE.read_text()
    section = page.partition("\n## A joint-embedding method\n")[2].partition("\n## ")[0]
    code, row = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
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


@pytest.fixture(scope="module")
def command_line(checkout, cli_env) -> Iterator[Callable[..., dict]]:
    """Runs a command of the copy on two devices, in a fork of one process that has imported the copy."""
    shutil.copytree(
        ROOT / "tests", checkout / "tests", ignore=lambda _, names: set(names) - {"__init__.py", "forked.py"}
    )
    env, pipes = cli_env | {"JAX_NUM_CPU_DEVICES": "2"}, {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-m", "tests.forked"]
    with subprocess.Popen(command, cwd=checkout, env=env, text=True, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None

        def run(*args: str) -> dict:
            argv = ["crate_jax.main", "--config=configs/quickstart.py:debug", *args]
            process.stdin.write(json.dumps({"argv": argv, "env": {}}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.mark.slow
def test_the_page_has_a_method_that_trains_resumes_and_is_judged(command_line, tmp_path):
    """Under a penalty, on two devices. The run that continues from step 4 ends with the same bits, its target too."""
    words = re.search(r"--config=configs/quickstart.py (--config\.method=\w+)", PAGE.read_text())
    assert words is not None
    args = (
        words[1], "--config.penalty.name=so", "--config.penalty.weight=1e-4", "--config.steps=7",
        "--config.save.every=4", "--config.batch_size=16", "--config.encoder.width=16", "--config.encoder.depth=1",
        "--config.encoder.heads=2", "--config.log.pictures=0", "--config.log.tensorboard=False",
        "--config.log.report=False",
    )  # fmt: skip
    result = command_line(*args, f"--workdir={tmp_path / 'whole'}")
    assert result["status"] == 0, result["stderr"][-3000:]
    whole = json.loads((tmp_path / "whole" / "summary.json").read_text())
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "7")
    (tmp_path / "broken" / "summary.json").unlink()
    result = command_line(*args, f"--workdir={tmp_path / 'broken'}")
    assert result["status"] == 0, result["stderr"][-3000:]
    assert "continuing from step 4" in result["stderr"]
    broken = json.loads((tmp_path / "broken" / "summary.json").read_text())
    assert (broken["steps"], broken["params_sha256"]) == (7, whole["params_sha256"])
    one, two = (meta(tmp_path / name) for name in ("whole", "broken"))
    assert "carried/online/kernel" in one["arrays"]["rest"]
    assert one["arrays"] == two["arrays"]  # shapes and checksums of all that is saved

    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "uniformity" in line]
    assert logged and all(line["z_std"] > 0 and line["penalty"] > 0 and line["uniform"] < 0 for line in logged)
    assert 0 < whole["knn_top1"] <= 1


def test_micro_batches_are_refused(command_line, tmp_path):
    """The page's method couples the images of a batch."""
    args = ("--config.method=uniformity", "--config.accumulate=2", f"--workdir={tmp_path / 'run'}")
    result = command_line(*args)
    errors = [line for line in result["stderr"].splitlines() if line.startswith("error:")]
    assert result["status"] == 2 and len(errors) == 1
    assert "config.accumulate=2: must be 1" in errors[0] and "'uniformity'" in errors[0]


def meta(workdir: Path) -> dict:
    return json.loads((workdir / "checkpoints" / "7" / "meta" / "metadata").read_text())["body"]
