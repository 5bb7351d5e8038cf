"""The job ``report``: writes ``report.html`` and ``report.json`` about one or several checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crate_jax import __version__, data
from crate_jax.analysis import logged, neighbours, projection, recipes
from crate_jax.analysis.alignment import initialisation, section as alignment_section, speed
from crate_jax.analysis.collapse import section as collapse_section
from crate_jax.analysis.whitebox import completion, section as whitebox_section
from crate_jax.config import KEYS, OF_THE_RUN, base, validate
from crate_jax.convert import files, pretrained
from crate_jax.errors import ConfigError, DataError, UserError, escaped
from crate_jax.models import grids, representation
from crate_jax.parallel import distributed, parameters, sharding
from crate_jax.report import page
from crate_jax.report.section import Absent, Best, Cell, Estimate, Section, Subject
from crate_jax.validation import flatten, items, place
from crate_jax.workdir import bucket, checkpoint, checkpoint_files, metrics, mirror
from crate_jax.workdir.folder import expanduser, lock, readable

log = logging.getLogger(__name__)

ALL = "all"  # in config.report.sections: every section about runs
RATE = 5e10  # FLOP/s of encoders on two cores, see Cost
MAX_SHOWN = 4  # figures of a section that are not folded: those of more runs would fill many screens
HTML, JSON, PARTIAL = "report.html", "report.json", "report.partial"
EARLIER = "report.earlier"  # and .html or .json


@dataclasses.dataclass(frozen=True)
class Cost:
    """About how long a section takes, for a line that says so before it begins.

    The numbers are half the processor seconds, as of two cores. Measured: all sections of a run at 32 px, 98 s, three
    quarters of them the alignment (docs/reports.md); `collapse` of a small ResNet at 24 px, 28 s; `neighbours` of it,
    3 s, and of a ViT of 3.2 million parameters and 64 patches, 13 s, which is 8e10 FLOP/s. The other numbers only
    divide that sum. So an estimate may be wrong by a factor of two or three, above all where images load slowly.

    Attributes:
      once: seconds for each set of images, however many runs learned from it.
      each: seconds for each run.
      images: how many images pass the encoder of each run.
    """

    once: float = 0.0
    each: float = 0.0
    images: int = 0


@dataclasses.dataclass(frozen=True)
class Analysis:
    """How to make one section of the report.

    Attributes:
      title: the section's title, which the page shows if the section is missing.
      run: the function from subjects to the section; it raises UserError (Absent, if all processes know why) if the
        section is not possible, and returns None if nobody misses it.
      needs_images: whether `run` gets only subjects whose images can be read.
      needs_runs: whether the section is about runs. If it is not, it is made only if config.report.sections names it.
      folded: whether the page folds it, if it is not the only one; it always folds more than MAX_SHOWN figures.
      cost: about how long it takes.
    """

    title: str
    run: Callable[[Sequence[Subject]], Section | None]
    needs_images: bool = True
    needs_runs: bool = True
    folded: bool = True
    cost: Cost = Cost()

    @property
    def quick(self) -> bool:
        """Whether a report about runs has it unasked."""
        return self.needs_runs and not self.needs_images


# The page shows them in this order.
SECTIONS: dict[str, Analysis] = {
    "overview": Analysis("Overview", logged.section, needs_images=False, folded=False),
    "recipes": Analysis("Recipes over seeds", recipes.section, needs_images=False, folded=False),
    "pictures": Analysis("Pictures", logged.pictures, needs_images=False, folded=False),
    "details": Analysis("Curves and settings", logged.details, needs_images=False),
    "neighbours": Analysis("Nearest neighbours", neighbours.section, cost=Cost(each=3, images=2005)),
    "completion": Analysis("What was removed, restored", completion.section, cost=Cost(each=3, images=1000)),
    "whitebox": Analysis("White box", whitebox_section.section, cost=Cost(each=3, images=1000)),
    "views": Analysis("What the encoder sees", whitebox_section.pictures_section, cost=Cost(each=3, images=100)),
    "collapse": Analysis("Collapse", collapse_section.section, cost=Cost(each=15, images=4096 + 10 * 1024)),
    "alignment": Analysis("Alignment", alignment_section.section, cost=Cost(once=70, each=5, images=8000)),
    "speed": Analysis("What is learned when", speed.section, cost=Cost(each=5, images=8000)),
    "initialisation": Analysis("Theorem 2", lambda _: initialisation.section(), needs_images=False, needs_runs=False),
    "theory": Analysis("Theorem 3", lambda _: whitebox_section.theory_section(), needs_images=False, needs_runs=False),
    "projection": Analysis("Projections and masks", lambda _: projection.section(), False, needs_runs=False),
}

DATA_KEYS = (
    "source",
    "data_dir",
    "image_column",
    "label_column",
    "train_split",
    "eval_split",
)  # read from the report's config if it names a source


def run(config: ConfigDict, workdir: str | None) -> dict[str, Any]:
    """Writes the report about `config.checkpoint`.

    Args:
      config: the report's own config.
      workdir: the folder for the two files; None: the run's folder, if there is only one run and no step is named.

    Returns:
      the paths ``report`` and ``json``; ``left_out``: {title of a missing section: why it is missing}; ``sections``:
      the titles of the others.

    Raises:
      UserError: a checkpoint cannot be read, or the config or the data cannot be used.
    """
    chosen = _chosen(config)
    without_runs = not config.checkpoint and not any(SECTIONS[name].needs_runs for name in chosen)
    given = [] if without_runs else split(config.checkpoint)
    paths = [run for path in given for run in expand(path)]
    if not workdir:
        if len(given) != 1 or (paths == given and files.weights_file(given[0])):
            raise ConfigError("--workdir is missing: it says where the report goes, unless the report is about one run")
        if checkpoint.of_step(given[0]):
            raise ConfigError(
                f"--workdir is missing: it says where the report about {given[0]} goes; the run's folder has the "
                "report of the whole run"
            )
        workdir = _run_of(given[0])
    sharding.use_cpu_cores(config.evaluation.batch_size, 1)
    sharding.all_devices()  # raises if there are no devices
    loaded = [pretrained.load(path, "config.checkpoint") for path in paths]
    mesh = sharding.make_mesh(jax.device_count(), 1)
    missing: dict[str, str] = {}
    subjects = []
    with_images = any(SECTIONS[name].needs_images for name in chosen)
    for path, name, encoder in zip(paths, names(paths), loaded, strict=True):
        full = resolve(config, encoder.config)
        train: data.Source | None = None
        test: data.Source | None = None
        problem = ""
        try:
            train, test = _open(full) if with_images else (None, None)
        except UserError as e:
            problem = str(e)
        if distributed.max_over_processes(int(bool(problem))):  # all processes must leave out the same
            train, test = None, None
            missing[f"what needs the images of {name}"] = problem or "another process cannot read them"
            log.warning("%s: its images cannot be read: %s", name, problem or "by another process")
        # The records of a run are those of its end, and say nothing of one step.
        home = None if files.weights_file(path) or checkpoint.of_step(path) else _home(path)
        subjects.append(Subject(name, full, encoder.params, home, train, test, mesh))
    with lock(workdir) as folder:
        origin = {s.name: encoder.name for s, encoder in zip(subjects, loaded, strict=True)}
        drawn: dict[str, str] = {}
        more = offer(chosen, subjects)

        def keep(sections: Sequence[Section], left_out: Mapping[str, str]) -> None:
            write(folder, origin, sections, {**missing, **left_out}, more, whole=False, drawn=drawn)

        usable = [s for s in subjects if s.train is not None]  # none if no chosen section needs images
        if usable:
            log.info("the sections that compute from images: %s", about(chosen, usable))
        sections, left_out = analyse(subjects, chosen, keep)
        written = write(folder, origin, sections, {**missing, **left_out}, more, drawn=drawn)
    if more:
        log.info("%s", more)
    return written


def show(result: dict[str, Any]) -> None:
    """Prints the report's path, and which sections are missing.

    Raises:
      UserError: all are.
    """
    if result["left_out"] and not result["sections"]:
        title, why = next(iter(result["left_out"].items()))
        raise UserError(f"config.report.sections: none of them could be made; {title}: {why}")
    for title, why in result["left_out"].items():
        print(escaped(f"left out: {title}: {why}"))
    print(escaped(f"report: {mirror.shown(result['report'])}"))


def split(checkpoint: str) -> list[str]:
    """The paths in a comma-separated text; an existing path may itself contain commas.

    Raises:
      ConfigError: a path is empty, or is listed twice.

    >>> split("runs/a,runs/b")
    ['runs/a', 'runs/b']
    """
    parts, paths = checkpoint.split(","), []
    while parts:
        joined = [",".join(parts[:n]) for n in range(1, len(parts) + 1)]
        path = next((p for p in joined if p and not bucket.is_address(p) and expanduser(p).exists()), parts[0])
        parts = parts[path.count(",") + 1 :]
        paths.append(path)
    for path in paths:
        if not path:
            raise ConfigError(
                f"config.checkpoint={checkpoint!r}: must name the workdirs of runs or files of weights, separated by "
                "commas"
            )
        if paths.count(path) > 1:
            raise ConfigError(f"config.checkpoint={checkpoint!r}: {path} is listed twice")
    return paths


def expand(path: str) -> list[str]:
    """The paths of the runs in a folder of runs (such as a sweep's) that saved a checkpoint; else the path itself."""
    if checkpoint.of_step(path):
        return [path]
    folder = readable(path)
    if not folder.is_dir() or checkpoint_files.steps(folder / checkpoint.FOLDER) or checkpoint_files.steps(folder):
        return [path]
    runs = [str(run) for run in sorted(folder.iterdir()) if checkpoint_files.steps(run / checkpoint.FOLDER)]
    return runs or [path]


def names(paths: Sequence[str]) -> list[str]:
    """A name for each path: its last part, or as many last parts as make all names different.

    RUN/checkpoints/STEP counts as one part.

    Raises:
      ConfigError: two paths are the same run.

    >>> names(["a/run", "b/run"])
    ['a/run', 'b/run']
    """
    if not paths:
        return []
    whole = [_places(path) for path in paths]
    for depth in range(1, max(map(len, whole)) + 1):
        short = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(short)) == len(short):
            return short
    raise ConfigError(f"config.checkpoint: {' and '.join(paths)} are the same run")


