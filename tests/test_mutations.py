"""Every row of mutations.toml still applies; `make mutate` tries them."""

from __future__ import annotations

import ast

import pytest

from tests import mutate
from tests.conftest import ROOT

pytestmark = pytest.mark.one_python

ROWS = mutate.mutations()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_fits_the_code_and_names_a_test(row):
    changed = row.applied((ROOT / row.file).read_text())
    if row.file.endswith(".py"):
        ast.parse(changed)
    file, name = row.test.partition("[")[0].split("::")
    tests = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert tests.count(name) == 1


@pytest.mark.parametrize("text", ["nothing of it", "a = b; a = b"])
def test_a_row_that_does_not_fit_is_named(text):
    with pytest.raises(ValueError, match="the name: 'a = b' stands . times in f.py, not once"):
        mutate.Mutation("the name", "f.py", "a = b", "a = c", "").applied(text)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def test():\n    assert 1 == 2", ""),
        ("def test():\n    pass", "SURVIVED"),
        ("def test():\n    nonesuch", "CANNOT RUN: failure: NameError"),
        ("def other(): pass", "NO TEST FAILED (pytest's status 4)"),
        (
            "import pytest\n@pytest.fixture\ndef bad():\n    assert 0\ndef test(bad): pass",
            "NO TEST FAILED (pytest's status 1): error: failed on setup",
        ),
    ],
)
def test_only_a_test_that_fails_has_noticed(body, said, tmp_path):
    (tmp_path / "test_it.py").write_text(body)
    status, found, _ = mutate.pytest(tmp_path, ["test_it.py::test"])
    verdict = mutate.verdict(status, found)
    assert verdict.startswith(said) and bool(verdict) == bool(said), (verdict, found)
