"""The site of docs/, which `make site` builds: every warning is an error, and nothing is loaded from another server.

The pages are those that GitHub shows. Here equations become MathML, which browsers draw without a script, and a
reference such as `models/crate.py: ista` leads to its line on a page with that file.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from sphinx.application import Sphinx
from sphinx.errors import SphinxError

ROOT = Path(__file__).parents[1]

project = "crate_jax"
root_doc = "docs/index"
# The sources are those of the whole checkout, so that the pages may link to launch/ and CONTRIBUTING.md.
include_patterns = ["docs/**", "launch/README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "build", "dist", "runs", "tests", "crate_jax", "benchmarks", "configs"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.linkcode", "sphinx_copybutton"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
add_module_names = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 100
highlight_language = "none"

html_theme = "furo"
html_title = "crate_jax"
html_math_renderer = "mathml"
html_copy_source = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
copybutton_prompt_text = ">>> "

# The menu: captions and their pages; some have a shorter title there.
MENU = [
    ("Start", "install, tour"),
    (
        "How to",
        "photos, data, buckets, gpus, evaluation, sweeps, reports, export, adding_a_part, segmentation, detection",
    ),
    (
        "Papers",
        "CRATE-MAE <crate_mae>, ROPIM <ropim>, SO and SRIP <orthogonality>, Alignment <alignment>, joint_embedding, "
        "views, optimisers, differences",
    ),
    ("Reference", "api, reference, config, runs, survival, distributed, /launch/README, weights, bad_inputs"),
    ("Results", "results, claims, scale"),
    ("Project", "architecture, security, /CONTRIBUTING, /CHANGELOG"),
]

CODE = re.compile(r"([\w/]+\.py): ([\w.]+)")
shown: set[str] = set()  # the files of code that a page leads to, from the root of the checkout


def add_menu(app: Sphinx, name: str, source: list[str]) -> None:
    """Adds the menu to the start page, where GitHub would show it as text."""
    if name == root_doc:
        for caption, pages in MENU:
            source[0] += "\n".join(
                ["\n\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages.split(", "), "```\n"]
            )


def lead_to_code(app: Sphinx, doctree: nodes.document, name: str) -> None:
    """Makes links of the names of functions, and of the links to files of code."""
    for node in list(doctree.findall(nodes.literal)):
        match = CODE.fullmatch(node.astext())
        path = f"crate_jax/{match[1]}" if match else ""
        if match and (ROOT / path).is_file() and not isinstance(node.parent, nodes.reference):
            node.replace_self(nodes.reference("", "", node.deepcopy(), refuri=address(name, path, match[2])))
    for node in list(doctree.findall(lambda n: n.tagname == "download_reference")):
        path = str(Path(ROOT, Path(name).parent, node["reftarget"]).resolve().relative_to(ROOT))
        if path.endswith(".py"):
            node.replace_self(nodes.reference("", "", *node.children, refuri=address(name, path)))


def address(page: str, path: str, name: str | None = None) -> str:
    """The link from a page to a file of code, or to the line where it defines a name."""
    shown.add(path)
    anchor = f"#line-{line_of(path, name)}" if name else ""
    return "../" * page.count("/") + f"source/{path}.html{anchor}"


def line_of(path: str, name: str) -> int:
    """The line on which a module defines a function, class, method or constant."""
    body, line = ast.parse((ROOT / path).read_text()).body, 0
    for part in name.split("."):
        found = [node for node in body if part in names_of(node)]
        if not found:
            raise SphinxError(f"{path} has no {name}")
        body, line = getattr(found[0], "body", []), found[0].lineno
    return line


def names_of(node: ast.stmt) -> set[str]:
    """The names that a statement of a module or a class defines."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {getattr(node, "name", "")} | {t.id for t in targets if isinstance(t, ast.Name)}


def keep_bars(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Escapes the bars of norms, |x|, in docstrings, outside of examples; to Sphinx they name a substitution."""
    example = False
    for i, line in enumerate(lines):
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        if not example:
            lines[i] = line.replace("|", r"\|")


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """The link [source] of an entry of the reference."""
    path = info["module"].replace(".", "/")
    path = f"{path}.py" if (ROOT / f"{path}.py").is_file() else f"{path}/__init__.py"
    try:
        return address("docs/reference", path, info["fullname"])
    except SphinxError:  # an attribute that only the docstring lists
        return None


def code_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for each file of code that a page leads to, with an anchor at each line."""
    for path in sorted(shown):
        text = (ROOT / path).read_text()
        body = highlight(text, get_lexer_for_filename(path), HtmlFormatter(lineanchors="line", wrapcode=True))
        title = html.escape(path)
        yield f"source/{path}", {"title": title, "body": f"<h1>{title}</h1>{body}"}, "page.html"


def leave_address(app: Sphinx, error: Exception | None) -> None:
    """The folder's own page leads to the start page."""
    if not error and app.builder.name == "html":
        Path(app.outdir, "index.html").write_text('<meta http-equiv="refresh" content="0; url=docs/index.html">\n')


def draw_maths(self: Any, node: nodes.math | nodes.math_block) -> None:
    """Writes an equation as MathML."""
    block = isinstance(node, nodes.math_block)
    try:
        mathml = latex2mathml.tex2mathml(node.astext(), as_block=block)
    except latex2mathml.MathError as error:
        raise SphinxError(f"{node.astext()}: {error}") from None
    self.body.append(f'<div class="maths">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Connects the functions above."""
    app.add_html_math_renderer("mathml", (draw_maths, None), (draw_maths, None))
    app.connect("source-read", add_menu)
    app.connect("autodoc-process-docstring", keep_bars)
    app.connect("doctree-resolved", lead_to_code)
    app.connect("html-collect-pages", code_pages)
    app.connect("build-finished", leave_address)
