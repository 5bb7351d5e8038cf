"""The rooms of the package: which may import which."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from crate_jax.methods import METHODS
from tests.conftest import ROOT

PACKAGE = ROOT / "crate_jax"
# From the roof to the ground; a room imports only rooms below it. docs/architecture.md says what each holds.
FLOORS = (
    "__main__", "main", "api", "flags", "jobs", "convert", "analysis", "usage", "config_files", "config", "training",
    "methods", "report", "evals", "models", "data", "workdir", "parallel", "validation", "errors",
)  # fmt: skip

# The files outside of workdir/ that write files themselves, and where to: not to a run's folder.
WRITERS = {
    "convert.detection": "a program of its own, to --out",
    "convert.files": "safetensors, to the temporary file of workdir.whole",
    "convert.torch_model.modeling_crate": "runs without this package",
    "errors": "/dev/null",
    "report.svg": "memory",
}


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere in it, as dotted names below ``crate_jax``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("crate_jax.") for name in found if name.startswith("crate_jax."))


def module(path: Path) -> str:
    """``training/step.py`` -> ``training.step``; a package's own file is the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {module(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}


def test_every_file_is_in_a_room():
    """At the top there is only what starts a program, and what all rooms share."""
    assert {name.split(".")[0] for name in FILES} == set(FLOORS)
    assert {name for name, path in FILES.items() if path.parent == PACKAGE} == {
        "__main__", "main", "api", "flags", "usage", "config_files", "config", "validation", "errors"
    }  # fmt: skip


def test_no_import_runs_back_up():
    wrong = [
        f"{name} imports {other}"
        for name, path in FILES.items()
        for other in imports(path)
        if other.split(".")[0] in FLOORS and FLOORS.index(other.split(".")[0]) < FLOORS.index(name.split(".")[0])
    ]
    assert not wrong


def test_only_main_and_the_api_know_the_jobs_and_no_job_is_known_by_name():
    users = {name for name, path in FILES.items() for other in imports(path) if other.split(".")[0] == "jobs"}
    assert {name.split(".")[0] for name in users} == {"main", "api", "jobs"}
    for file in ("main.py", "api.py"):
        assert {other for other in imports(PACKAGE / file) if other.startswith("jobs.")} == {"jobs.JOBS"}


def test_a_method_imports_no_other_method():
    files = {row.build.__module__.removeprefix("crate_jax.") for row in METHODS.values()}
    assert len(files) == len(METHODS)
    for file in files:
        for other in imports(FILES[file]):
            assert not any(other == f or other.startswith(f"{f}.") for f in files), f"{file} imports {other}"


def test_training_knows_no_method():
    from_methods = {
        other
        for name, path in FILES.items()
        for other in imports(path)
        if name.split(".")[0] == "training" and other.startswith("methods")
    }
    assert from_methods and all(other.startswith("methods.method.") for other in from_methods)


def writes(call: ast.Call) -> bool:
    """Whether a call writes a file other than by a function of workdir/metrics.py."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    if name == "open":
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        texts = [str(x.value) for x in given if isinstance(x, ast.Constant)]
        return any(re.fullmatch("[rbt]*[wax+][rbt+]*", text) for text in texts)
    return name != ast.unparse(call.func) != f"metrics.{name}" and name in (
        "write_text", "write_bytes", "savefig", "savez", "savez_compressed", "save_file"
    )  # fmt: skip


def test_only_the_room_of_workdirs_writes_their_files():
    found = {
        name
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and writes(node)
    }
    assert {name for name in found if name.split(".")[0] != "workdir"} == set(WRITERS)
    assert {"workdir.folder", "workdir.metrics", "workdir.whole"} <= found


def test_methods_and_models_touch_no_folder_of_a_run():
    """They are pure functions: what they draw is written by the loop."""
    for name, path in FILES.items():
        if name.split(".")[0] in ("methods", "models"):
            assert not any(other.startswith("workdir") for other in imports(path)), name