def _places(path: str) -> tuple[str, ...]:
    """The parts of a run's path, the last one with the step if `path` names one."""
    named = checkpoint.of_step(path)
    if named is None:
        return _home(path).parts
    *above, last = readable(*named).absolute().parts
    return *above, f"{last}/{checkpoint.FOLDER}/{named[1]}"


def _home(path: str) -> Path:
    """The run's folder, also if `path` is its folder of checkpoints; of a run in a bucket that of its copy."""
    return readable(_run_of(path)).absolute()


def _run_of(path: str) -> str:
    """The run's workdir, a path or an address, also if `path` is its folder of checkpoints."""
    if bucket.is_address(path):
        return path.rstrip("/").removesuffix(f"/{checkpoint.FOLDER}")
    whole = expanduser(path).absolute()
    is_inside = whole.name == checkpoint.FOLDER and whole.is_dir()
    return str(whole.parent if is_inside else whole)


def _chosen(config: ConfigDict) -> list[str]:
    given = items(config.report.sections)
    unknown = [name for name in given if name not in SECTIONS and name != ALL]
    if unknown:
        raise ConfigError(
            f"config.report.sections: unknown section {unknown[0]!r}; must be {ALL}, or one or more of "
            f"{', '.join(SECTIONS)}"
        )
    if not given:
        return _quick()
    return [name for name, a in SECTIONS.items() if name in given or (ALL in given and a.needs_runs)]


