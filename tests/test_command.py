"""The command `crate-jax`: its words, the configs it knows by name, and what it does not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from crate_jax import __main__ as command, config_files, jobs
from crate_jax.errors import ConfigError
from tests.conftest import ROOT

# Each takes a tenth of a second or more, some over a second.
HEAVY = {"sklearn", "matplotlib", "orbax", "grain", "tensorflow_datasets", "tensorboardX", "wandb"}


def test_what_is_not_used_is_not_imported(cli_env):
    """The package itself needs neither JAX nor NumPy; `--help` and a wrong flag need none of HEAVY."""
    script = """
import sys, crate_jax
print(*{"jax", "numpy"} & sys.modules.keys(), "|")
import crate_jax.main
print(*{name.partition(".")[0] for name in sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=cli_env, capture_output=True, text=True)
    early, late = done.stdout.split("|")
    assert not early.split() and "jax" in late.split()
    assert not HEAVY & set(late.split())


def test_the_commands_are_the_jobs_and_each_has_a_config():
    assert command.JOBS.keys() == jobs.JOBS.keys()
    for name in command.JOBS:
        assert config_files.named(command.CONFIG_NEEDED.get(name, name)).job == name


def test_a_name_stands_for_a_file_of_the_library_and_a_path_for_a_file_there(tmp_path, monkeypatch):
    ours = str(ROOT / "configs" / "cifar10.py")
    monkeypatch.chdir(tmp_path)
    assert {config_files.find(name) for name in ("cifar10", "cifar10.py", "configs/cifar10.py")} == {ours}
    (tmp_path / "cifar10.py").write_text("def get_config(arg=None):\n    return {'mine': arg}\n")
    (tmp_path / "cifar10").touch()
    assert config_files.find("cifar10.py") == "cifar10.py" and config_files.find("cifar10") == ours
    assert config_files.named("cifar10.py:word") == {"mine": "word"} and config_files.named("cifar10").epochs == 6
    assert config_files.named("cifar10.py") == {"mine": None}
    (tmp_path / "empty.py").touch()
    (tmp_path / "plain.py").write_text("def get_config():\n    return {}\n")
    wrong = {
        "nonesuch": "no such file.*, vit_mae", ".": "is a folder", "empty.py": "no function",
        "plain.py:word": "must take one argument, here 'word'",
    }  # fmt: skip
    for name, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            config_files.named(name)


def test_a_job_by_name_in_any_folder(cli_env, tmp_path):
    """A real process up to its first error, which shows that name, job and config have arrived."""
    args = ["pretrain", "--config=quickstart:debug", "--config.steps=2"]
    env = cli_env | {"PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "crate_jax", *args]
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    usage = "usage: crate-jax pretrain --config=NAME[:key=value,...] --workdir=DIR"
    assert (done.returncode, done.stderr) == (2, f"error: --workdir is missing; {usage}\n")


@pytest.mark.parametrize(
    ("args", "passed"),
    [
        (["evaluate", "--workdir=W"], ["--job=evaluate", "--config=evaluate", "--workdir=W"]),
        (["sweep", "--config", "sweep:over=lam"], ["--job=sweep", "--config", "sweep:over=lam"]),
        (["align", "--config.seed=3"], ["--job=align", "--config=align", "--config.seed=3"]),
        (["pretrain", "--help"], ["--job=pretrain", "--help"]),
    ],
)
def test_a_job_gets_its_own_config_unless_one_is_given(args, passed, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["crate-jax", *args])
    monkeypatch.setattr(command.runpy, "run_module", lambda name, **_: seen.append((name, sys.argv[1:])))
    assert command.main() == 0 and seen == [("crate_jax.main", passed)]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["pretrian"], "error: crate-jax: there is no command 'pretrian'; did you mean pretrain?"),
        (["--workdir=W"], "error: crate-jax: there is no command '--workdir=W'; the commands are pretrain, "),
        (["finetune"], "error: crate-jax finetune: --config is missing, such as --config=evaluate:protocol="),
        (["convert", "expand"], "error: argument inspect|import|export: invalid choice: 'expand'"),
    ],
)
def test_wrong_words_are_one_line(args, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["crate-jax", *args])
    try:
        status = command.main()
    except SystemExit as e:  # argparse's way
        status = e.code
    printed = capsys.readouterr()
    assert (status, printed.out, printed.err.count("\n")) == (2, "", 1) and printed.err.startswith(line)


def test_configs_are_listed_with_what_they_are_for(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["crate-jax", "configs"])
    assert command.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(p.stem for p in (ROOT / "configs").glob("[a-z]*.py"))
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.one_python
def test_wheel_and_source_archive_are_whole(built, cli_env, tmp_path):
    """The archive is the checkout; the wheel has all of the package and the configs, and runs in an empty folder."""

    def files(root: Path) -> set[str]:
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    checkout = files(built / "checkout")
    (source,) = (built / "source").iterdir()
    assert not {name for name in checkout if "egg-info" not in name and not name.startswith("build/")} - files(source)
    ours = {name for name in checkout if name.startswith("crate_jax/")}
    configs = {f"crate_jax/{name}" for name in checkout if name.startswith("configs/")}
    installed = {name for name in files(built / "installed") if ".dist-info/" not in name}
    assert installed == ours | configs and "crate_jax/py.typed" in ours and len(configs) > 10
    assert "crate-jax = crate_jax.__main__:main" in next(built.glob("installed/*/entry_points.txt")).read_text()
    env = cli_env | {"PYTHONPATH": str(built / "installed")}
    run = [sys.executable, "-m", "crate_jax.main", "--config=configs/sweep.py:base=joint_lightly,debug"]
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stderr.startswith("error: --workdir is missing"), done.stderr
