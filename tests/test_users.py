"""Three users follow the documents: each command and line of Python is read out of the pages, made small, and run.

A student with a folder of photos, an engineer with the wheel in an empty folder, a researcher with a bucket and two
processes. A command that a page gets later is run without a change here, unless it needs a stand-in of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import crate_jax
from crate_jax.workdir import bucket
from tests.conftest import ROOT, of_the_server

pytestmark = pytest.mark.slow

# A command in a block or in a table; not `crate-jax JOB`, which is a form.
SETTINGS = r"(?:[A-Z_\d]+=(?:'[^']*'|\S+) +(?:\\\n +)?)*"
WORDS = rf"{SETTINGS}(?:crate-jax configs|crate-jax \w+ \S|python -m crate_jax|launch/\w+\.sh |for i in )"
IN_BLOCK = re.compile(rf"^    (?:make quickstart +# or: )?(?:pip install \. && )?({WORDS}(?:.*\\\n)*.*)", re.M)
IN_TABLE = re.compile(rf"^\|.*?`({WORDS}[^`]*)`", re.M)
PYTHON = re.compile(r"^    import crate_jax\n(?:    .+\n)+", re.M)


def commands(page: str, **stand_ins: str) -> list[str]:
    """The commands of a page in order, each in one line and without its comment.

    Each text of `stand_ins` is replaced by its value; one that stands in no command is a mistake here.
    """
    text = (ROOT / page).read_text()
    found = sorted((m.start(), m[1]) for pattern in (IN_BLOCK, IN_TABLE) for m in pattern.finditer(text))
    lines = [" ".join(command.replace("\\\n", " ").split("  #")[0].split()) for _, command in found]
    assert lines, page
    for old, new in stand_ins.items():
        assert any(old in line for line in lines), f"{page}: no command has {old!r}: {lines}"
        lines = [line.replace(old, new) for line in lines]
    return lines


class Shell:
    """Runs lines of bash in a folder, with `python` and `crate-jax` in the path."""

    def __init__(self, folder: Path, programs: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.env = env | {"PATH": f"{programs}:{env['PATH']}", "XDG_CACHE_HOME": str(programs / "cache")}

    @contextlib.contextmanager
    def start(self, line: str) -> Iterator[subprocess.Popen[str]]:
        """Starts a line; what it prints comes in one stream. At the end of the context no process of it is left."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        words = ["bash", "-c", line]
        with subprocess.Popen(
            words, cwd=self.folder, env=self.env, text=True, start_new_session=True, **pipes
        ) as process:
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def __call__(self, line: str, *expected: str) -> None:
        """Runs a line to its end; it succeeds, and prints what is expected."""
        with self.start(line) as process:
            said = process.communicate(timeout=600)[0]
        assert process.returncode == 0 and "Traceback" not in said, f"{line}\n{said[-3000:]}"
        assert all(text in said for text in expected), f"{line}\n{said[-3000:]}"

    def python(self, page: str) -> None:
        """Runs the block of Python that begins with `import crate_jax`."""
        (block,) = PYTHON.findall((ROOT / page).read_text())
        lines = re.sub("^    ", "", block, flags=re.M) + "assert len(features) == 7, features.shape"
        self(f"python -c {shlex.quote(lines)}")


@pytest.fixture(scope="module")
def checkout(cli_env, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder of this checkout's `python` and `crate-jax`, and their environment."""
    programs = tmp_path_factory.mktemp("bin")
    for name, words in (("python", ""), ("crate-jax", "-m crate_jax ")):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words}"$@"\n')
        (programs / name).chmod(0o755)
    return programs, cli_env | {"PYTHONPATH": str(ROOT)}


