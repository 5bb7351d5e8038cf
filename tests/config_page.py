"""The page of all keys of the config, made of the lines that declare them.

python -m tests.config_page > docs/config.md
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from crate_jax.config import METHOD_OF_JOB, SECTIONS, SOME_METHODS_READ
from crate_jax.evals.protocols import PROTOCOLS
from crate_jax.methods import METHODS
from crate_jax.validation import KIND_NAMES, Key, Section


def _value(value: Any) -> str:
    """A value as a flag writes it."""
    if isinstance(value, tuple):
        return ",".join(map(_value, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value) or "empty"


def _row(name: str, key: Key) -> str:
    chooser, *names = key.read_by or ("",)
    read_by = f"{chooser}: {', '.join(map(_value, names))}" if chooser else ""
    rule = key.rule.text.removeprefix("must ") or f"be {KIND_NAMES[type(key.default)]}"
    effect = "" if key.effect else "no"
    cells = (f"`{name}`", f"`{_value(key.default)}`", rule, key.meaning, effect, key.resume, read_by)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _table(keys: Mapping[str, Key]) -> list[str]:
    head = [
        "| key | default | must | meaning | changes results | resume | read only where |",
        "|---|---|---|" + 4 * "---|",
    ]
    return [*head, *(_row(name, key) for name, key in keys.items()), ""]


def _readers(section: Section) -> str:
    """Which methods read a section, if not all do."""
    if section.name not in SOME_METHODS_READ:
        return ""
    readers = [name for name, row in METHODS.items() if section.name in row.parts]
    return f" Read by {'every method' if len(readers) == len(METHODS) else _listed(readers, 'method')}."


def _listed(names: Iterable[str], what: str) -> str:
    *first, last = [f"`{name}`" for name in names]
    return f"the {what}s {', '.join(first)} and {last}" if first else f"the {what} {last}"


def page() -> str:
    """The page as Markdown."""
    jobs = ", ".join(f"`{job}` trains `{method}`" for job, method in METHOD_OF_JOB.items())
    text = [
        "# All keys of the config",
        "",
        "Each can be set by a flag, `--config.KEY=VALUE`. A value has the type of the default and must keep to the",
        "third column; `none` is an empty tuple, `empty` an empty text. The last column names another key and its",
        "values, without which the key is not read.",
        "",
        "`resume` says what a start that continues a run may do with the key ([survival.md](survival.md)). free:",
        "change it. recorded: change it, and checkpoint, summary and report say so. if it fits: the same, unless the",
        "training state would have other arrays. fixed: nothing, unless `--config.allow_change=KEY,...` names it.",
        "",
        f"The jobs `pretrain` and `sweep` train the method `config.method`, {jobs};",
        "`evaluate`, `align` and `report` read an encoder, and of a model with a decoder what `reconstruction` reads.",
        "",
        "This page is made of the lines that declare the keys, by `python -m tests.config_page > docs/config.md`.",
        "",
    ]
    for section in SECTIONS:
        whose = "In a report: as the run had them." if section.of_the_run else "In a report: its own."
        text += [f"## {section.name or 'Top level: ' + section.meaning.lower().removesuffix('.')}", ""]
        text += [f"{section.meaning}{_readers(section)} {whose}" if section.name else whose, ""]
        text += _table(section.flat())
    for name, protocol in PROTOCOLS.items():
        text += [f"## protocol, of `evaluate` with `protocol={name}`", ""]
        text += _table(protocol.flat())
    return "\n".join(text)


if __name__ == "__main__":
    print(page(), end="")
