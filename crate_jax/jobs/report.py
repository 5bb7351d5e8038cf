"""The job ``report``: one or several checkpoints in, ``report.html`` and ``report.json`` out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crate_jax import __version__, data
from crate_jax.analysis import logged
from crate_jax.analysis.alignment import section as alignment_section
from crate_jax.analysis.collapse import section as collapse_section
from crate_jax.analysis.whitebox import section as whitebox_section
from crate_jax.config import KEYS, OF_THE_RUN, base, validate
from crate_jax.convert import pretrained
from crate_jax.errors import ConfigError, DataError, UserError
from crate_jax.parallel import distributed, sharding
from crate_jax.report import page
from crate_jax.report.section import Section, Subject
from crate_jax.validation import flatten
from crate_jax.workdir import checkpoint, checkpoint_files, metrics
from crate_jax.workdir.folder import expanduser, lock

log = logging.getLogger(__name__)

HTML, JSON = "report.html", "report.json"


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A section that can be had.

    Attributes:
      title: of the section, for the case that there is none.
      run: subjects -> section; a UserError says why there is none.
      needs_images: it is given only subjects whose images can be read.
      needs_runs: it is about runs. One that is not is there only if config.report.sections names it.
    """

    title: str
    run: Callable[[Sequence[Subject]], Section]
    needs_images: bool = True
    needs_runs: bool = True


# In the order of the page.
SECTIONS: dict[str, Analysis] = {
    "overview": Analysis("Overview", logged.section, needs_images=False),
    "pictures": Analysis("Pictures", logged.pictures, needs_images=False),
    "whitebox": Analysis("White box", whitebox_section.section),
    "views": Analysis("What the encoder sees", whitebox_section.pictures_section),
    "collapse": Analysis("Collapse", collapse_section.section),
    "alignment": Analysis("Alignment", alignment_section.section),
    "theory": Analysis("Theorem 3", lambda _: whitebox_section.theory_section(), needs_images=False, needs_runs=False),
}

OF_THE_DATA = ("source", "data_dir", "train_split", "eval_split")  # of the report's, if it names a source


def run(config: ConfigDict, workdir: str | None) -> dict[str, Any]:
    """Writes the report of `config.checkpoint`; returns where, and which sections are missing why.

    Args:
      config: the report's own.
      workdir: where the two files go; None: to the run, if there is but one.

    Raises:
      UserError: a checkpoint cannot be read, or another thing that a user can mend, in one line.
    """
    chosen = _chosen(config)
    alone = not config.checkpoint and not any(SECTIONS[name].needs_runs for name in chosen)
    given = [] if alone else split(config.checkpoint)
    paths = [run for path in given for run in expand(path)]
    if not workdir:
        if len(given) != 1 or expanduser(given[0]).is_file():
            raise ConfigError("--workdir is missing: it says where the report goes, unless it is that of one run")
        workdir = str(_home(given[0]))
    sharding.use_cpu_cores(config.evaluation.batch_size, 1)
    sharding.all_devices()  # if there are none, that is said here
    loaded = [pretrained.load(path, "config.checkpoint") for path in paths]
    mesh = sharding.make_mesh(jax.device_count(), 1)
    missing: dict[str, str] = {}
    subjects = []
    for path, name, encoder in zip(paths, names(paths), loaded, strict=True):
        full = resolve(config, encoder.config)
        train: data.Source | None = None
        test: data.Source | None = None
        problem = ""
        try:
            train, test = _open(full)
        except UserError as e:
            problem = str(e)
        if distributed.max_over_processes(int(bool(problem))):  # all leave out the same
            train, test = None, None
            missing[f"what needs the images of {name}"] = problem or "another process cannot read them"
            log.warning("%s: its images cannot be read: %s", name, problem or "by another process")
        home = _home(path) if expanduser(path).is_dir() else None
        subjects.append(Subject(name, full, encoder.params, home, train, test, mesh))
    with lock(workdir) as folder:
        sections, left_out = analyse(subjects, chosen)
        origin = {s.name: encoder.name for s, encoder in zip(subjects, loaded, strict=True)}
        return write(folder, origin, sections, missing | left_out)


def show(result: dict[str, Any]) -> None:
    """Prints where the report is, and what is not in it."""
    for title, why in result["left_out"].items():
        print(f"left out: {title}: {why}")
    print(f"report: {result['report']}")


def split(checkpoint: str) -> list[str]:
    """The checkpoints that a comma-separated text names; a path that exists may have commas of its own.

    Raises:
      ConfigError: one is empty, or stands there twice.
    """
    parts, paths = checkpoint.split(","), []
    while parts:
        joined = [",".join(parts[:n]) for n in range(1, len(parts) + 1)]
        path = next((p for p in joined if p and expanduser(p).exists()), parts[0])
        parts = parts[path.count(",") + 1 :]
        paths.append(path)
    for path in paths:
        if not path:
            raise ConfigError(
                f"config.checkpoint={checkpoint!r}: must name the workdirs of runs or files of weights, separated by "
                "commas"
            )
        if paths.count(path) > 1:
            raise ConfigError(f"config.checkpoint={checkpoint!r}: {path} stands there twice")
    return paths