def _quick() -> list[str]:
    """The sections that a report has unasked: those about runs that read only what the runs wrote."""
    return [name for name, a in SECTIONS.items() if a.quick]


def offer(chosen: Sequence[str], subjects: Sequence[Subject]) -> str:
    """The sections about runs that compute and are not chosen, the flag that adds them, and about how long they take.

    Returns:
      one line; empty if there is nothing more, or no run.
    """
    rest = [name for name, a in SECTIONS.items() if a.needs_runs and not a.quick and name not in chosen]
    if not rest or not subjects:
        return ""
    every = [name for name, a in SECTIONS.items() if a.needs_runs]
    return (
        f"This report lacks {', '.join(rest)}, which compute from the images. Job report with "
        f"--config.report.sections={ALL} adds all ({about(every, subjects)}), with a list such as "
        f"--config.report.sections={','.join([*_quick(), rest[0]])} only some."
    )


def about(chosen: Sequence[str], subjects: Sequence[Subject]) -> str:
    """About how long the sections take, in words; see :class:`Cost`.

    Args:
      chosen: names of SECTIONS.
      subjects: the runs.
    """
    costs = [SECTIONS[name].cost for name in chosen]
    sets = {(s.config.data.source, tuple(s.config.data.image_size)) for s in subjects}
    passes = sum(cost.images for cost in costs) * sum(map(_operations, subjects)) / RATE
    seconds = len(sets) * sum(cost.once for cost in costs) + len(subjects) * sum(cost.each for cost in costs) + passes
    minutes = max(1, round(seconds / 60))
    shown = f"{minutes} minute{'s' * (minutes > 1)}" if minutes < 100 else f"{round(minutes / 60)} hours"
    of = f" for {len(subjects)} runs" if len(subjects) > 1 else ""
    return f"about {shown}{of} on two idle CPU cores"


