"""Sections as one HTML page that needs no other file: it holds its styles, script and pictures."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Mapping, MutableMapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from crate_jax.report import svg
from crate_jax.report.section import Best, Cell, Estimate, Figure, Section, Table
from crate_jax.workdir.metrics import format_number

CSS = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")
MIN_PICTURE_WIDTH = 200  # CSS pixels; narrower pictures are enlarged by a whole factor
LONG_TEXT = 24  # characters; longer texts in a table may break anywhere
MIN_SHRINK = 0.62  # share of its natural width to which a figure shrinks on a small screen; then it scrolls


def render(
    title: str,
    runs: Mapping[str, str],
    sections: Sequence[Section],
    missing: Mapping[str, str],
    drawn: MutableMapping[str, str] | None = None,
    more: str = "",
) -> str:
    """The whole page as HTML.

    Args:
      title: the page's title. This and all other texts are plain text.
      runs: name of a run -> its origin. If there are several runs, each has a button that shows or hides its parts. A
        run's parts are: rows with its name in a table's column ``run``; a table's column with its name; lines of
        figures with its name as label; figures and tables whose caption begins with its name and a comma or colon.
      sections: the sections in the order of the page.
      missing: title of a section that is left out -> the reason.
      drawn: id of a section -> its HTML. A section that it holds is not drawn again, the others are added to it. So a
        page that grows section by section, about the same runs, draws each figure once. None: all are drawn.
      more: which sections the page could have, and how to ask for them; empty: no such line.

    Raises:
      TypeError: a picture is not uint8 (H, W, 3).
      ValueError: a table's row has not as many cells as the table has columns.
    """
    names = tuple(runs) if len(runs) > 1 else ()
    slugs = [f"s{i}-{_slug(s.title)}" for i, s in enumerate(sections)]
    drawn = {} if drawn is None else drawn
    for section, slug in zip(sections, slugs, strict=True):
        if slug not in drawn:
            drawn[slug] = _section(section, slug, names)
    parts = [drawn[slug] for slug in slugs]
    links = "".join(
        f'<li><a href="#{slug}">{escape(section.title)}</a></li>' for section, slug in zip(sections, slugs, strict=True)
    )
    if more:
        links += '<li><a href="#more">More sections</a></li>'
        parts.append(f'<section id="more" class="missing"><h2>More sections</h2><p>{_prose(more)}</p></section>')
    if missing:
        links += '<li><a href="#missing">Left out</a></li>'
        items = "".join(f"<li><b>{escape(t)}</b>: {_prose(why)}</li>" for t, why in missing.items())
        parts.append(f'<section id="missing" class="missing"><h2>Left out</h2><ul>{items}</ul></section>')
    origin = "".join(f"{name}: {where}. " if where != name else f"{name}. " for name, where in runs.items())
    script = SCRIPT.read_text(encoding="utf-8")
    # With this policy the browser loads nothing from anywhere and runs only this script.
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{CSS.read_text(encoding="utf-8")}</style>
</head>
<body>
<header class="top">
<h1>{escape(title)}</h1>
{_chips(names)}
<button id="theme" class="needs-script" type="button">Theme: system</button>
</header>
<div class="body">
<nav class="contents" aria-label="Contents"><details open><summary>Contents</summary><ol>{links}</ol></details></nav>
<main>
{"".join(parts)}
<footer><p>{escape(origin)}The numbers are in report.json beside this file, unrounded.</p></footer>
</main>
</div>
<script>{script}</script>
</body>
</html>
"""


