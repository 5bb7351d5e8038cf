"""The command `crate-jax`: its words, the configs it knows by name, and what it does not import."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from absl import flags

from crate_jax import __main__ as command, config_files, flags as flags_file, jobs, main, usage
from crate_jax.errors import ConfigError
from crate_jax.validation import flatten
from tests.conftest import ROOT

# Each takes a tenth of a second or more, some over a second.
HEAVY = {"sklearn", "matplotlib", "orbax", "grain", "tensorflow_datasets", "tensorboardX", "wandb"}


def test_what_is_not_used_is_not_imported(cli_env):
    """The package itself needs neither JAX nor NumPy; a wrong flag needs none of HEAVY."""
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


def test_the_result_is_shown_while_the_other_processes_listen(monkeypatch):
    """An error in it, such as a run of a sweep that diverged, ends all of them with its own status."""
    order = []
    job = types.SimpleNamespace(run=lambda config, workdir: {"loss": 1.5}, show=lambda result: order.append(result))
    given = dict.fromkeys(("coordinator_address", "num_processes", "process_id", "cluster_detection_method", "workdir"))
    flags_given = types.SimpleNamespace(config=types.SimpleNamespace(job="job"), **given)
    monkeypatch.setattr(main, "flags", types.SimpleNamespace(FLAGS=flags_given))
    monkeypatch.setattr(main, "set_up_log", lambda process: None)
    monkeypatch.setattr(jobs, "JOBS", {"job": job})
    for name, act in (("find", lambda *_: None), ("unwatch", lambda: order.append("end")), ("processes", lambda: 2)):
        monkeypatch.setattr(main.distributed, name, act)
    monkeypatch.setattr(main.distributed, "run_in_first", lambda act: [order.append("all"), act()])
    assert main._run([]) == 0
    assert order == ["all", {"loss": 1.5}, "end"]


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
        (["pretrain", "--helpfull"], ["--job=pretrain", "--helpfull"]),
    ],
)
def test_a_job_gets_its_own_config_unless_one_is_given(args, passed, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["crate-jax", *args])
    monkeypatch.setattr(command.runpy, "run_module", lambda name, **_: seen.append((name, sys.argv[1:])))
    assert command.main() == 0 and seen == [("crate_jax.main", passed)]


def test_a_config_in_a_file_of_flags_is_found(monkeypatch, tmp_path):
    (tmp_path / "inner").write_text("--config=quickstart:debug\n")
    (tmp_path / "flags").write_text(f"# mine\n--flagfile={tmp_path}/inner\n\n--config.steps=2\n")
    passed, seen = ["--job=pretrain", "--config=quickstart:debug", "--config.steps=2", "--workdir=W"], []
    monkeypatch.setattr(sys, "argv", ["crate-jax", "pretrain", f"--flagfile={tmp_path}/flags", "--workdir=W"])
    monkeypatch.setattr(command.runpy, "run_module", lambda name, **_: seen.append(sys.argv[1:]))
    assert command.main() == 0 and seen == [passed]


def status_of(args, monkeypatch):
    """The exit status of `crate-jax ARGS` in this process."""
    monkeypatch.setattr(sys, "argv", ["crate-jax", *args])
    try:
        return command.main()
    except SystemExit as e:  # argparse's way
        return e.code


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["pretrian"], "error: crate-jax: there is no command 'pretrian'; did you mean pretrain?"),
        (["--workdir=W"], "error: crate-jax: there is no command '--workdir=W'; the commands are pretrain, "),
        (["finetune"], "error: crate-jax finetune: --config is missing, such as --config=evaluate:protocol="),
        (["convert", "expand"], "error: argument inspect|import|export: invalid choice: 'expand'"),
        (["convert"], "error: the following arguments are required: inspect|import|export; crate-jax convert --help"),
        (["configs", "nonsense"], "error: crate-jax configs: takes no argument, here 'nonsense'; it lists all"),
    ],
)
def test_wrong_words_are_one_line(args, line, monkeypatch, capsys):
    status = status_of(args, monkeypatch)
    printed = capsys.readouterr()
    assert (status, printed.out, printed.err.count("\n")) == (2, "", 1) and printed.err.startswith(line)


@pytest.mark.parametrize(
    "command", [["crate_jax", "convert", "inspect", "cifar10_crate"], ["crate_jax.convert", "inspect", "cifar10_crate"]]
)
@pytest.mark.parametrize(
    ("devices", "line"),
    [
        ("two", 'error: Invalid value "two" for JAX flag jax_num_cpu_devices; correct the environment variable of tha'),
        ("0", "error: JAX_NUM_CPU_DEVICES=0: must be at least 1; correct it, or unset it"),
    ],
)
def test_a_variable_that_jax_does_not_take_is_one_line(devices, line, command, cli_env):
    env = cli_env | {"JAX_NUM_CPU_DEVICES": devices}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and done.stderr.startswith(line)


def helped(cli_env, *args):
    """What a real process answers to a question for help; it must not have imported JAX."""
    script = (
        "import runpy, sys; module, *sys.argv[1:] = sys.argv[1:]\n"
        "try: runpy.run_module(module, run_name='__main__', alter_sys=True)\n"
        "finally: assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, *args], cwd=ROOT, env=cli_env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "`" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 120
    return done.stdout


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_a_job_needs_no_jax(cli_env, flag):
    told = helped(cli_env, "crate_jax", "evaluate", "--config.seed=3", flag)
    assert told.startswith("usage: crate-jax evaluate [--config=NAME[:words]] [--config.KEY=VALUE ...] --workdir=DIR\n")
    told = helped(cli_env, "crate_jax.main", "--config=quickstart", flag)
    assert told.startswith(
        "usage: python -m crate_jax.main --config=NAME[:words] [--config.KEY=VALUE ...] --workdir=DIR\n"
    )


def test_the_help_of_each_job_has_its_configs_and_all_flags(monkeypatch, capsys):
    """The configs are those that the job runs; the examples are read as flags, of a config that exists."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags_file.flags, "FLAGS", values)
    for name in ("string", "integer"):
        define = getattr(flags, f"DEFINE_{name}")
        monkeypatch.setattr(flags_file.flags, f"DEFINE_{name}", functools.partial(define, flag_values=values))
    monkeypatch.setattr(flags_file.config_flags, "DEFINE_config_file", lambda *args: None)
    flags_file.define_flags()
    assert set(values) == usage.FLAGS.keys()
    of = {name: config_files.named(name).job for name in config_files.names()}
    for name in usage.JOBS:
        monkeypatch.setattr(sys, "argv", ["crate-jax", name, "--help"])
        assert command.main() == 0
        told = capsys.readouterr().out
        assert told.startswith(f"usage: crate-jax {name} ") and "docs/config.md" in told
        assert set(re.findall("^  --([a-z_]+)", told, re.MULTILINE)) >= usage.FLAGS.keys() - {"job"}
        fitting = {"evaluate"} if name == "finetune" else {c for c in config_files.names() if of[c] == name}
        assert set(re.findall("^  ([a-z]\\w+)", told, re.MULTILINE)) == fitting
        config = re.search("--config=(\\S+)", usage.EXAMPLES[name])
        config = config_files.named(config[1] if config else name)
        assert config.job == name
        for key in re.findall(r"--config\.([\w.]+)=", usage.EXAMPLES[name]):
            assert key in flatten(config)


@pytest.mark.parametrize(
    ("args", "first"),
    [
        (["--help"], "usage: crate-jax COMMAND"),
        (["configs", "--help"], "usage: crate-jax configs"),
        (["convert", "--help"], "usage: crate-jax convert "),
        (["convert", "inspect", "--help"], "usage: crate-jax convert inspect "),
    ],
)
def test_the_help_of_the_other_commands_names_them_as_typed(args, first, monkeypatch, capsys):
    status = status_of(args, monkeypatch)
    told = capsys.readouterr().out
    assert status == 0 and told.startswith(first) and "`" not in told


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