def _operations(subject: Subject) -> float:
    """FLOP, about, of an image that passes the run's encoder: each parameter acts at each place of the last layer."""
    encoder = subject.params.get("encoder")
    if encoder is None:  # after training; the heads of a method, which its record counts, do not run
        encoder = jax.eval_shape(lambda: representation.init_params(subject.config, jax.random.key(0)))
    size = parameters.count(encoder)
    height, width = grids(subject.config)[-1]
    return 2.0 * size * height * width


def resolve(config: ConfigDict, saved: dict[str, Any]) -> ConfigDict:
    """The config for the analysis of a run.

    Keys that describe a run are read from `saved`, others from `config`; the data too, if `config` names a source. Keys
    that `saved` lacks have their defaults; keys that no longer exist are left out.

    Args:
      config: the report's config.
      saved: the run's config, as its checkpoint holds it.

    Raises:
      ConfigError: the result is not valid.
    """
    full, own, theirs = base(), flatten(config), flatten(saved)
    for key in KEYS:
        given = theirs if key in OF_THE_RUN else own
        if key in given:
            _set(full, key, given[key])
    if config.data.source:
        for key in DATA_KEYS:
            full.data[key] = config.data[key]
    full.job = saved.get("job", "evaluate")
    source = full.data.source
    unknown = not config.data.source and not data.is_source(source)  # a later version's: opening it says so
    if unknown:
        full.data.source = f"npz:{source}"  # passes every rule
    if not (full.steps or full.epochs):  # a file of weights, which no run of ours wrote
        full.job = "evaluate"
    validate(full)
    if unknown:
        full.data.source = source
    return full


def _set(config: ConfigDict, key: str, value: Any) -> None:
    group, leaf = place(config, key)
    group[leaf] = tuple(value) if isinstance(value, list) else value


def _open(config: ConfigDict) -> tuple[data.Source, data.Source | None]:
    """The training split and the evaluation split, if there is one.

    Raises:
      UserError: the data cannot be found, or are not images with at most one label each.
    """
    if config.job == "segment":
        raise DataError("the run was trained on images with masks; name a set of images with --config.data.source")
    train = data.open_split(config, "train")
    if train is None:
        raise DataError(f"config.data.source={config.data.source!r}: has no training split")
    return train, data.open_split(config, "eval")