def _slug(text: str) -> str:
    """A text as part of an id.

    >>> _slug("What does each layer do?")
    'what-does-each-layer-do'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _chips(names: Sequence[str]) -> str:
    if not names:
        return ""
    chips = "".join(
        f'<button type="button" aria-pressed="true" value="{i}" title="show or hide">'
        f'<i style="--run: var(--c{i % len(svg.CYCLE)})"></i>{escape(name)}</button>'
        for i, name in enumerate(names)
    )
    return f'<div class="runs needs-script" role="group" aria-label="Runs shown">{chips}</div>'


def _prose(text: str) -> str:
    """A text as HTML, its flags as code, which breaks into lines only where a line has no room for it.

    >>> _prose("add --config.log.every=10, or <less>.")
    'add <code>--config.log.every=10</code>, or &lt;less&gt;.'
    >>> _prose("--config.sweep.values='a'; then")
    '<code>--config.sweep.values=&#x27;a&#x27;</code>; then'
    """
    parts = re.split(r"(--\w\S*[^\s.,;:)])", text)  # flags are at the odd places
    return "".join(f"<code>{escape(part)}</code>" if i % 2 else escape(part) for i, part in enumerate(parts))


def _section(section: Section, slug: str, runs: Sequence[str]) -> str:
    figures = "".join(_figure(f, f"{slug}-f{i}", runs) for i, f in enumerate(section.figures))
    tables = [_table(table, f"{slug}-t{i}", runs) for i, table in enumerate(section.tables)]
    if figures:
        figures = f'<div class="figures">{figures}</div>'
    head = f'<h2 id="{slug}-h">{escape(section.title)}</h2>'
    first, rest = "".join(tables[: section.leading]), "".join(tables[section.leading :])
    body = f"<p>{escape(section.text)}</p>{first}{figures}{rest}"
    if section.folded:
        body = f"<details><summary>{head}</summary>{body}</details>"
    else:
        body = head + body
    return f'<section id="{slug}" aria-labelledby="{slug}-h">{body}</section>\n'


def _figure(figure: Figure, name: str, runs: Sequence[str]) -> str:
    if isinstance(figure.content, np.ndarray):
        content, width = _picture(figure.content, figure.caption)
    else:
        content, width = svg.element(figure.content, name, runs, figure.caption)
    kind = "picture" if isinstance(figure.content, np.ndarray) else "plot"
    mine = _owned(figure.caption, runs)
    return (
        f'<figure class="{kind}"{mine} style="--width: {width:.0f}px; --least: {MIN_SHRINK * width:.0f}px">'
        f'<div class="scroll">'
        f"{content}</div><figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _owned(caption: str, runs: Sequence[str]) -> str:
    """The attribute that hides a figure or table together with the one run that its caption names, or nothing."""
    number = svg.owner(svg.escape(caption), runs)
    return "" if number is None else f' data-run="{number}"'


def _picture(array: np.ndarray, caption: str) -> tuple[str, float]:
    """An <img> element that holds the PNG file of uint8 (H, W, 3), and its width on the page in CSS pixels."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise TypeError(f"report: a picture must be uint8 (H, W, 3), got {array.dtype} {array.shape}")
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG", optimize=True)
    height, width = array.shape[:2]
    scale = -(-MIN_PICTURE_WIDTH // width)
    kind = ' class="small"' if scale > 1 else ""
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<img{kind} alt="{escape(caption)}" width="{scale * width}" height="{scale * height}" '
        f'src="data:image/png;base64,{data}">',
        scale * width,
    )


def _table(table: Table, name: str, runs: Sequence[str]) -> str:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"report: table {table.caption!r}: {len(row)} cells under {len(table.columns)} columns")
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.columns)
    numeric = [_is_numeric(cells) for cells in columns]
    # A column with a run's name is hidden with that run, and so is a row that names it (below).
    owner = [f' data-run="{runs.index(c)}"' if c in runs else "" for c in table.columns]
    head = "".join(
        f'<th scope="col" aria-sort="none"{_class(n)}{o}><button type="button">{escape(c)}</button></th>'
        for c, n, o in zip(table.columns, numeric, owner, strict=True)
    )
    at = table.columns.index("run") if "run" in table.columns else None
    body = []
    for row in table.rows:
        mine = f' data-run="{runs.index(row[at])}"' if at is not None and row[at] in runs else ""
        cells = [_cell(x, n, o, i == 0) for i, (x, n, o) in enumerate(zip(row, numeric, owner, strict=True))]
        body.append(f"<tr{mine}>{''.join(cells)}</tr>")
    mine = _owned(table.caption, runs)
    return (
        f'<p class="table-name" id="{name}"{mine}>{escape(table.caption)}</p>'
        f'<div class="table scroll"{mine} tabindex="0" role="region" aria-labelledby="{name}">'
        f'<table aria-labelledby="{name}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _is_numeric(cells: Sequence[object]) -> bool:
    given = [c for c in cells if c is not None]
    kinds = int | float | np.number | Estimate | Best
    return bool(given) and all(isinstance(c, kinds) and not isinstance(c, bool) for c in given)


def _class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _cell(value: Cell, numeric: bool, owner: str, is_first: bool) -> str:
    if isinstance(value, Estimate):
        half = (value.high - value.low) / 2
        digits = max(1, -math.floor(math.log10(half))) if half > 0 else 1  # one digit of the interval, at least
        shown = f"{value.value:.{digits}f} <small>± {half:.{digits}f}</small>"
        shown = f"<strong>{shown}</strong>" if value.best else shown
        title = f"{value.low!r} to {value.high!r}"
        return f'<td data-number="{value.value!r}" title="{title}"{_class(numeric)}{owner}>{shown}</td>'
    if isinstance(value, Best):
        plain = _cell(value.value, numeric, owner, is_first)
        return plain.replace(">", "><strong>", 1).replace("</td>", "</strong></td>")
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or value != value:  # the script sorts empty cells last, in both directions
        return f"<td data-empty{_class(numeric)}{owner}>{'–' if value is None else 'NaN'}</td>"
    if isinstance(value, int | float) and not isinstance(value, bool):
        shown = f"{value:,}" if isinstance(value, int) else format_number(value)
        whole = repr(value).replace("inf", "Infinity")  # JavaScript's spelling
        return f'<td data-number="{whole}" title="{whole}"{_class(numeric)}{owner}>{shown}</td>'
    if is_first:
        return f'<th scope="row"{owner}>{escape(str(value))}</th>'
    long = ' class="long"' if len(str(value)) > LONG_TEXT else ""
    return f"<td{long}{owner}>{escape(str(value))}</td>"
