"""Breaks the code on purpose, one place at a time, and demands that the test that should notice it does.

    python -m tests.mutate [NAME ...]

The table is mutations.toml. A row replaces one text, which must stand in its file once, by another, and names one test.
That test must pass before and fail after: by what it finds, not because it cannot be collected or set up, or because
the changed code cannot run. Everything happens in a copy of the checkout.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("mutations.toml")
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist", "*.egg-info")
CANNOT_RUN = ("ImportError", "ModuleNotFoundError", "NameError", "SyntaxError", "IndentationError")
FAILED = 1  # pytest's status where all tests were run, and some failed


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One row.

    Attributes:
      name: of the row.
      file: path below the checkout.
      old: what stands there, once.
      new: what is put in its place.
      test: that must notice, as pytest names it; of a parametrised test one variant, or all, one of which must.
    """

    name: str
    file: str
    old: str
    new: str
    test: str

    def applied(self, text: str) -> str:
        """The file's text with the row's change.

        Raises:
          ValueError: `old` does not stand there exactly once, or nothing would change.
        """
        if text.count(self.old) != 1 or self.old == self.new:
            raise ValueError(f"{self.name}: {self.old!r} stands {text.count(self.old)} times in {self.file}, not once")
        return text.replace(self.old, self.new)


def mutations() -> list[Mutation]:
    """The table."""
    rows = tomllib.loads(TABLE.read_text())
    return [Mutation(name, row["file"], row["from"], row["to"], row["test"]) for name, row in rows.items()]


def pytest(root: Path, tests: Iterable[str]) -> tuple[int, list[str], str]:
    """Runs tests of a copy of the checkout.

    Returns:
      pytest's exit status; for each test that did not pass, "failure: ..." or "error: ..." with its first line; the end
      of what pytest printed.
    """
    report = root / ".report.xml"
    report.unlink(missing_ok=True)
    # No byte code: a file that changes within a second, to the same size, would be taken for the one before.
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", f"--junitxml={report}", *tests]
    done = subprocess.run(
        command,
        cwd=root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
    )
    found = []
    if report.exists():
        for case in ElementTree.parse(report).iter("testcase"):
            for kind in ("failure", "error"):
                found += [f"{kind}: {x.get('message', '').partition(chr(10))[0]}" for x in case.findall(kind)]
    return done.returncode, found, done.stdout[-3000:]


def verdict(status: int, found: Sequence[str]) -> str:
    """What is wrong with the outcome of a mutated run; empty: the test noticed."""
    if status == 0:
        return "SURVIVED"
    noticed = [text for text in found if text.startswith("failure: ")]
    if status != FAILED or not noticed:
        return f"NO TEST FAILED (pytest's status {status}): {'; '.join(found)[:300]}"
    if any(text.removeprefix("failure: ").startswith(CANNOT_RUN) for text in noticed):
        return f"CANNOT RUN: {noticed[0][:300]}"
    return ""


def copy(folder: Path) -> Path:
    """A copy of the checkout that shares its compiled programs."""
    root = folder / "checkout"
    shutil.copytree(ROOT, root, ignore=LEFT_OUT)
    (ROOT / ".cache").mkdir(exist_ok=True)
    (root / ".cache").symlink_to(ROOT / ".cache")
    return root


def main(names: Sequence[str]) -> int:
    """Tries the rows named, or all; returns the exit status: 1 if one survives, 2 if none could be tried."""
    rows = mutations()
    unknown = set(names) - {row.name for row in rows}
    if unknown:
        print(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in rows)}")
        return 2
    rows = [row for row in rows if not names or row.name in names]
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        root = copy(Path(folder))
        status, _, text = pytest(root, sorted({row.test for row in rows}))
        if status:
            print(f"the tests do not pass before anything is changed:\n{text}")
            return 2
        survived = 0
        for row in rows:
            path = root / row.file
            original = path.read_text()
            path.write_text(row.applied(original))
            status, found, _ = pytest(root, [row.test])
            path.write_text(original)
            wrong = verdict(status, found)
            survived += bool(wrong)
            print(f"{wrong or 'noticed'}  {row.name}  {row.test}", flush=True)
    print(f"{len(rows) - survived} of {len(rows)} mutations were noticed")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
