"""What the documents point at exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests import config_page
from tests.conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")])
KEYS = set(re.findall(r"^\| `([\w.]+)`", (ROOT / "docs/config.md").read_text(), re.MULTILINE))


def names(path: Path) -> set[str]:
    """Functions, classes, methods and constants of a module, as `name` and `Class.name`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            found |= {f"{node.name}.{x.name}" for x in getattr(node, "body", ()) if isinstance(x, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_names_and_links_exist(page):
    text = page.read_text()
    for file, name in re.findall(r"`([\w/]+\.py): ([\w.]+)`", text):
        assert name in names(ROOT / "crate_jax" / file), f"{page.name}: {file} has no {name}"
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), f"{page.name}: no file {link}"
    if page.name == "bad_inputs.md":  # its commands are wrong on purpose
        return
    for config in re.findall(r"--config=(\S+?\.py)", text):
        assert (ROOT / config).exists() or "NAME" in config, f"{page.name}: no file {config}"
    for config in re.findall(r"--config=([a-z]\w*)(?=[:\s`])", text):
        assert (ROOT / f"configs/{config}.py").exists(), f"{page.name}: no config {config}"
    for key in re.findall(r"(?:--config|`config)\.(?!json`|py`|x`)([a-z][\w.]*)[=`]", text):
        assert key in KEYS or any(name.startswith(f"{key}.") for name in KEYS), f"{page.name}: no key {key}"


def test_the_page_of_all_keys_is_made_of_their_lines():
    made = "`python -m tests.config_page > docs/config.md` makes it anew"
    assert (ROOT / "docs/config.md").read_text() == config_page.page(), made


def test_pages_name_something():
    """The patterns above still match how the pages are written."""
    assert sum(len(re.findall(r"`[\w/]+\.py: [\w.]+`", page.read_text())) for page in PAGES) > 20
