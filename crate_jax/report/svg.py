"""Matplotlib figures as SVG elements of a page, with the page's colours and font, and ids that are unique there."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Literal
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Matplotlib's colours C0 to C9. The page defines a light and a dark variant of each, --c0 to --c9.
CYCLE = ("1f77b4", "ff7f0e", "2ca02c", "d62728", "9467bd", "8c564b", "e377c2", "7f7f7f", "bcbd22", "17becf")
RUN = "run-"  # prefix of the ids of elements that belong to one run
HREF = "{http://www.w3.org/1999/xlink}href"
PIXELS_PER_POINT = 96 / 72
Place = Literal["outside upper left", "outside lower center"]


def element(figure: Figure, name: str, runs: Sequence[str], caption: str) -> tuple[str, float]:
    """Draws a figure.

    An element whose label names a run (:func:`owner`) gets the attribute ``data-run`` with the run's number, so that
    the page can hide it. Greys become mixtures of the page's ink and paper, the colours C0 to C9 become variables of
    the page, and all other colours stay. The same figure gives the same text.

    Args:
      figure: the figure; it is drawn without a background.
      name: a name that no other figure of the page has; all ids start with it.
      runs: the names of the runs, in the order of the page.
      caption: the text for a screen reader.

    Returns:
      the text of the element, and its natural width in CSS pixels.
    """
    for artist in figure.findobj():
        number = owner(str(artist.get_label()), runs)
        if number is not None:
            artist.set_gid(f"{RUN}{number}")
    out = io.StringIO()
    # Text stays text, which is small, searchable and in the page's font. The salt makes ids a function of the figure.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "crate_jax"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(out.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # a style in an SVG applies to the whole page
                parent.remove(child)
    for node in root.iter():
        _adapt(node, name)
    width = figure.get_figwidth() * 72 * PIXELS_PER_POINT
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": caption, "width": f"{width:.0f}"}
    return ElementTree.tostring(root, encoding="unicode"), width


def owner(label: str, runs: Sequence[str]) -> int | None:
    """The number of the run that a label names as ``NAME``, ``NAME: more`` or ``NAME, more``; None if it names no run.

    The name may follow an underscore, which keeps a label out of Matplotlib's legends.

    >>> owner("vit: loss", ["crate", "vit"]), owner("_crate", ["crate", "vit"]), owner("vits", ["crate", "vit"])
    (1, 0, None)
    """
    texts = (label, label.removeprefix("_"))
    found = [
        (len(run), number)
        for number, run in enumerate(runs)
        for text in texts
        if text == escape(run) or text.startswith((f"{escape(run)}:", f"{escape(run)},"))
    ]
    return max(found)[1] if found else None


def escape(name: str) -> str:
    """A name as text for Matplotlib, where a plain dollar would begin a formula."""
    return name.replace("$", r"\$")


def legend(figure: Figure, names: Mapping[str, str], place: Place) -> None:
    """Adds one legend of two runs or more, in the colours C0, C1, ...; its entries are hidden with their runs.

    Args:
      figure: the figure, of its final width, which decides how many entries lie beside each other.
      names: the runs' names -> how the legend names them.
      place: where it lies, Matplotlib's ``loc``.
    """
    if len(names) < 2:
        return
    lines = [Line2D([], [], color=f"C{i % 10}", label=escape(run)) for i, run in enumerate(names)]
    room = 0.07 * max(map(len, names.values())) + 0.6  # inches
    columns = max(1, min(len(names), int(figure.get_figwidth() / room)))
    entries = figure.legend(handles=lines, loc=place, ncols=columns, frameon=False, fontsize=8)
    for text, (run, shown) in zip(entries.get_texts(), names.items(), strict=True):
        text.set_text(escape(shown))
        text.set_label(escape(run))


def _adapt(node: ElementTree.Element, name: str) -> None:
    node.tag = node.tag.rpartition("}")[2]  # HTML names the elements of SVG without a namespace
    old = node.attrib.pop("id", None)
    if old is not None and old.startswith(RUN):
        node.set("data-run", old.removeprefix(RUN))
    elif old is not None:
        node.set("id", f"{name}-{old}")
    if HREF in node.attrib:
        node.set("href", node.attrib.pop(HREF))
    for key, value in node.attrib.items():
        if key == "href" and value.startswith("#"):
            node.set(key, f"#{name}-{value[1:]}")
        elif "url(#" in value:
            node.set(key, value.replace("url(#", f"url(#{name}-"))
    if "style" in node.attrib:
        style = re.sub(r"#([0-9a-fA-F]{6})\b", _colour, node.attrib["style"])
        if node.tag == "text":
            style = re.sub(r"font-family:[^;]*;?", "", style)
        node.set("style", style)


def _colour(found: re.Match[str]) -> str:
    colour = found[1].lower()
    if colour in CYCLE:
        return f"var(--c{CYCLE.index(colour)})"
    red, green, blue = (int(colour[i : i + 2], 16) for i in (0, 2, 4))
    if max(red, green, blue) - min(red, green, blue) > 4:
        return found[0]
    if green == 0:
        return "currentColor"
    return f"color-mix(in srgb, currentColor {100 - 100 * green / 255:.0f}%, var(--paper))"
