"""Reports: what they hold, that a browser needs nothing else, and what is said where something is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from html import escape
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure as Plot
from ml_collections import ConfigDict

import crate_jax
from configs import quickstart, report as report_config
from crate_jax import config as configs, data, validation
from crate_jax.analysis import logged, neighbours, records
from crate_jax.data.sources import SyntheticSource
from crate_jax.errors import CheckpointError, ConfigError, DataError, UserError
from crate_jax.jobs import report as job, train
from crate_jax.parallel import sharding
from crate_jax.report import Figure, Section, Subject, Table, page, svg
from crate_jax.report.section import Absent, Best, Estimate
from crate_jax.validation import flatten
from crate_jax.workdir import pictures

pytestmark = [pytest.mark.one_python, pytest.mark.usefixtures("one_device")]

NAMES = ("<script>alert(1)<script>", "b$x_2 & c")  # of folders
SPEED = "What is learned when"  # needs more checkpoints than these runs keep
VOID = {"meta", "link", "img", "br", "hr", "input"}


def tiny(**changes):
    """A run of one block on the digits."""
    c = quickstart.get_config("debug")
    c.batch_size, c.encoder.width, c.encoder.depth, c.encoder.heads = 16, 16, 1, 2
    c.decoder.depth, c.decoder.heads, c.log.pictures, c.log.tensorboard = 1, 2, 3, False
    for key, value in changes.items():
        *section, leaf = key.split("__")
        (c[section[0]] if section else c)[leaf] = value
    return c


def two_runs(folder):
    """Trains two runs with the names NAMES in `folder`; returns their workdirs and summaries."""
    changes = ({}, {"corruption__mask_ratio": 0.25, "evaluation__every": 2})
    paths = [folder / name for name in NAMES]
    return paths, [train.run(tiny(**c), str(p)) for c, p in zip(changes, paths, strict=True)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, one_device):
    return two_runs(tmp_path_factory.mktemp("runs"))


def report(paths, workdir=None, **changes):
    c = report_config.get_config()
    c.checkpoint = ",".join(map(str, paths))
    for key, value in changes.items():
        section, leaf = key.split("__")
        c[section][leaf] = value
    return job.run(c, None if workdir is None else str(workdir))


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """The report of both runs, with what tells of their logs, figures, and pictures; tests/analysis/ has the rest."""
    folder = tmp_path_factory.mktemp("compared")
    return folder, report(
        runs[0], folder, report__sections=("overview", "recipes", "pictures", "details", "neighbours")
    )


class Page(HTMLParser):
    """What is in a page; raises where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.cells, self.text = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self._see(tag, dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self._see(tag, dict(attrs))

    def _see(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs[k] for k in ("src", "href", "xlink:href", "srcset", "action", "data") if k in attrs]
        if tag in ("td", "th"):
            self.cells.append(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(folder):
    return (folder / "report.html").read_text(encoding="utf-8"), json.loads((folder / "report.json").read_text())


def test_training_leaves_a_report(runs):
    paths, summaries = runs
    for path, summary in zip(paths, summaries, strict=True):
        html, numbers = read(path)
        assert summary["report"] == str(path / "report.html")
        assert json.loads((path / "summary.json").read_text())["report"] == summary["report"]
        assert "svg" in Page(html).tags and "img" in Page(html).tags
        assert numbers["left_out"] == {} and [s["title"] for s in numbers["sections"]] == [
            "Overview",
            "Pictures",
            "Curves and settings",
        ]
        assert numbers["sections"][0]["numbers"][path.name]["summary"]["probe_top1"] == summary["probe_top1"]


def test_pages_need_nothing_but_themselves(runs, compared):
    check_needs_nothing(*runs[0], compared[0])


@pytest.mark.slow
def test_a_report_with_all_sections_needs_nothing_but_itself(runs, tmp_path):
    few = dict(latents=32, patch_sizes=(1,), mask_ratios=(0.25, 0.5, 0.75), rop_ratios=(0.25, 0.5), side=8)
    few = {f"align__{key}": x for key, x in few.items()}
    result = report(runs[0], tmp_path, report__sections=("all",), whitebox__images=16, **few)
    assert list(result["left_out"]) == [SPEED] and "kept 4 checkpoints" in result["left_out"][SPEED]
    assert len(read(tmp_path)[1]["sections"]) > 8
    check_needs_nothing(tmp_path)


def check_needs_nothing(*folders):
    """Each link leads into the page itself."""
    for folder in folders:
        html, _ = read(folder)
        found = Page(html)
        assert len(found.ids) == len(set(found.ids)) > 50
        assert len(found.links) > 50
        for link in found.links:
            assert link.startswith(("#", "data:")), link
            assert not link.startswith("#") or link[1:] in found.ids, link
        assert "http:" not in html and "https:" not in html and "@import" not in html
        assert all(part.startswith("#") and part.split(")")[0][1:] in found.ids for part in html.split("url(")[1:])


def test_names_are_escaped(compared):
    html, _ = read(compared[0])
    found = Page(html)
    assert found.tags.count("script") == 1  # the page's own
    for name in NAMES:
        assert name not in html and "".join(found.text).count(name) > 5


def test_numbers_and_tables_are_those_of_the_summaries(runs, compared):
    html, numbers = read(compared[0])
    overview = numbers["sections"][0]
    cells = {c["data-number"] for c in Page(html).cells if "data-number" in c}
    tables = {t["caption"]: t for section in numbers["sections"] for t in section["tables"]}
    scores = tables["Scores at the end of training."]
    assert scores["columns"] == ["run", "what", "probe %", "k-NN %"]
    found = {(row[0], row[1]): row[2:] for row in scores["rows"]}
    for name, summary in zip(NAMES, runs[1], strict=True):
        for key, value in overview["numbers"][name]["summary"].items():
            assert value == summary[key], key
        for what, suffix in (("trained encoder", ""), ("untrained encoder", "_untrained"), ("raw pixels", "_pixels")):
            expected = [100 * summary[k + suffix] for k in ("probe_top1", "knn_top1")]
            assert found[name, what] == expected and {repr(x) for x in expected} <= cells
        assert repr(summary["loss"]) in cells
    verdict = next(t for caption, t in tables.items() if caption.startswith("The runs."))
    assert [row[:3] for row in verdict["rows"]] == [[name, "reconstruction", "crate"] for name in NAMES]
    for name, row in zip(NAMES, verdict["rows"], strict=True):
        summary = runs[1][NAMES.index(name)]
        knn = dict(zip(verdict["columns"], row, strict=True))["k-NN %"]
        assert knn["value"] == 100 * summary["knn_top1"] and knn["low"] < knn["value"] < knn["high"]
        assert not knn["best"] and knn["high"] - knn["low"] > 10  # of a few dozen images
    settings = next(t for caption, t in tables.items() if caption.startswith("Settings"))
    assert settings["columns"] == ["config", *NAMES]
    assert settings["rows"] == [["corruption.mask_ratio", 0.5, 0.25], ["evaluation.every", 0, 2]]


@pytest.mark.parametrize(("second", "best"), [(Estimate(50.0, 46.0, 54.0), [False] * 3), (22.5, [False] * 2)])
def test_a_score_is_best_where_its_interval_says_so(second, best):
    """Older records have no interval; one such score beside others gives none of them a mark."""
    first, third = Estimate(45.0, 41.0, 49.0), Estimate(30.0, 27.0, 33.0)
    assert [x.best for x in logged._marked([first, second, third]) if isinstance(x, Estimate)] == best
    assert [x.best for x in logged._marked([third, None, first]) if x] == [False, True]


def test_what_belongs_to_a_run_is_marked(compared):
    html, _ = read(compared[0])
    for number, name in enumerate(NAMES):
        assert f'<tr data-run="{number}"' in html
        assert f' data-run="{number}"><button type="button">{escape(name)}</button></th>' in html  # a column
        assert f'<g data-run="{number}"' in html  # a line
        assert f'<button type="button" aria-pressed="true" value="{number}"' in html
    alone = Section("S", "", (Figure("f", plot("a")),), (Table("t", ("run", "a"), (("a", 1),)),))
    assert 'data-run="' not in page.render("one", {"a": "a"}, [alone], {}).replace("`[data-run=", "")


def test_what_is_about_one_run_is_hidden_with_it():
    picture, rows = np.zeros((8, 8, 3), np.uint8), (("x", 1),)
    figures = tuple(Figure(c, picture) for c in ("b$x: seen", "a, class 1", "a and b$x: shared"))
    tables = tuple(Table(c, ("x", "y"), rows) for c in ("a: own", "ab: of nobody"))
    html = page.render("two", {"a": "a", "b$x": "b"}, [Section("S", "", figures, tables)], {})
    assert re.findall(r'<figure class="picture"(.*?) style', html) == [' data-run="1"', ' data-run="0"', ""]
    assert re.findall(r'<div class="table scroll"(.*?) tabindex', html) == [' data-run="0"', ""]
    assert re.findall(r'<p class="table-name" id="[^"]*"(.*?)>', html) == [' data-run="0"', ""]


def test_a_folder_of_runs_is_all_of_them(runs, tmp_path):
    """Such as a sweep's, where a run may have failed before it saved anything."""
    sweep = tmp_path / "sweep"
    for name, run in zip(("lam=1,seed=0", "lam=2,seed=0"), runs[0], strict=True):
        shutil.copytree(run, sweep / name)
    (sweep / "lam=3,seed=0").mkdir()
    result = report([sweep], report__sections=("overview",))
    assert result["report"] == str(sweep / "report.html")
    assert list(read(sweep)[1]["runs"]) == ["lam=1,seed=0", "lam=2,seed=0"]
    report([sweep, runs[0][1]], tmp_path / "w", report__sections=("overview",))
    assert len(read(tmp_path / "w")[1]["runs"]) == 3


def test_slow_sections_say_that_they_begin_and_how_long_they_took(monkeypatch, caplog):
    caplog.set_level("INFO")
    moments = iter((1.0, 3.0, 10.5))
    monkeypatch.setattr(job.time, "monotonic", lambda: next(moments))
    figures = ()
    early = job.Analysis("E", lambda _: Section("Early", "", figures), False, needs_runs=False, folded=False)
    monkeypatch.setitem(job.SECTIONS, "theory", early)
    monkeypatch.setitem(
        job.SECTIONS, "views", job.Analysis("Seen", lambda _: Section("Seen", "text"), needs_runs=False)
    )
    kept = []
    sections, missing = job.analyse([], ["theory", "views"], lambda s, missing: kept.append((len(s), missing)))
    assert [s.title for s in sections] == ["Early", "Seen"] and not missing
    assert [s.folded for s in sections] == [False, True]
    assert kept == [(1, {"Seen": "not computed yet"})]  # a page for the reader, and for whoever stops the command
    assert [r.getMessage() for r in caplog.records] == ["Seen ...", "Seen took 7.5 s"]
    for count in (4, 5):  # as many pictures as a sweep has runs
        figures = (Figure("f", np.zeros((1, 1, 3), np.uint8)),) * count
        monkeypatch.setattr(job.time, "monotonic", lambda: 0.0)
        assert [s.folded for s in job.analyse([], ["theory", "views"])[0]] == [count == 5, True]


def test_a_report_that_is_stopped_leaves_an_earlier_one_whole(runs, tmp_path, monkeypatch):
    def section(subjects):
        if stopped:
            raise KeyboardInterrupt
        return Section("Seen", f"time {times}")

    monkeypatch.setitem(job.SECTIONS, "views", job.Analysis("Seen", section))
    pages = []
    for times, stopped in enumerate([True, False, True, False]):
        with pytest.raises(KeyboardInterrupt) if stopped else contextlib.nullcontext():
            report(runs[0][:1], tmp_path, report__sections=("details", "views"))
        pages.append([*(s["title"] for s in read(tmp_path)[1]["sections"]), *re.findall(r"time \d", read(tmp_path)[0])])
        assert (tmp_path / job.PARTIAL).exists() == (times == 2)
    first = "Curves and settings"
    assert pages == [[first], [first, "Seen", "time 1"], [first, "Seen", "time 1"], [first, "Seen", "time 3"]]


def test_a_figure_is_drawn_once_however_often_the_page_is_written(runs, tmp_path, monkeypatch):
    drawn = []

    class Counted(Plot):
        def savefig(self, *args, **kwargs):
            drawn.append(self.get_label())
            super().savefig(*args, **kwargs)

    def seen(title):
        figure = Counted(figsize=(2, 1))
        figure.set_label(title)
        return job.Analysis(title, lambda _: Section(title, "", (Figure(f"figure of {title}", figure),)))

    for name in ("neighbours", "completion", "views"):
        monkeypatch.setitem(job.SECTIONS, name, seen(name))
    report(runs[0][:1], tmp_path, report__sections=("neighbours", "completion", "views"))
    assert drawn == ["neighbours", "completion", "views"]
    assert all(f"<figcaption>figure of {name}</figcaption>" in read(tmp_path)[0] for name in drawn)


def test_a_page_that_grew_is_the_page_that_was_drawn_at_once():
    def sections():
        return [Section(title, "", (Figure("f", plot()),)) for title in ("One", "Two")]

    growing, kept = sections(), {}
    page.render("t", {"r": "r"}, growing[:1], {"Two": "not computed yet"}, kept)
    assert page.render("t", {"r": "r"}, growing, {}, kept) == page.render("t", {"r": "r"}, sections(), {})


def test_test_images_stand_beside_the_training_images_nearest_to_them(runs, tmp_path):
    """As the cosines of the run's own features say; a set is nearest to itself."""
    report(runs[0][:1], tmp_path, report__sections=("neighbours",))
    html, numbers = read(tmp_path)
    [found] = numbers["sections"][0]["numbers"].values()
    encoder = crate_jax.load(runs[0][0])
    train, test = (data.open_split(encoder.config, split) for split in ("train", "eval"))
    place = [{source.name(i): i for i in range(len(source))} for source in (train, test)]
    chosen = [place[1][name] for name in found["test"]]
    features = [encoder.features(source) for source in (train, test)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in features]
    cosine = unit[1][chosen] @ unit[0].T
    want = np.sort(cosine, axis=1)[:, ::-1][:, : neighbours.NEAREST]
    assert want.shape == (5, 5) and want[:, -1].max() < 1 - 1e-6
    np.testing.assert_allclose(found["cosine"], want, atol=1e-5)
    rows = [[place[0][name] for name in row] for row in found["nearest"]]
    np.testing.assert_allclose(np.take_along_axis(cosine, np.array(rows), axis=1), want, atol=1e-5)
    labels = train.labels_of(np.array(rows).ravel()).reshape(5, 5) == test.labels_of(np.array(chosen))[:, None]
    assert (html.count("✓") - 1, html.count("✗") - 1) == (labels.sum(), (~labels).sum())  # and once in the text
    assert html.count("data:image/png") == 30


def test_without_an_evaluation_split_an_image_is_not_its_own_neighbour(runs):
    """Of five images, each of its own class, all others are neighbours."""
    encoder = crate_jax.load(runs[0][0])

    class Five(SyntheticSource):
        def __len__(self) -> int:
            return 5

    five = Five("train", (8, 8))
    mesh = sharding.make_mesh(1, 1)
    config = ConfigDict(encoder.config.to_dict())
    section = neighbours.section([Subject("a", config, encoder.params, None, five, None, mesh)])
    assert section.figures[0].caption == "a: training images (left), and their nearest training images."
    found = section.numbers["a"]
    assert sorted(found["test"]) == sorted(map(five.name, range(5)))
    for own, nearest, cosine in zip(found["test"], found["nearest"], found["cosine"], strict=True):
        assert sorted([own, *nearest]) == sorted(found["test"]) and np.isfinite(cosine).all()
    drawn = svg.element(section.figures[0].content, "f", (), "")[0]
    assert drawn.count("✗") == 20 and "✓" not in drawn


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_neighbours_of_images_of_any_channels_are_drawn(channels, monkeypatch):
    """Four are not red, green, blue and a transparency."""
    image = np.full((1, 8, 8, channels), 90, np.uint8)
    monkeypatch.setattr(neighbours.data, "eval_images", lambda *_: (image, None))
    source, c = SyntheticSource("train", (8, 8)), quickstart.get_config("debug")
    found = neighbours.Found(np.array([0]), np.array([[1]]), np.array([[0.5]]))
    axes = neighbours.draw(c, source, source, found).axes
    assert [ax.images[0].get_array().shape[-1] for ax in axes] == [3, 3]


def test_a_section_that_needs_no_run_is_had_without_one(tmp_path, monkeypatch):
    """As a flag gives them, names of sections are one text."""
    lone = Section("Alone", "", tables=(Table("t", ("x",), ((1,),)),))
    monkeypatch.setitem(job.SECTIONS, "theory", job.Analysis("T", lambda _: lone, False, needs_runs=False))
    c = report_config.get_config()
    c.report.sections = ("theory",)
    assert job.run(c, str(tmp_path))["left_out"] == {}
    assert [s["title"] for s in read(tmp_path)[1]["sections"]] == ["Alone"] and "<h1>Alone</h1>" in read(tmp_path)[0]
    with pytest.raises(ConfigError, match="--workdir is missing"):
        job.run(c, None)
    c.report.sections = ("theory,overview",)
    with pytest.raises(ConfigError, match="config.checkpoint='': must name"):
        job.run(c, str(tmp_path))
    assert job._chosen(c) == ["overview", "theory"]
    c.report.sections = ()
    assert "theory" not in job._chosen(c)
    c.report.sections = ("all,theory",)
    assert "theory" in job._chosen(c) and "speed" in job._chosen(c)


@pytest.fixture
def asked(monkeypatch):
    """The names of the analyses that a report asks for, none of which computes."""
    names = []
    for name, a in job.SECTIONS.items():
        if a.needs_images:
            stub = lambda _, name=name: names.append(name)  # noqa: E731
            monkeypatch.setitem(job.SECTIONS, name, dataclasses.replace(a, run=stub))
    return names


def test_a_report_computes_nothing_unasked(runs, tmp_path, asked, monkeypatch, caplog):
    """It does not even open the images, and says which flag adds the rest and about how long that takes."""
    caplog.set_level("INFO")
    with monkeypatch.context() as m:
        m.setattr(job, "_open", lambda _: pytest.fail("opened"))
        assert report(runs[0], tmp_path)["left_out"] == {}
    assert asked == [] and [s["title"] for s in read(tmp_path)[1]["sections"]][0] == "Overview"
    [line] = [r.getMessage() for r in caplog.records if "report.sections" in r.getMessage()]
    assert "--config.report.sections=all adds all (about 2 minutes for 2 runs on two idle CPU cores)" in line
    assert "lacks neighbours, completion, whitebox, views, collapse, alignment, speed, which" in line
    assert escape(line) in re.sub("</?code>", "", read(tmp_path)[0]) and 'href="#more"' in read(tmp_path)[0]
    of_training = read(runs[0][0])[0]
    assert "<code>--config.report.sections=all</code> adds all (about 2 minutes on two" in of_training


def test_a_report_of_all_sections_computes_them_and_says_before_how_long(runs, tmp_path, asked, caplog):
    caplog.set_level("INFO")
    report(runs[0], tmp_path, report__sections=("all",))
    assert asked == ["neighbours", "completion", "whitebox", "views", "collapse", "alignment", "speed"]
    said = [r.getMessage() for r in caplog.records]
    before = said.index("the sections that compute from images: about 2 minutes for 2 runs on two idle CPU cores")
    assert before < said.index("Nearest neighbours ...")
    assert "This report lacks" not in caplog.text and 'href="#more"' not in read(tmp_path)[0]


def test_what_all_processes_miss_ends_no_report(monkeypatch, caplog):
    """With several processes another error does: the others may be in the middle of the section."""
    caplog.set_level("INFO")
    monkeypatch.setattr(job.distributed, "processes", lambda: 2)

    def missing(error):
        def section(_):
            raise error

        monkeypatch.setitem(job.SECTIONS, "views", job.Analysis("Seen", section, needs_runs=False))
        return job.analyse([], ["views"])[1]

    assert missing(Absent("no run has a decoder")) == {"Seen": "no run has a decoder"}
    assert caplog.records[-1].getMessage() == "Seen: left out, no run has a decoder"
    with pytest.raises(UserError, match="a disk"):
        missing(UserError("a disk"))


def test_a_shorter_report_leaves_what_an_earlier_one_has_computed(tmp_path):
    one, two = (Section(title, "") for title in ("Overview", "Alignment"))
    for sections in ([one, two], [one], [one]):
        job.write(tmp_path, {"r": "r"}, sections, {})
    for name, count in (("report", 1), ("report.earlier", 2)):
        assert len(json.loads((tmp_path / f"{name}.json").read_text())["sections"]) == count
        assert ("Alignment" in (tmp_path / f"{name}.html").read_text()) == (count == 2)


def test_estimates_grow_with_runs_images_and_encoders():
    """Runs on the same images share the alignment; a ViT-B at 224 px takes hours on two cores."""
    config = configs.base()
    config.encoder.name, config.encoder.patch_size, config.data.image_size = "vit", 16, (224, 224)
    small = ConfigDict(config.to_dict())
    small.data.image_size = (32, 32)

    def said(chosen, *members):
        return job.about(
            chosen, [Subject("", c, {"encoder": np.broadcast_to(0.0, n)}, None, None, None, None) for c, n in members]
        )

    other = ConfigDict(small.to_dict())
    other.data.source = "scenes"
    assert said(["alignment"], (small, 10)) == "about 1 minute on two idle CPU cores"
    assert said(["alignment"], *[(small, 10)] * 12) == "about 2 minutes for 12 runs on two idle CPU cores"
    assert said(["alignment"], (small, 10), (other, 10)) == "about 3 minutes for 2 runs on two idle CPU cores"
    assert said(["neighbours"], (config, 86 * 10**6)) == "about 23 minutes on two idle CPU cores"
    assert said(["collapse"], (config, 86 * 10**6)) == "about 3 hours on two idle CPU cores"
    subject = Subject("", config, {}, None, None, None, None)  # as training writes its page
    assert job.about(["neighbours"], [subject]) == "about 22 minutes on two idle CPU cores"


def test_the_fastest_run_is_marked_where_speeds_compare(tmp_path):
    def verdict(*summaries):
        logs = {str(i): records.Logged([], s, [], []) for i, s in enumerate(summaries)}
        subjects = [Subject(name, configs.base(), {}, None, None, None, None) for name in logs]
        for i, s in enumerate(subjects):
            s.config.seed, s.config.encoder.depth = i, depths[i]
        return [isinstance(speed, Best) for speed in logged._fastest(subjects, logs).values()]

    depths = range(1, 9)
    one, fast, near = ({"images_per_sec": x, "devices": "1 x cpu"} for x in (100.0, 120.0, 115.0))
    assert verdict(one, fast, one) == [False, True, False]
    assert verdict(one, fast, near) == [False] * 3 and verdict(fast) == [False] and verdict({}, {}) == [False] * 2
    assert verdict(one, fast | {"devices": "1 x gpu"}) == [False] * 2 == verdict(one, {"images_per_sec": 900.0})
    depths = [2, 2, 3]  # two seeds of a recipe, and another one
    assert verdict(one, fast) == [False] * 2 and verdict(fast, one, one) == [False] * 3
    assert verdict(near, fast, one) == [False, True, False]
    table = Table("t", ("run", "images/s"), (("a", Best(120.0)), ("b", 100.0)))
    html = page.render("t", {"r": "r"}, [Section("S", "", tables=(table,))], {})
    assert '<td data-number="120.0" title="120.0" class="number"><strong>120</strong></td>' in html
    assert job._plain(Best(120.0)) == 120.0


def test_a_run_without_scores_is_named():
    scored, silent, unlabelled = {"probe_top1": 0.4}, {"steps": 9}, {"knn_top1": None, "probe_top1": None}
    logs = {str(i): records.Logged([], s, [], []) for i, s in enumerate((scored, silent, unlabelled, {}))}
    text = logged._text(logs)
    assert "Without scores, as their images lack labels or an evaluation split: 1, 2." in text
    assert "Without scores" not in logged._text({"0": logs["0"]})


def test_settings_are_those_that_a_run_reads():
    """Seen: a resnet18 had encoder.depth 12 and a rop_ratio, beside a CRATE under a mask."""
    crate, cnn, other = (configs.base() for _ in range(3))
    crate.encoder.depth, crate.corruption.rop_ratio, crate.corruption.mask_ratio = 2, 0.3, 0.6
    cnn.encoder.name, cnn.method, cnn.decoder.depth, cnn.seed = "resnet18", "vicreg", 5, 4
    other.encoder.depth = 3
    subjects = [Subject(n, c, {}, None, None, None, None) for n, c in (("a", crate), ("b", cnn), ("c", other))]
    logs = {s.name: records.Logged([], {}, [], []) for s in subjects}
    rows = {key: values for key, *values in logged._settings(subjects, logs).rows}
    assert rows["encoder.depth"] == [2, None, 3] and rows["corruption.mask_ratio"] == [0.6, None, 0.75]
    assert rows["seed"] == [0, 4, 0] and not {"corruption.rop_ratio", "decoder.depth"} & set(rows)
    alone = logged._settings(subjects[:1], {"a": logs["a"]})
    assert alone.columns == ("config", "this run", "default")
    assert alone.rows == (("corruption.mask_ratio", 0.6, 0.75), ("encoder.depth", 2, 12))


def test_what_telemetry_saw_of_the_layers_is_drawn(tmp_path):
    lines = [{"step": 10 * i, "loss": 1.0} for i in range(1, 8)]
    for line in lines:
        line |= {f"whitebox/encoder/nonzero/{layer:02d}": 0.1 * layer for layer in range(1, 13)}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (figure,) = logged._layers({"a": records.read(tmp_path), "b": records.read(None)})
    assert figure.caption.startswith("a: share of the entries that are not 0")
    drawn = figure.content.axes[0].lines
    assert [line.get_label() for line in drawn] == [f"step {step}" for step in (10, 30, 40, 50, 70)]
    assert all(list(line.get_xdata()) == list(range(1, 13)) for line in drawn)
    np.testing.assert_allclose(drawn[0].get_ydata(), 0.1 * np.arange(1, 13))


def test_the_report_of_one_run_goes_to_the_run(runs, tmp_path):
    run = shutil.copytree(runs[0][0], tmp_path / "run")
    (run / "report.html").unlink()
    result = report([run / "checkpoints"], report__sections=("overview",))
    paths = {"report": str(run / "report.html"), "json": str(run / "report.json")}
    assert result == {**paths, "left_out": {}, "sections": ["Overview"]}
    assert read(run)[1]["runs"] == {"run": f"step 4 of {run / 'checkpoints'}"}
    with pytest.raises(ConfigError, match="--workdir is missing: it says where the report goes"):
        report([run, runs[0][1]])


def test_a_report_about_a_step_is_about_that_step_and_leaves_the_report_of_its_run(runs, tmp_path):
    """The records of the run are those of its end; its own report stays where it is."""
    run, whole = runs[0][1], (runs[0][1] / "report.html").read_bytes()
    paths = [run / "checkpoints" / "2", run / "checkpoints" / "4", run]
    for path in paths[:2]:
        with pytest.raises(ConfigError, match=f"--workdir is missing: .* about {re.escape(str(path))} goes; the run"):
            report([path])
    assert job.names(list(map(str, paths))) == [f"{run.name}/checkpoints/2", f"{run.name}/checkpoints/4", run.name]
    report(paths, tmp_path / "w", report__sections=("overview",))
    numbers = read(tmp_path / "w")[1]
    assert numbers["runs"][f"{run.name}/checkpoints/2"] == f"step 2 of {run}"
    table = next(s for s in numbers["sections"] if s["title"] == "Overview")["tables"][0]
    told = {row[0]: row[1:] for row in table["rows"]}
    assert told[paths[0].relative_to(run.parent).as_posix()][2:] == [None] * 4 != told[run.name][2:]
    assert (run / "report.html").read_bytes() == whole
    with pytest.raises(CheckpointError, match="holds no checkpoint of step 3; it holds 4, 2"):
        report([run / "checkpoints" / "3"], tmp_path / "w")


def of_images(subjects):
    rows = tuple((s.name, len(s.train), len(s.test)) for s in subjects)
    return Section("Sizes", "", tables=(Table("Sizes", ("run", "training", "evaluation"), rows),))


def refuses(subjects):
    raise DataError("these images have no labels")


def image_folder(folder):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cats", "dogs"):
            for i in range(16):
                pictures.save_png(folder / split / name / f"{i}.png", rng.integers(0, 256, (8, 8, 3), np.uint8))
    return folder


@pytest.mark.slow
def test_what_cannot_be_said_is_named(runs, tmp_path, monkeypatch):
    """Of two runs, the images of one are gone, and an analysis refuses: the rest is there."""
    monkeypatch.setitem(job.SECTIONS, "sizes", job.Analysis("Sizes", of_images))
    monkeypatch.setitem(job.SECTIONS, "refuses", job.Analysis("Classes <i>", refuses, needs_images=False))
    images = image_folder(tmp_path / "images")
    train.run(tiny(data__source=f"folder:{images}"), str(tmp_path / "gone"))
    paths = [runs[0][1], tmp_path / "gone"]
    everything = dict(report__sections=("all",))
    assert report(paths, tmp_path / "w", **everything)["left_out"].keys() == {"Classes <i>", SPEED}
    images.rename(tmp_path / "elsewhere")
    left_out = report(paths, tmp_path / "w", **everything)["left_out"]
    assert left_out.keys() == {"what needs the images of gone", "Classes <i>", SPEED}
    assert str(images) in left_out["what needs the images of gone"]
    html, numbers = read(tmp_path / "w")
    assert numbers["left_out"] == left_out and "<b>Classes &lt;i&gt;</b>: these images have no labels" in html
    sizes = next(s for s in numbers["sections"] if s["title"] == "Sizes")
    assert sizes["tables"][0]["rows"] == [[NAMES[1], 1437, 360]]
    alone = report(paths[1:], tmp_path / "w", **everything)["left_out"]
    assert alone["Sizes"] == "there are no readable images"
    named = report(paths, tmp_path / "w", data__source=f"folder:{tmp_path}/elsewhere", report__sections=("sizes",))
    assert named["left_out"] == {}
    sections = read(tmp_path / "w")[1]["sections"]
    assert [s["tables"][0]["rows"] for s in sections] == [[[NAMES[1], 32, 32], ["gone", 32, 32]]]


@pytest.mark.parametrize(
    ("checkpoint", "changes", "error", "message"),
    [
        ("", {}, ConfigError, "config.checkpoint='': must name the workdirs"),
        ("{run},", {}, ConfigError, "must name the workdirs of runs or files of weights, separated by commas"),
        ("{run},{run}", {}, ConfigError, "is listed twice"),
        ("{run},{run}/checkpoints", {}, ConfigError, "are the same run"),
        ("{run},{run}x", {}, CheckpointError, "x: no such folder"),
        (
            "{run}",
            {"report__sections": ("colours",)},
            ConfigError,
            "unknown section 'colours'; must be all, or one or more of overview, recipes, pictures",
        ),
    ],
)
def test_wrong_requests_are_one_line(runs, tmp_path, checkpoint, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        report([checkpoint.format(run=runs[0][1])], tmp_path / "w", **changes)
    assert "\n" not in str(caught.value) and not (tmp_path / "w" / "report.html").exists()


def test_the_command_line_says_what_is_wrong_and_where_the_report_is(runs, run_cli, tmp_path):
    command = ["--config=configs/report.py", f"--config.checkpoint={tmp_path}/none"]
    result = run_cli(command)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"error: {tmp_path}/none: no such folder" in result.stderr
    run = shutil.copytree(runs[0][0], tmp_path / "run")
    result = run_cli([command[0], f"--config.checkpoint={run}", "--config.report.sections=overview"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"report: {run}/report.html"


def test_paths_may_have_commas_of_their_own(tmp_path):
    a, b = tmp_path / "lam=1,seed=0", tmp_path / "lam=1"
    a.mkdir()
    assert job.split(f"{a},x,{a}2") == [str(a), "x", str(b), "seed=02"]
    b.mkdir()
    assert job.split(f"{a}") == [str(b), "seed=0"]  # the shortest that exists: as it is read, from the left


def test_names_are_as_short_as_they_can_be():
    assert job.names(["/r/a", "/r/b"]) == ["a", "b"]
    assert job.names(["/r/a/run", "/r/b/run"]) == ["a/run", "b/run"]


def test_a_run_keeps_its_config_and_takes_the_options_of_the_report():
    """Old keys are dropped, new ones have their default; a file of weights has no decoder and was not trained here."""
    saved = json.loads(json.dumps(tiny().to_dict()))
    saved["checkpoint"], saved["encoder"]["old"] = {"every": 3}, 1
    del saved["encoder"]["embed_norm"]
    options = report_config.get_config()
    options.checkpoint, options.report.sections, options.encoder.width = "X", ("overview",), 1000
    full = job.resolve(options, saved)
    expected = flatten(tiny()) | {"checkpoint": "X", "report.sections": ["overview"]}
    expected |= {k: v for k, v in flatten(options).items() if k.startswith(("log.", "save.", "whitebox."))}
    assert flatten(full) == expected
    options.data.source, options.data.eval_split = "folder:here", "val"
    assert job.resolve(options, saved).data.source == "folder:here"
    assert job.resolve(options, saved).data.image_size == (8, 8)
    only = {k: saved[k] for k in ("encoder", "data")}
    full = job.resolve(report_config.get_config(), only)
    assert full.job == "evaluate" and full.encoder.width % full.decoder.heads  # nobody asks for a decoder that fits
    assert configs.parts(full) == ("encoder",)


def test_a_source_that_is_unknown_here_costs_only_what_needs_images():
    saved = json.loads(json.dumps(tiny().to_dict()))
    saved["data"]["source"] = "tape:7"
    full = job.resolve(report_config.get_config(), saved)
    assert full.data.source == "tape:7"
    with pytest.raises(
        ConfigError, match="config.data.source='tape:7': must be one of scenes, digits"
    ):  # left out, not raised
        job._open(full)
    options = report_config.get_config()
    options.data.source = "tape:8"
    with pytest.raises(ConfigError, match="tape:8"):
        job.resolve(options, saved)


def test_every_key_is_of_the_run_or_of_the_report():
    """A section that does not say which cannot be made: left out, a run would show with defaults."""
    with pytest.raises(TypeError, match="of_the_run"):
        validation.Section("new", "A new section.", keys={})
    groups = {key.partition(".")[0] for key in configs.KEYS if key not in configs.OF_THE_RUN}
    assert groups == {
        "align",
        "allow_change",
        "checkpoint",
        "job",
        "log",
        "mesh",
        "report",
        "save",
        "sweep",
        "whitebox",
    }
    assert configs.KEYS.keys() == flatten(configs.base()).keys() > configs.OF_THE_RUN
    run = tiny(protocol__name="finetune_mae", whitebox__every=3, nonfinite__skip=2)
    full = job.resolve(report_config.get_config(), json.loads(json.dumps(run.to_dict())))
    assert (full.protocol.name, full.whitebox.every, full.nonfinite.skip) == ("finetune_mae", 0, 2)


def test_a_page_that_cannot_be_drawn_does_not_fail_the_run(runs, tmp_path, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(svg, "element", broken)
    run = shutil.copytree(runs[0][0], tmp_path / "run")
    for name in ("report.html", "report.json", "summary.json"):
        (run / name).unlink()
    summary = train.run(tiny(), str(run))  # the scores are computed again, and the report is drawn
    assert summary["report"] is None and "no report: RuntimeError: no fonts" in caplog.text
    assert not (run / "report.html").exists()
    caplog.clear()
    assert train.write_report(run, tiny(log__report=False), sharding.make_mesh(1, 1)) is None and not caplog.text


def test_a_run_that_is_still_going_can_be_read(runs, tmp_path):
    run = shutil.copytree(runs[0][1], tmp_path / "run")
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    result = report([run], report__sections=("overview", "recipes", "pictures", "details"))
    tables = [t for section in read(run)[1]["sections"] for t in section["tables"]]
    assert result["left_out"] == {} and "Not finished" in read(run)[0]
    table = next(t for t in tables if t["caption"].startswith("What the runs are"))
    assert dict(zip(table["columns"], table["rows"][0], strict=True))["steps"] == 4
    (run / "summary.json").write_text("{")
    broken = report([run], report__sections=("overview",))
    assert "summary.json: is not a JSON object" in broken["left_out"]["Overview"]


def test_evaluations_in_the_workdir_are_shown(tmp_path):
    lines = [{"protocol": "knn", "data": "digits", "top1": 0.25}, {"protocol": "x", "data": "d", "top1": None}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    table = logged._results({"r": records.read(tmp_path)})
    assert table.columns == ("run", "protocol", "data", "top-1 %")
    assert table.rows == (("r", "knn", "digits", 25.0), ("r", "x", "d", None))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b'{"step": 1}\n{"step": 2, "loss": "x"}\n', "line 2 is not a record"),
        ("metrics.jsonl", b'{"loss": 0.5}\n', "line 1 is not a record"),
        ("metrics.jsonl", b'{"step": 1, "loss": 1e999}\n', "line 1 is not a record"),
        ("results.jsonl", b"3\n", "line 1 is not a record"),
        ("results.jsonl", b'{"top1": [0.5]}\n', "line 1 is not a record"),
        ("results.jsonl", b'{"data": "\xff"\n', "line 1 is not a record"),
        ("summary.json", b"[" * 10**5, "is not a JSON object"),
        ("summary.json", b'{"knn_top1_pixels": "x"}', "'knn_top1_pixels' has no possible value"),
        ("summary.json", b'{"loss": true}', "'loss' has no possible value"),
        ("summary.json", b'{"probe_top1": 1.5}', "'probe_top1' has no possible value"),
        ("summary.json", b'{"test_images": 0}', "'test_images' has no possible value"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {message}"):
        records.read(tmp_path)


def test_a_pipe_is_no_record_of_a_run(tmp_path):
    """Nobody writes to it: who opened it would wait for ever."""
    for name in ("metrics.jsonl", "summary.json"):
        os.mkfifo(tmp_path / name)
    found = records.read(tmp_path)
    assert found.metrics == [] and found.summary == {}


def test_a_damaged_picture_is_named(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "grid_0000001.png").write_bytes(b"no picture")
    subject = Subject("run", configs.base(), {}, tmp_path, None, None, None)
    sections, missing = job.analyse([subject], ["pictures"])
    assert sections == [] and "grid_0000001.png: not an image in a known format; delete it" in missing["Pictures"]


def plot(label="a"):
    figure = Plot(figsize=(3, 2), layout="constrained")
    ax = figure.subplots()
    ax.plot([1, 2], [3, 4], label=label)
    ax.plot([1, 2], [4, 4], color="0.4", label="other")
    ax.plot([1, 2], [2, 4], color="#123456")
    ax.imshow(np.eye(4))
    ax.legend()
    return figure


def test_figures_take_the_colours_of_the_page():
    before = dict(matplotlib.rcParams)
    text, width = svg.element(plot("a$b"), "f1", ("a$b", "c"), 'say "<hi>"')
    assert dict(matplotlib.rcParams) == before
    assert svg.element(plot("a$b"), "f1", ("a$b", "c"), 'say "<hi>"')[0] == text
    assert width == 3 * 96
    assert "var(--c0)" in text and "currentColor" in text and "var(--paper)" in text and "#123456" in text
    assert "#000000" not in text and "#ffffff" not in text and "#666666" not in text and "<style" not in text
    assert "data:image/png" in text and "xlink" not in text and 'aria-label="say &quot;&lt;hi&gt;&quot;' in text
    assert text.count('data-run="0"') == 0  # a dollar in a label is a formula unless it is escaped
    escaped = svg.element(plot(svg.escape("a$b")), "f1", ("a$b", "c"), "")[0]
    # the line, and its sample in the legend
    assert escaped.count('data-run="0"') == 2 and 'data-run="1"' not in escaped
    assert "a$b" in escaped


@pytest.mark.parametrize(
    ("label", "number"),
    [("a", 0), ("a: 3", 0), ("_a", 0), ("_a, layer 2", 0), ("a, b", 1), ("a, b: 3", 1), ("ab", None), ("x: a", None),
     ("", None), (r"c\$", 2), ("c$", None), ("_d", 3), ("__d", 3)],
)  # fmt: skip
def test_labels_say_whose_a_line_is(label, number):
    assert svg.owner(label, ("a", "a, b", "c$", "_d")) == number


def test_ids_of_two_equal_figures_differ():
    section = Section("One", "", tuple(Figure("same", plot()) for _ in range(2)))
    found = Page(page.render("t", {"r": "r"}, [section, section], {}))
    assert len(found.ids) == len(set(found.ids))


def test_cells():
    rows = ((None, 1), (0.123456, 12345), (float("nan"), -2), (float("inf"), np.float64(1e-7)), (np.int64(3), 0))
    table = Table("<caption>", ("x", "<y>"), rows)
    html = page.render("t", {"r": "r"}, [Section("S", "", tables=(table,))], {})
    assert '<td data-empty class="number">–</td>' in html and '<td data-empty class="number">NaN</td>' in html
    assert '<td data-number="0.123456" title="0.123456" class="number">0.1235</td>' in html
    assert ">12,345</td>" in html and 'data-number="Infinity"' in html and 'data-number="1e-07"' in html
    assert "&lt;caption&gt;" in html and "&lt;y&gt;" in html and "np." not in html
    with pytest.raises(ValueError, match="1 cells under 2 columns"):
        page.render("t", {"r": "r"}, [Section("S", "", tables=(Table("", ("x", "y"), ((1,),)),))], {})


@pytest.mark.parametrize(("kind", "says"), [("views", "views that the networks"), ("reconstruction", "(I - P) x^")])
def test_the_section_of_pictures_says_what_its_kinds_show_and_no_more(kind, says, tmp_path):
    (tmp_path / "pictures").mkdir()
    pictures.save_png(tmp_path / "pictures" / f"{kind}_0000003.png", np.zeros((5, 7, 3), np.uint8))
    section = logged.pictures([Subject("r", configs.base(), {}, tmp_path, None, None, None)])
    assert [text in section.text for text in logged.DRAWN.values()] == [name == kind for name in logged.DRAWN]
    assert says in section.text


def test_pictures_are_shown_whole():
    small, large = np.zeros((8, 16, 3), np.uint8), np.full((50, 400, 3), 7, np.uint8)
    section = Section("S", "", (Figure("a", small), Figure("b", large)))
    html = page.render("t", {"r": "r"}, [section], {})
    assert 'class="small" alt="a" width="208" height="104"' in html and 'alt="b" width="400" height="50"' in html
    with pytest.raises(TypeError, match="uint8"):
        page.render("t", {"r": "r"}, [Section("S", "", (Figure("a", np.zeros((8, 8))),))], {})