def expand(path: str) -> list[str]:
    """The path; or, if it is a folder of runs such as a sweep's, the runs in it that have saved a checkpoint."""
    folder = expanduser(path)
    if not folder.is_dir() or checkpoint_files.steps(folder / checkpoint.FOLDER) or checkpoint_files.steps(folder):
        return [path]
    runs = [str(run) for run in sorted(folder.iterdir()) if checkpoint_files.steps(run / checkpoint.FOLDER)]
    return runs or [path]


def names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or as many parts as tell them apart."""
    if not paths:
        return []
    whole = [_home(path).parts for path in paths]
    for depth in range(1, max(map(len, whole)) + 1):
        short = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(short)) == len(short):
            return short
    raise ConfigError(f"config.checkpoint: {' and '.join(paths)} are the same run")


def _home(path: str) -> Path:
    """The run's folder, also if its checkpoints were named."""
    whole = expanduser(path).absolute()
    is_inside = whole.name == "checkpoints" and whole.is_dir()
    return whole.parent if is_inside else whole


def _chosen(config: ConfigDict) -> list[str]:
    given = [name for text in config.report.sections for name in text.split(",")]  # a flag's a,b is one text
    unknown = [name for name in given if name not in SECTIONS]
    if unknown:
        raise ConfigError(f"config.report.sections: unknown {unknown[0]!r}; must be of {', '.join(SECTIONS)}")
    return [name for name, a in SECTIONS.items() if (name in given if given else a.needs_runs)]


def resolve(config: ConfigDict, saved: dict[str, Any]) -> ConfigDict:
    """The run's own config, with the report's options of analyses and, where the report names any, its data.

    Keys that `saved` lacks have their defaults, keys that are no more are left out.

    Raises:
      ConfigError: it is not valid.
    """
    full, own, theirs = base(), flatten(config), flatten(saved)
    for key in KEYS:
        given = theirs if key in OF_THE_RUN else own
        if key in given:
            _set(full, key, given[key])
    if config.data.source:
        for key in OF_THE_DATA:
            full.data[key] = config.data[key]
    full.job = saved.get("job", "evaluate")
    if not (full.steps or full.epochs):  # a file of weights: it was not trained by us
        full.job = "evaluate"
    validate(full)
    return full


def _set(config: ConfigDict, key: str, value: Any) -> None:
    *section, leaf = key.split(".")
    target = config[section[0]] if section else config
    target[leaf] = tuple(value) if isinstance(value, list) else value


def _open(config: ConfigDict) -> tuple[data.Source, data.Source | None]:
    """Both splits.

    Raises:
      UserError: the data cannot be found, or are no images with at most one label each.
    """
    if config.job == "segment":
        raise DataError("the run was trained on images with masks; --config.data.source can name images to look at")
    train = data.open_split(config, "train")
    if train is None:
        raise DataError(f"config.data.source={config.data.source!r}: has no training split")
    return train, data.open_split(config, "eval")


def analyse(subjects: Sequence[Subject], chosen: Sequence[str]) -> tuple[list[Section], dict[str, str]]:
    """The sections, and for each that there is none of, why."""
    sections, missing = [], {}
    for name in chosen:
        analysis = SECTIONS[name]
        usable = [s for s in subjects if s.train is not None or not analysis.needs_images]
        if not usable and analysis.needs_runs:
            missing[analysis.title] = "there are no images to look at"
            continue
        if analysis.needs_images:
            log.info("%s ...", analysis.title)
        try:
            sections.append(analysis.run(usable))
        except UserError as e:
            if distributed.processes() > 1:  # the others may be in the middle of it
                raise
            missing[analysis.title] = str(e)
    return sections, missing


def write(folder: Path, origin: dict[str, str], sections: Sequence[Section], missing: dict[str, str]) -> dict[str, Any]:
    """Writes both files, each whole or not at all; returns their paths and `missing`.

    Args:
      folder: exists.
      origin: name of a run -> where it is from.
      sections: of the page.
      missing: title -> why.
    """
    title = next(iter(origin)) if len(origin) == 1 else f"{len(origin)} runs compared" if origin else sections[0].title
    html = page.render(title, origin, sections, missing)
    numbers = {
        "crate_jax": __version__,
        "runs": origin,
        "sections": [
            {
                "title": s.title,
                "numbers": s.numbers,
                "tables": [{"caption": t.caption, "columns": t.columns, "rows": t.rows} for t in s.tables],
            }
            for s in sections
        ],
        "left_out": missing,
    }
    if jax.process_index() == 0:
        metrics.write_json(folder / JSON, numbers)
        metrics.write_text(folder / HTML, html)
    return {"report": str(folder / HTML), "json": str(folder / JSON), "left_out": missing}


def of_training(folder: Path, config: ConfigDict, mesh: Mesh) -> str:
    """The small report at the end of training: what the run has logged, nothing computed; returns its path."""
    subject = Subject(folder.name, config, {}, folder, None, None, mesh)
    sections, _ = analyse([subject], [name for name, a in SECTIONS.items() if a.needs_runs and not a.needs_images])
    return write(folder, {folder.name: folder.name}, sections, {})["report"]
