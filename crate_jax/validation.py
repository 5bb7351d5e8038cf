"""What a config may hold: keys with their rules, sections of keys, and checks of values against the rules.

One line declares a key: its default, its rule, its meaning and, if only some part reads it, which part. Sections stand
beside the code that reads them; :mod:`crate_jax.config` puts them together.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from crate_jax.errors import ConfigError

KINDS: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,), tuple: (list,)}
KIND_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", tuple: "a tuple"}
ITEM_NAMES = {int: "whole numbers", float: "numbers", str: "texts"}
# What a start that continues a run may do with a key. FIXED: nothing, because the weights would mean something else, or
# the run would be another one. RECORDED: change it, which checkpoint, summary and report then say. IF_FITS: the same,
# but some changes add, remove or reshape arrays of the training state, and so cannot be restored. FREE: change it.
FREE, RECORDED, IF_FITS, FIXED = "free", "recorded", "if it fits", "fixed"
MAX_WHOLE = 2**31 - 1  # for keys that are not `wide`: JAX's whole numbers have 32 bits


@dataclasses.dataclass(frozen=True)
class Rule:
    """A condition on values of the right type.

    Attributes:
      text: the rule for people, such as "must be greater than 0"; empty: every value is right.
      problem: the function from a value (tuples as lists) to what is wrong with it; an empty text if it is right.
    """

    text: str
    problem: Callable[[Any], str]


def must(text: str, holds: Callable[[Any], bool]) -> Rule:
    """The rule that `holds(value)` is true; its text is "must" and `text`.

    >>> must("be even", lambda value: value % 2 == 0).problem(3)
    'must be even'
    """
    return Rule(f"must {text}", lambda value: "" if holds(value) else f"must {text}")


anything = Rule("", lambda value: "")
positive = must("be greater than 0", lambda value: value > 0)


def at_least(low: float) -> Rule:
    """The rule for numbers that are not below `low`."""
    return must(f"be at least {low}" if low else "not be negative", lambda value: value >= low)


def within(low: float, high: float, ends: str = "[]") -> Rule:
    """The rule for numbers from `low` to `high`; a round bracket in `ends`, as in "[)", excludes that end.

    >>> within(0, 1, "[)").problem(1)
    'must lie in [0, 1)'
    """

    def holds(value: Any) -> bool:
        return low <= value <= high and (ends[0] == "[" or value > low) and (ends[1] == "]" or value < high)

    return must(f"lie in {ends[0]}{low}, {high}{ends[1]}", holds)


def one_of(*values: Any) -> Rule:
    """The rule for one of a few values; ``one_of(*TABLE)`` allows the names of a table."""
    return must(f"be one of {', '.join(map(str, values))}", lambda value: value in values)


def increasing_pair(low: float, high: float) -> Rule:
    """The rule for two numbers in (`low`, `high`], the second not below the first."""
    return must(
        f"be two increasing numbers in ({low}, {high}]",
        lambda value: len(value) == 2 and low < value[0] <= value[1] <= high,
    )


def each(rule: Rule) -> Rule:
    """The rule for tuples, also empty ones, whose items all keep to `rule`."""
    text = f"each {rule.text}"
    return Rule(text, lambda items: text if any(map(rule.problem, items)) else "")


def several(rule: Rule) -> Rule:
    """The rule for tuples of one item or more, whose items all keep to `rule`."""
    text = f"must hold one value or more; each {rule.text}"
    return Rule(text, lambda items: "" if items and not any(map(rule.problem, items)) else text)


def _not_a_pattern(values: Any) -> str:
    for pattern in values:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as e:
            return f"{pattern!r} is not a regular expression ({e})"
    return ""


patterns = Rule("must hold regular expressions", _not_a_pattern)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the config.

    Attributes:
      default: the value if nobody sets the key. Every value must have the default's type; a whole number may stand
        for a number.
      rule: the condition that values must meet besides their type.
      meaning: the key's meaning, for people.
      read_by: (KEY, value, ...): the key is read only if config.KEY has one of these values. (): it is read if its
        section is read.
      effect: whether a run's numbers depend on the key.
      items: the type of a tuple's items; None: the type of the default's first item, or any type if the default is
        empty.
      wide: whether whole numbers may need more than 32 bits.
      resume: what a start that continues a run may do with the key: FREE, RECORDED, IF_FITS or FIXED. Empty: FREE if
        the run's numbers do not depend on the key, else what the section says.
    """

    default: Any
    rule: Rule
    meaning: str
    read_by: tuple[Any, ...] = ()
    effect: bool = True
    items: type | None = None
    wide: bool = False
    resume: str = ""

    @property
    def item_type(self) -> type:
        """The type of a tuple's items; object: any type."""
        return self.items or (type(self.default[0]) if self.default else object)


