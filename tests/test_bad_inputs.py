"""Every row of bad_inputs.toml gets its line, loses nothing, and stands in docs/bad_inputs.md."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import bad_inputs
from tests.bad_inputs import MODULES, Row
from tests.conftest import ROOT

pytestmark = pytest.mark.one_python

ROWS = bad_inputs.rows()
LONG = [row for row in ROWS if row.slow or row.needs_run]  # a run takes half a minute to make
QUICK = [row for row in ROWS if row not in LONG]
RUN = "main QUICK --config.steps=2 --config.log.report=False --config.log.pictures=0 --workdir=RUN"
OURS = (".lock", "metrics.jsonl")  # what a run may add to before it finds something wrong


def prepare(row: Row, folder: Path, run: Path | None) -> None:
    """Fills DIR."""
    folder.mkdir()
    if run is not None and row.needs_run:
        shutil.copytree(run, folder / "run")
    if row.make:
        bad_inputs.MAKERS[row.make](folder)


def forked(rows: list[Row], folders: list[Path], process: subprocess.Popen[str]) -> list[dict]:
    """What the process of tests.forked says of each row."""
    assert process.stdin is not None and process.stdout is not None
    commands = []
    for row, folder in zip(rows, folders, strict=True):
        words = shlex.split(row.expanded(folder), comments=True)
        start = next(i for i, word in enumerate(words) if word in MODULES)
        set_here = dict(word.split("=", 1) for word in words[:start])
        commands.append({"argv": [MODULES[words[start]], *words[start + 1 :]], "env": set_here})
    results = []
    for command in commands:
        process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()
        results.append(json.loads(process.stdout.readline()))
    return results


def alone(row: Row, folder: Path, env: Mapping[str, str]) -> dict:
    """The same of a row with a process of its own, started by a shell; its status is main's, not that of a pipe."""
    command = row.expanded(folder)
    for name, module in MODULES.items():
        command = re.sub(rf"\b{name} ", f"{shlex.quote(sys.executable)} -m {module} ", command, count=1)
    done = subprocess.run(
        ["bash", "-c", command + "\nexit ${PIPESTATUS[0]}"], cwd=ROOT, env=dict(env), capture_output=True, timeout=300
    )
    out, err = (text.decode("utf-8", "backslashreplace") for text in (done.stdout, done.stderr))
    return {"status": done.returncode, "stdout": out, "stderr": err}


def contents(folder: Path) -> dict[str, str]:
    """A digest of every regular file below a folder, and the target of every link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = str(path.readlink())
        elif path.is_file() and path.name not in OURS:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def printed(row: Row, result: dict, folder: Path) -> str:
    """The row's line; there must be just one, no traceback, and the status that belongs to it."""
    err = bad_inputs.shown(result["stderr"], folder)
    assert "Traceback" not in err, err[-3000:]
    lines = err.splitlines()
    if row.tolerated:
        assert result["status"] == 0, err[-3000:]
        texts = [line.partition(" W ")[2] or line for line in [*lines, *result["stdout"].splitlines()]]
        return next((text for text in texts if row.matches(text)), "\n".join(texts[-20:]))
    assert result["status"] == 2, f"status {result['status']}\n{err[-3000:]}"
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, err[-3000:]
    return errors[0]


class Results:
    """Runs rows, all those of one process at once, and keeps what came out."""

    def __init__(self, root: Path, env: Mapping[str, str], rows: list[Row]) -> None:
        self.folders = {row: root / str(i) for i, row in enumerate(rows)}
        self.env = env
        command, pipes = [sys.executable, "-m", "tests.forked"], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, cwd=ROOT, env=dict(env), text=True, **pipes) as process:
            self._run(root, rows, process)

    def _run(self, root: Path, rows: list[Row], process: subprocess.Popen[str]) -> None:
        run = None
        if any(row.needs_run for row in rows):
            made = Row("", "", RUN)
            (root / "made").mkdir()
            (result,) = forked([made], [root / "made"], process)
            assert result["status"] == 0, result["stderr"][-3000:]
            run = root / "made" / "run"
        for row, folder in self.folders.items():
            prepare(row, folder, run)
        self.before = {row: contents(folder) for row, folder in self.folders.items()}
        together = [row for row in rows if not row.alone]
        results = forked(together, [self.folders[row] for row in together], process)
        self.results = dict(zip(together, results, strict=True))

    def check(self, row: Row) -> None:
        """Fails if the row's line is another, or something that was there is not any more."""
        folder = self.folders[row]
        result = self.results[row] if row in self.results else alone(row, folder, self.env)
        line = printed(row, result, folder)
        assert row.matches(line), f"\nprinted:  {line}\nexpected: {row.line}"
        after = contents(folder)
        assert {path: after.get(path) for path in self.before[row]} == self.before[row]


def one_device(env: Mapping[str, str]) -> dict[str, str]:
    """Of a single device: what is printed does not depend on the machine's cores."""
    return {**env, "JAX_NUM_CPU_DEVICES": "1"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory, cli_env):
    return Results(tmp_path_factory.mktemp("quick"), one_device(cli_env), QUICK)


@pytest.fixture(scope="module")
def slow(tmp_path_factory, cli_env):
    return Results(tmp_path_factory.mktemp("slow"), one_device(cli_env), LONG)


def named(rows: list[Row]) -> list:
    return [pytest.param(row, id=f"{row.group}: {row.what}") for row in rows]


@pytest.mark.parametrize("row", named(QUICK))
def test_a_bad_input_gets_its_line(row, quick):
    quick.check(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", named(LONG))
def test_a_bad_input_that_takes_long_gets_its_line(row, slow):
    slow.check(row)


def test_the_page_is_the_table():
    assert (ROOT / "docs" / "bad_inputs.md").read_text() == bad_inputs.page(), (
        "out of date: python -m tests.bad_inputs > docs/bad_inputs.md"
    )


def test_the_table_is_large_and_every_line_is_said_once():
    assert len(ROWS) >= 80
    assert all(row.line for row in ROWS)
    used = {row.make for row in ROWS if row.make}
    assert used == set(bad_inputs.MAKERS), used ^ set(bad_inputs.MAKERS)
    assert len({(row.group, row.what) for row in ROWS}) == len(ROWS)
