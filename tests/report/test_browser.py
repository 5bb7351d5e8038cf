"""Reports opened in a headless Chromium, from disk: nothing fails, all is drawn, and what can be pressed works."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil

import numpy as np
import pytest
from matplotlib.figure import Figure as Plot
from PIL import Image

from crate_jax.analysis import logged as summary_section
from crate_jax.report import Figure, Section, Table, page
from crate_jax.report.section import Subject
from tests.jobs.test_report import tiny

pytestmark = pytest.mark.one_python

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make install-browser")

NAMES = ("mask", "rop", "noise")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PHONE, DESKTOP = {"width": 390, "height": 800}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)  # else the one that playwright downloaded
    with playwright.sync_playwright() as p:
        if path is None and not os.path.exists(p.chromium.executable_path):
            pytest.skip("no Chromium is installed: make install-browser")
        browser = p.chromium.launch(executable_path=path)
        yield browser
        browser.close()


def logged(folder, number):
    """The subject of a run that left these numbers."""
    workdir = folder / NAMES[number]
    workdir.mkdir()
    steps = range(100, 1100, 100)
    lines = [f'{{"step": {s}, "loss": {(number + 1) / s**0.5}, "lr": 0.001}}\n' for s in steps]
    (workdir / "metrics.jsonl").write_text("".join(lines))
    scores = {"probe_top1": (0.9, 0.08, 0.5)[number], "knn_top1": 0.5}
    summary = {f'"{k}{s}": {v}' for k, v in scores.items() for s in ("", "_untrained", "_pixels")}
    (workdir / "summary.json").write_text(
        f'{{"steps": 1000, "loss": 0.1, "test_images": 90, "majority_top1": 0.1, {", ".join(summary)}}}'
    )
    return Subject(NAMES[number], tiny(encoder__lam=float(number)), {}, workdir, None, None, None)


def others():
    """A section with what the overview has none of: a picture, an image and a clip in a plot, missing numbers."""
    ax = (figure := Plot(figsize=(9, 2), layout="constrained")).subplots()
    ax.imshow(np.arange(16).reshape(2, 8), aspect="auto")
    for name in NAMES[:2]:
        ax.plot([0, 7], [0, 1], label=name)
    grid = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    rows = (("mask", 9), ("rop", None), ("noise", 100), ("all", -2.5e-7), ("none", float("inf")))
    return Section(
        "Others & more",
        "A paragraph.",
        (Figure("plot", figure), Figure("grid", grid)),
        (Table("t", ("run", "x"), rows),),
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    subjects = [logged(folder, i) for i in range(3)]
    folded = dataclasses.replace(summary_section.details(subjects), folded=True)
    sections = [summary_section.section(subjects), folded, others()]
    path = folder / "report.html"
    path.write_text(page.render("3 runs", {n: n for n in NAMES}, sections, {"Pictures": "there are none"}))
    return path


ONE_THEME = pytest.mark.parametrize("opened", ["light"], indirect=True)  # for what colours have no part in


@pytest.fixture(params=["light", "dark"])
def opened(browser, report, request):
    """The page in each scheme; fails at the end if the browser complained or asked for anything but the file."""
    with browser.new_context(color_scheme=request.param, viewport=DESKTOP) as context:
        tab, wrong = context.new_page(), []
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda r: wrong.append(r.url) if r.url[:5] not in ("data:", "file:") else None)
        tab.on("requestfailed", lambda r: wrong.append(f"failed: {r.url[:80]}"))
        tab.goto(report.as_uri())
        yield tab, request.param
        assert wrong == []


def unfold(tab):
    tab.locator("main details > summary").click()


def pixels(element) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(element.screenshot())).convert("RGB")).astype(int)


def column(tab, table: int, number: int) -> list[str]:
    return tab.locator("table").nth(table).locator(f"tbody tr > :nth-child({number})").all_inner_texts()


def test_every_figure_is_drawn_and_can_be_read(opened):
    tab, scheme = opened
    unfold(tab)
    figures = tab.locator("figure").all()
    assert len(figures) == 2 + 2 + 2  # scores, loss and rate, others
    for figure in figures:
        content = figure.locator("svg, img").first
        box = content.bounding_box()
        assert box["width"] > 150 and box["height"] > 100
        shown = pixels(content)
        background = np.median(shown.reshape(-1, 3), axis=0)
        away = np.abs(shown - background).max(-1) > 100  # ink or colours, in either scheme
        assert 0.003 < away.mean() < 0.995
        if figure.get_attribute("class") == "plot":
            text = figure.locator("svg text").first.evaluate("x => getComputedStyle(x).fill")
            assert (int(text.split("(")[1].split(",")[0]) > 128) == (scheme == "dark")
    assert (pixels(tab.locator("body")).mean() < 100) == (scheme == "dark")


def test_the_theme_can_be_chosen(opened):
    tab, scheme = opened
    other = {"light": "dark", "dark": "light"}[scheme]
    before = pixels(tab.locator("main")).mean()
    while tab.locator("#theme").inner_text() != f"Theme: {other}":
        tab.locator("#theme").click()
    assert abs(pixels(tab.locator("main")).mean() - before) > 60
    tab.reload()  # the choice stays, where the browser keeps it
    assert tab.locator("#theme").inner_text() == f"Theme: {other}"
    assert tab.evaluate("document.documentElement.dataset.theme") == other


@ONE_THEME
def test_tables_are_sorted_as_numbers_by_click_and_by_key(opened):
    tab, _ = opened
    last = tab.locator("table").count() - 1
    assert column(tab, last, 2) == ["9", "–", "100", "-2.5e-7", "inf"]
    head = tab.locator("table").nth(last).locator("thead th").nth(1)
    head.locator("button").click()
    assert column(tab, last, 2) == ["-2.5e-7", "9", "100", "inf", "–"]
    assert column(tab, last, 1) == ["all", "mask", "noise", "none", "rop"]
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").press("Enter")
    assert column(tab, last, 2) == ["inf", "100", "9", "-2.5e-7", "–"]
    assert head.get_attribute("aria-sort") == "descending"
    tab.locator("table").nth(last).locator("thead button").first.click()
    assert column(tab, last, 1) == ["all", "mask", "noise", "none", "rop"]
    assert head.get_attribute("aria-sort") == "none"
    unfold(tab)
    tab.locator("table").nth(1).locator("thead button").nth(2).click()  # probe
    assert [x for x in column(tab, 1, 3)] == ["8"] * 3 + ["50"] * 3 + ["90"] * 3
    tab.locator("table").first.locator("thead button").nth(4).click()
    assert column(tab, 0, 5) == ["8.0 ± 5.7", "50.0 ± 10.1", "90.0 ± 6.3"]
    assert tab.locator("table").first.locator("strong").all_inner_texts() == ["90.0 ± 6.3"]


@ONE_THEME
def test_a_folded_section_opens_where_the_reader_goes_and_for_print(opened):
    tab, _ = opened
    details = tab.locator("main details")
    assert details.get_attribute("open") is None and not tab.locator("figure").nth(2).is_visible()
    tab.locator(".contents a", has_text="Curves").click()
    assert tab.locator("figure").nth(2).is_visible()
    tab.reload()  # the address still names the section
    assert tab.locator("figure").nth(2).is_visible()
    unfold(tab)
    assert details.get_attribute("open") is None
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert details.get_attribute("open") is not None


@ONE_THEME
def test_runs_can_be_hidden_and_shown(opened):
    tab, _ = opened
    unfold(tab)
    loss = tab.locator("figure").nth(2).locator("svg")
    chip = tab.locator(".runs button", has_text="rop")
    lines, before = loss.locator("[data-run]:visible").count(), pixels(loss)
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert loss.locator("[data-run]:visible").count() == lines * 2 // 3
    hidden = pixels(loss)
    rows = min(len(hidden), len(before))  # the rows above are fewer, and the picture begins at a part of a pixel
    assert np.abs(hidden[:rows] - before[:rows]).max() > 100
    shown = tab.locator("table").nth(1).locator("tbody tr:visible").all_inner_texts()
    assert len(shown) == 6 and not any("rop" in row for row in shown)
    settings = tab.locator("table").nth(3)
    assert settings.locator("thead th:visible").all_inner_texts() == ["config", "mask", "noise"]
    assert settings.locator("tbody tr").first.locator("td:visible").count() == 2
    chip.click()
    assert tab.locator("table").nth(1).locator("tbody tr:visible").count() == 9
    assert np.abs(pixels(loss) - before)[2:-2].max() == 0  # at the edges the page may shine through a part of a pixel


@ONE_THEME
def test_a_phone_needs_no_sideways_scrolling_and_can_reach_every_part(opened):
    tab, _ = opened
    tab.set_viewport_size(PHONE)
    tab.reload()
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert not tab.locator(".contents li").first.is_visible()  # closed, so that the page begins with its first section
    tab.locator(".contents summary").click()
    tab.locator(".contents a", has_text="Others & more").click()
    heading = tab.get_by_role("heading", name="Others & more")
    top = tab.locator(".top").bounding_box()
    tab.wait_for_function("scrollY > 500")
    assert top["height"] < 130 and heading.bounding_box()["y"] >= top["y"] + top["height"] - 1
    unfold(tab)
    for part in tab.locator("figure, .table").all():
        box = part.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