def analyse(
    subjects: Sequence[Subject],
    chosen: Sequence[str],
    keep: Callable[[Sequence[Section], Mapping[str, str]], Any] = lambda sections, missing: None,
) -> tuple[list[Section], dict[str, str]]:
    """Makes the sections named in `chosen`; returns them, and {title of a missing section: why it is missing}.

    Args:
      subjects: the runs.
      chosen: names of SECTIONS.
      keep: called before each section that takes long, with what there is so far, so that a report that is stopped
        leaves a page; the sections to come are missing there.
    """
    sections: list[Section] = []
    missing: dict[str, str] = {}
    for name in chosen:
        analysis = SECTIONS[name]
        usable = [s for s in subjects if s.train is not None or not analysis.needs_images]
        if not usable and analysis.needs_runs:
            missing[analysis.title] = "there are no readable images"
            continue
        if analysis.needs_images:
            to_come = {SECTIONS[later].title: "not computed yet" for later in chosen[chosen.index(name) :]}
            keep(sections, {**missing, **to_come})
            log.info("%s ...", analysis.title)
        start = time.monotonic()
        try:
            section = analysis.run(usable)
            if section is None:
                continue
            long = analysis.folded or len(section.figures) > MAX_SHOWN
            sections.append(dataclasses.replace(section, folded=long and len(chosen) > 1))
            if analysis.needs_images:
                log.info("%s took %.1f s", analysis.title, time.monotonic() - start)
        except UserError as e:
            if distributed.processes() > 1 and not isinstance(e, Absent):  # the others may still be in this section
                raise
            if analysis.needs_images:
                log.info("%s: left out, %s", analysis.title, e)
            missing[analysis.title] = str(e)
    return sections, missing


def write(
    folder: Path,
    origin: dict[str, str],
    sections: Sequence[Section],
    missing: dict[str, str],
    more: str = "",
    whole: bool = True,
    drawn: MutableMapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes both files, so that each is whole or missing; returns what :func:`run` returns.

    A page that is not whole yet does not replace a page with more sections: it goes to the folder PARTIAL, which the
    whole page removes. A whole page leaves the one with more sections, which took minutes to compute, as EARLIER.

    Args:
      folder: the folder for the files, which must exist.
      origin: {name of a run: the name of its checkpoint}.
      sections: the page's sections.
      missing: {title of a missing section: why it is missing}.
      more: what else there is, as :func:`offer` says it.
      whole: whether no more sections are to come.
      drawn: the sections that an earlier page of the same report has drawn, as :func:`page.render` takes them.
    """
    title = next(iter(origin)) if len(origin) == 1 else f"{len(origin)} runs compared" if origin else sections[0].title
    html = page.render(title, origin, sections, missing, drawn, more)
    numbers = {
        "crate_jax": __version__,
        "runs": origin,
        "sections": [
            {
                "title": s.title,
                "numbers": s.numbers,
                "tables": [
                    {"caption": t.caption, "columns": t.columns, "rows": [[*map(_plain, row)] for row in t.rows]}
                    for t in s.tables
                ],
            }
            for s in sections
        ],
        "left_out": missing,
    }
    if distributed.first():
        lost = _titles(folder / JSON) - {s.title for s in sections}
        beside = not whole and bool(lost)
        home = folder / PARTIAL if beside else folder
        if whole and lost:
            for name in (HTML, JSON):
                with contextlib.suppress(FileNotFoundError):
                    (folder / name).replace(folder / f"{EARLIER}{Path(name).suffix}")
            log.info("%s.html is the earlier report, with %s", folder / EARLIER, ", ".join(sorted(lost)))
        with metrics.writing(home):
            home.mkdir(exist_ok=True)
        metrics.write_json(home / JSON, numbers)
        metrics.write_text(home / HTML, html)
        if beside:
            log.info("%s keeps the earlier report until this one is whole; so far: %s", folder / HTML, home / HTML)
        else:
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    paths = {"report": str(folder / HTML), "json": str(folder / JSON)}
    return {**paths, "left_out": missing, "sections": [s.title for s in sections]}


def _titles(path: Path) -> set[str]:
    """The titles of an earlier report's sections; none if there is no report that can be read."""
    try:
        return {section["title"] for section in json.loads(path.read_text(encoding="utf-8"))["sections"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _plain(cell: Cell) -> Any:
    """A cell of a table for JSON."""
    if isinstance(cell, Best):
        return cell.value
    return dataclasses.asdict(cell) if isinstance(cell, Estimate) else cell


def write_for_training(folder: Path, config: ConfigDict, mesh: Mesh) -> str:
    """Writes the small report at the end of training, from the run's log alone; returns its path."""
    subject = Subject(folder.name, config, {}, folder, None, None, mesh)
    sections, _ = analyse([subject], _quick())
    return write(folder, {folder.name: folder.name}, sections, {}, offer(_quick(), [subject]))["report"]