@dataclasses.dataclass(frozen=True)
class Section:
    """Keys that belong together: ``config.NAME.KEY``.

    Attributes:
      name: the section's name; empty for keys directly under the config.
      meaning: the section's subject, for people.
      of_the_run: whether the keys describe a run. If so, a report about a run reads them from the run's config, else
        from its own config.
      keys: {name: key}.
      effect: whether a run's numbers depend on any of the keys.
      resume: what a start that continues a run may do with its keys, if they do not say it: see Key.
      check: a function of the whole config that raises ConfigError if keys do not go together. It is called only if
        the section is read, and after all values were found to keep to their rules.
    """

    name: str
    meaning: str
    _: dataclasses.KW_ONLY
    of_the_run: bool
    keys: Mapping[str, Key]
    effect: bool = True
    resume: str = FIXED
    check: Callable[[ConfigDict], None] = lambda config: None

    def flat(self) -> dict[str, Key]:
        """The keys by their whole names, such as ``encoder.width``, with what the section says of all its keys."""
        prefix = f"{self.name}." if self.name else ""
        flat = {}
        for name, key in self.keys.items():
            effect = key.effect and self.effect
            resume = key.resume or (self.resume if effect else FREE)
            flat[prefix + name] = dataclasses.replace(key, effect=effect, resume=resume)
        return flat


def defaults(sections: Iterable[Section]) -> ConfigDict:
    """The config of all sections with every key at its default, locked against unknown keys."""
    config = ConfigDict()
    for section in sections:
        values = {name: key.default for name, key in section.keys.items()}
        config.update({section.name: values} if section.name else values)
    return config.lock()


def check_types(flat: Mapping[str, Any], keys: Mapping[str, Key]) -> None:
    """Checks that the config has every key, each with a value of its type.

    Args:
      flat: the config as :func:`flatten` returns it.
      keys: {whole name: key}.

    Raises:
      ConfigError: a key is missing or has a value of another type; the error names the first such key.
    """
    for name, key in sorted(keys.items()):
        if name not in flat:
            raise ConfigError(f"config.{name}: is missing; a config starts from crate_jax.config.base()")
        kinds = KINDS[type(key.default)]
        if not isinstance(flat[name], kinds) or (isinstance(flat[name], bool) and bool not in kinds):
            raise _error(name, flat[name], f"must be {KIND_NAMES[type(key.default)]}")
        if isinstance(flat[name], list) and key.item_type in ITEM_NAMES:
            kinds = KINDS[key.item_type]
            if not all(isinstance(item, kinds) and not isinstance(item, bool) for item in flat[name]):
                raise _error(name, flat[name], f"must hold {ITEM_NAMES[key.item_type]} only")


def check_values(flat: Mapping[str, Any], keys: Mapping[str, Key]) -> None:
    """Checks every value against its key's rule. :func:`check_types` must have checked the types before.

    Args:
      flat: the config as :func:`flatten` returns it.
      keys: {whole name: key}.

    Raises:
      ConfigError: a value breaks its rule; the error names the key, the value and what would be right.
    """
    for name, key in keys.items():
        problem = _problem(flat[name], key)
        if problem:
            raise _error(name, flat[name], problem)


def _problem(value: Any, key: Key) -> str:
    numbers = value if isinstance(value, list) else [value]
    if any(isinstance(n, float) and not abs(n) < float("inf") for n in numbers):
        return "must be finite" if isinstance(value, list) else "must be a finite number"
    if not key.wide and any(isinstance(n, int) and abs(n) > MAX_WHOLE for n in numbers):
        return f"must be at most {MAX_WHOLE}"
    return key.rule.problem(value)


def _error(name: str, value: Any, right: str) -> ConfigError:
    return ConfigError(f"config.{name}={value!r}: {right}")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a config (or its parsed JSON) to ``{"data.source": ...}``, sorted, tuples as lists.

    >>> flatten({"steps": 5, "data": {"image_size": (32, 32)}})
    {'data.image_size': [32, 32], 'steps': 5}
    """
    flat: dict[str, Any] = {}
    for key in sorted(config):
        value = config[key]
        if isinstance(value, Mapping | ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def items(values: Iterable[Any]) -> list[Any]:
    """The items of a tuple that a flag may have given: it gives A,B as one text.

    >>> items(("seed,log.every", "steps", 3))
    ['seed', 'log.every', 'steps', 3]
    """
    return [item for value in values for item in (value.split(",") if isinstance(value, str) else [value])]


def place(config: Any, key: str) -> tuple[Any, str]:
    """The group of a config, or of its dictionary, that holds a key, and the key's name in this group.

    >>> place({"steps": 5, "data": {"flip": 0.5}}, "data.flip"), place({"steps": 5}, "steps")
    (({'flip': 0.5}, 'flip'), ({'steps': 5}, 'steps'))
    """
    *section, leaf = key.split(".")
    return (config[section[0]] if section else config), leaf


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lists ``"key: old -> new"`` for every key whose value differs between two configs.

    >>> changed_keys({"steps": 5, "data": {"flip": 0.5}}, {"steps": 9, "data": {"flip": 0.5}})
    ['steps: 5 -> 9']
    """
    a, b = flatten(old), flatten(new)
    missing = "(none)"
    return [
        f"{k}: {a.get(k, missing)!r} -> {b.get(k, missing)!r}"
        for k in sorted(a.keys() | b.keys())
        if a.get(k, missing) != b.get(k, missing)
    ]