def draw(folder: Path, names: list[str]) -> None:
    """Photos of several sizes: dark ones and bright ones."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        low, high = (0, 130) if "night" in name else (120, 256)
        Image.fromarray(rng.integers(low, high, (*rng.integers(40, 90, 2), 3), np.uint8)).save(folder / name)


OWN = [f"DIR/{split}/{name}/{i}.jpg" for split in ("train", "test") for name in ("day", "night") for i in range(24)]
HOLIDAY = [f"photos/{i}.jpg" for i in range(7)]


def test_the_student_with_a_folder_of_photos(checkout, tmp_path):
    draw(tmp_path, OWN + HOLIDAY)
    shell = Shell(tmp_path, *checkout)
    tiny = {"corruption=rop ": "corruption=rop,debug "}
    own = {"size=64,minutes=10": "size=32,minutes=0.02"}
    for line in commands("README.md", **own, **{"method=vibcreg ": "method=vibcreg,debug "}):
        shell(line, "top-1")
    shell.python("README.md")
    line, other = commands("docs/photos.md", **own)
    shell(other, "top-1", "report.html")
    shell(line, "top-1", "report.html")
    summary = next(tmp_path.glob("runs/photos/summary.json"))
    before = summary.stat().st_mtime_ns
    shell(line, "top-1")
    assert summary.stat().st_mtime_ns == before  # the finished run is shown, not judged again
    tiny |= {"quickstart ": "quickstart:debug ", "data=cifar10 ": "data=cifar10,debug "}
    for line in commands("docs/tour.md", **tiny, **{"method=vibcreg ": "method=vibcreg,debug "}):
        shell(line)
    for name, run in (("a", "mine"), ("b", "vit_rop"), ("c", "simclr")):
        (tmp_path / "runs" / name).symlink_to(run)
    for line in commands("docs/reports.md"):
        shell(line, "report.html")
    for protocol in ("knn", "finetune_mae,debug"):
        words = {"protocol=NAME": f"protocol={protocol}", "CHECKPOINT": "runs/photos_vit", "IMAGES": "DIR"}
        for line in commands("docs/evaluation.md", **words, **{"workdir=W": "workdir=runs/judged"}):
            shell(line, "top-1")
    runs = {"timm": "photos_vit", "hf": "photos_vit", "torchvision": "simclr", "torch": "digits", "authors": "digits"}
    for line in commands("docs/export.md", **{"mae_pretrain_vit_base.pth": "OUT/hf"}):
        kind = line.partition("--format=")[2].partition(" ")[0]
        shell(line.replace("CHECKPOINT", f"runs/{runs.get(kind)}").replace("--out=DIR", f"--out=OUT/{kind}"))
    image = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(1, 32, 32, 3)
    ours, theirs = (crate_jax.load(tmp_path / name) for name in ("runs/photos_vit", "OUT/timm"))
    np.testing.assert_allclose(theirs.features(image, pool="mean"), ours.features(image), atol=1e-5)


def test_the_engineer_with_the_wheel_in_an_empty_folder(built, cli_env, tmp_path):
    """`pip install` of it puts the command into an environment that finds the dependencies, but not this checkout."""
    home = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, *built.glob("*.whl")], check=True, capture_output=True)
    empty = tmp_path / "empty"
    draw(empty, HOLIDAY)
    shell = Shell(empty, home / "bin", cli_env)
    shell(f"python -c 'import crate_jax; assert crate_jax.__file__.startswith(\"{packages}\"), crate_jax'")
    for line in commands("docs/install.md", **{"method=vibcreg ": "method=vibcreg,debug "}):
        shell(line)
    assert (empty / "runs" / "first" / "report.html").exists()
    shell.python("docs/tour.md")
    own = "from crate_jax import get_config as named\ndef get_config(arg=None):\n    return named('quickstart:debug')\n"
    (empty / "mine.py").write_text(own)
    shell("crate-jax pretrain --config=mine.py --workdir=runs/mine", "top-1")
    (empty / "second").mkdir()
    shell(f"cd second && python -m doctest {ROOT / 'docs' / 'api.md'}")


@pytest.fixture
def shell(checkout, s3, tmp_path, monkeypatch) -> Shell:
    """Beside `launch/`; its commands, like this process, find the bucket ``photos`` with images in `set.npz`."""
    programs, env = checkout
    own = of_the_server(s3) | {bucket.SCRATCH: str(tmp_path / "scratch")}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    x, y = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8), np.arange(64) % 2
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x[:40], y_test=y[:40])
    bucket.Bucket("s3://photos").upload({"set.npz": tmp_path / "set.npz"})
    return Shell(tmp_path, programs, env | own)


def kill(session: int, words: list[str], wait_for: str, where: str) -> None:
    """Kills the process of a session with these words in its command, once the bucket has an object of that name."""
    deadline = time.monotonic() + 200
    while not any(wait_for in name for name in bucket.Bucket(where).names()):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            given, pid = path.read_bytes().decode().split("\0"), int(path.parent.name)
            found += [pid] * (set(words) <= set(given) and os.getsid(pid) == session)
    assert len(found) == 1, found
    os.kill(found[0], signal.SIGKILL)


def test_the_researcher_with_a_bucket_and_two_processes(shell):
    page = (ROOT / "docs" / "buckets.md").read_text()
    for form in ("npz:gs://bucket/set.npz", "=s3://bucket/runs/a`", 'crate_jax.load("s3://bucket/runs/a")'):
        assert form in page
    data = "--config.data.source=npz:s3://photos/set.npz"
    for line in commands("docs/buckets.md", **{"gs://bucket": "s3://photos", "crate ": "crate,debug "}):
        shell(f"{line} {data}", "top-1")
    shell("crate-jax report --config.checkpoint=s3://photos/runs/a", "s3://photos/runs/a/report.html")
    assert crate_jax.load("s3://photos/runs/a").features(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 48)

    one, two = commands("docs/gpus.md", **{"crate_mae ": "crate_mae:debug ", "folder:DIR": "npz:s3://photos/set.npz"})
    shell(one)
    two = two.replace("quickstart.py", "quickstart.py:debug")
    flags = "--config.steps=240 --config.save.every=20 --config.log.report=False"
    line = f"{two} {flags}".replace("runs/two", "s3://photos/runs/two")
    with shell.start(f"RESTARTS=1 {line}") as disturbed:
        words = ["--process_id=1", "--workdir=s3://photos/runs/two"]
        kill(disturbed.pid, words, "checkpoints/", "s3://photos/runs/two")
        said = disturbed.communicate(timeout=600)[0]
    assert disturbed.returncode == 0 and "restart 1 of 1" in said and "continuing from step" in said, said[-3000:]
    shell(line.replace("runs/two", "runs/straight"), "top-1")
    places = [bucket.Bucket(f"s3://photos/runs/{name}") for name in ("two", "straight")]
    ends = [json.loads(place.read("summary.json").data) for place in places]
    assert ends[0]["params_sha256"] == ends[1]["params_sha256"]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (line,) = commands("docs/distributed.md", **{"9000": str(port), "runs/two": "s3://photos/runs/loop"})
    shell(line, "top-1")


def test_the_launchers_commands_can_be_shown(checkout, tmp_path):
    """Those of SLURM, TPU slices and Kubernetes, as far as a machine without them can go."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shell = Shell(tmp_path, *checkout)
    shell("git init --quiet && git add launch && git -c user.name=n -c user.email=e commit --quiet -m launch")
    lines = commands("launch/README.md")
    assert len(lines) == 4
    for line in lines:
        shell(f"{line} --dry-run", "--workdir=")
