"""Rules between our parameters and other people's state dicts, applied both ways and strictly.

A rule says which of their tensors correspond to which of our arrays, and in which layout. ``{l}`` in a name runs over
the layers, which we stack on a leading axis; ``{i}`` runs over blocks of different shapes, which have names of their
own here too. Rules form groups; a model has all arrays of a group or none. A rule must use every tensor and every
array, unless a tensor is listed as unused or constant; the error names what is left over.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping

import numpy as np
from flax import traverse_util

from crate_jax.convert.layouts import AS_IS, Layout
from crate_jax.errors import ConfigError, some
from crate_jax.parallel.parameters import names

Array = np.ndarray
Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Our array `ours` holds their tensors `theirs`, converted by `layout`."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = AS_IS

    def at(self, i: int) -> Rule:
        """The rule of block `i`."""
        return Rule(_at(self.ours, i), tuple(_at(name, i) for name in self.theirs), self.layout)


@dataclasses.dataclass(frozen=True)
class Group:
    """Rules that belong together.

    Attributes:
      name: its name in messages.
      rules: its rules; all of them apply, or none.
      optional: the group may be absent.
      replaced_by: prefix of tensors that other models have in this group's place; with them the group may be absent.
    """

    name: str
    rules: tuple[Rule, ...]
    optional: bool = False
    replaced_by: str = ""


@dataclasses.dataclass(frozen=True)
class Constant:
    """A tensor of theirs that is not a parameter here.

    Attributes:
      theirs: the tensor's name.
      array: one of our arrays; the tensor is exported together with it.
      value: the function (grid, that array) -> the tensor.
      why: the reason why it is not needed, for messages.
      checked: an import compares the tensor with `value`.
    """

    theirs: str
    array: str
    value: Callable[[Grid, Array], Array]
    why: str
    checked: bool = True

    def at(self, i: int) -> Constant:
        """The constant of block `i`."""
        return dataclasses.replace(self, theirs=_at(self.theirs, i), array=_at(self.array, i))


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything known about the state dicts of one kind of model.

    Attributes:
      groups: the rules of all tensors that are parameters.
      constants: tensors that are not parameters and have a known value.
      unused: pattern of whole names -> the reason why these tensors are not needed here.
      rename: (pattern, replacement) pairs that turn other spellings of the names into the rules' spelling.
      variants: pattern of whole names -> the model that has such tensors and that we do not have.
    """

    groups: tuple[Group, ...]
    constants: tuple[Constant, ...] = ()
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rename: tuple[tuple[str, str], ...] = ()
    variants: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Match:
    """How a state dict's names fit a family.

    Attributes:
      groups: the groups that are present.
      absent: names of the groups that are absent and may be.
      missing: names of the tensors that are absent and must not be.
      unknown: names of the tensors that no rule mentions.
      ignored: names of the tensors that are not needed -> the reason.
      variant: a tensor that shows a model we do not have, and which one; empty if there is none.
    """

    groups: tuple[Group, ...]
    absent: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    ignored: Mapping[str, str]
    variant: str = ""

    def problem(self) -> str:
        """What does not fit, in one line; empty if everything fits."""
        if self.variant:
            return f"{self.variant}, which is not supported"
        if not self.missing and not self.unknown:
            return ""
        return _not_fitting(self.missing, self.unknown)


def _not_fitting(missing: Collection[str], unused: Collection[str]) -> str:
    return "; ".join(
        f"{what} {some([*names], ', ') or 'none'}" for what, names in (("missing", missing), ("not used", unused))
    )


def match(family: Family, state: Collection[str]) -> Match:
    """Compares names with a family's rules; `state` holds names in the rules' spelling (:func:`canonical_name`)."""
    state = dict.fromkeys(state)  # in which a name is found at once, also among many
    family = unrolled(family, state)
    used: set[str] = set()
    groups, absent, missing = [], [], []
    for group in family.groups:
        wanted = [name for rule in group.rules for template in rule.theirs for name in expand(template, state)]
        replaced_by = group.replaced_by and any(name.startswith(group.replaced_by) for name in state)
        if (group.optional or replaced_by) and not any(name in state for name in wanted):
            absent.append(group.name)
            continue
        groups.append(group)
        used.update(wanted)
        missing += [name for name in wanted if name not in state]
    ignored = {name: c.why for c in family.constants for name in expand(c.theirs, state) if name in state}
    for pattern, why in family.unused.items():
        ignored |= {name: why for name in state if re.fullmatch(pattern, name) and name not in used}
    unknown = sorted(name for name in state if name not in used and name not in ignored)
    shown = (f"'{name}' is {what}" for p, what in family.variants.items() for name in state if re.fullmatch(p, name))
    return Match(tuple(groups), tuple(absent), tuple(sorted(set(missing))), tuple(unknown), ignored, next(shown, ""))


def canonical_name(family: Family, name: str) -> str:
    r"""A tensor's name in the rules' spelling.

    >>> canonical_name(Family(groups=(), rename=((r"^net\.", ""),)), "net.norm.weight")
    'norm.weight'
    """
    for pattern, replacement in family.rename:
        name = re.sub(pattern, replacement, name)
    return name


def expand(template: str, state: Collection[str]) -> list[str]:
    """A template's names for all layers, from 0 to the highest layer in `state`.

    >>> expand("blocks.{l}.norm.bias", ["blocks.0.norm.bias", "blocks.1.norm.bias"])
    ['blocks.0.norm.bias', 'blocks.1.norm.bias']
    """
    return [template.format(l=i) for i in range(_count(template, "{l}", state))] if "{l}" in template else [template]


def unrolled(family: Family, state: Collection[str]) -> Family:
    """The family with one rule per block in place of each rule with ``{i}``.

    Args:
      family: the rules.
      state: the names that say how many blocks there are, theirs or ours.

    >>> rule = Rule("stage/block{i}/kernel", ("layer.{i}.weight",))
    >>> [r.ours for r in unrolled(Family((Group("g", (rule,)),)), ["layer.0.weight", "layer.1.weight"]).groups[0].rules]
    ['stage/block0/kernel', 'stage/block1/kernel']
    """

    def blocks(*templates: str) -> range:
        return range(max(_count(template, "{i}", state) for template in templates))

    groups = (
        dataclasses.replace(
            group,
            rules=tuple(
                x
                for r in group.rules
                for x in ([r.at(i) for i in blocks(r.ours, *r.theirs)] if "{i}" in r.ours else [r])
            ),
        )
        for group in family.groups
    )
    constants = (
        x
        for c in family.constants
        for x in ([c.at(i) for i in blocks(c.theirs, c.array)] if "{i}" in c.theirs else [c])
    )
    return dataclasses.replace(family, groups=tuple(groups), constants=tuple(constants))


def _count(template: str, number: str, state: Collection[str]) -> int:
    """One more than the highest number in the place of `number`, but no more than one beyond the number of names."""
    stem = re.escape(template.split(number)[0])
    found = [int(m[1]) for name in state if (m := re.match(rf"{stem}(\d{{1,9}})[./]", name))]
    return min(max(found, default=0), len(state)) + 1


def _at(template: str, i: int) -> str:
    return template.replace("{i}", str(i))


def import_tensors(family: Family, name: str, state: Mapping[str, Array], grid: Grid) -> dict:
    """Converts their state dict to our nested parameters.

    Args:
      family: the rules.
      name: the family's name, for messages.
      state: their tensors by name.
      grid: (h, w) patches, to compute constants.

    Raises:
      ConfigError: missing or unknown names (the first are listed), layers of different shapes, or a constant that
        differs from ours.
    """
    state = {canonical_name(family, n): a for n, a in state.items()}
    family = unrolled(family, state)
    found = match(family, state)
    if found.problem():
        raise ConfigError(f"{name} weights do not fit: {found.problem()}")
    flat: dict[str, Array] = {}
    for rule in (rule for group in found.groups for rule in group.rules):
        tensors = [[np.asarray(state[n]) for n in expand(template, state)] for template in rule.theirs]
        try:
            arrays = [rule.layout.to_ours(layer) for layer in zip(*tensors, strict=True)]
            flat[rule.ours] = np.stack(arrays) if "{l}" in rule.theirs[0] else arrays[0]
        except (ValueError, IndexError):
            shapes = sorted({str(list(t.shape)) for layers in tensors for t in layers})
            raise ConfigError(f"{name} weights: '{rule.theirs[0]}' has the shapes {', '.join(shapes)}") from None
    _check_constants(family, name, state, grid, flat)
    return traverse_util.unflatten_dict(flat, sep="/")


def _check_constants(
    family: Family, name: str, state: Mapping[str, Array], grid: Grid, params: Mapping[str, Array]
) -> None:
    for constant in family.constants:
        for tensor in expand(constant.theirs, state):
            if not constant.checked or tensor not in state or constant.array not in params:
                continue
            value, expected = np.asarray(state[tensor]), constant.value(grid, params[constant.array])
            tolerance = 1e-5 if value.dtype.itemsize > 2 else 1e-2  # 16-bit floats round
            if value.shape != expected.shape or not np.allclose(value.astype(np.float64), expected, atol=tolerance):
                raise ConfigError(
                    f"{name} weights: the constant '{tensor}' is not the table of a {grid} grid of patches"
                )


def export_tensors(family: Family, name: str, params: Mapping, grid: Grid) -> dict[str, Array]:
    """Converts our nested parameters to their state dict; the inverse of :func:`import_tensors`.

    Raises:
      ConfigError: arrays that no rule uses, or that a rule needs and `params` does not have (the first are listed).
    """
    ours = {n: np.asarray(a) for n, a in names(params).items()}
    family = unrolled(family, ours)
    state: dict[str, Array] = {}
    used, missing = set(), []
    for group in family.groups:
        wanted = [rule.ours for rule in group.rules]
        if (group.optional or group.replaced_by) and not any(n in ours for n in wanted):
            continue
        used.update(wanted)
        missing += [n for n in wanted if n not in ours]
        for rule in group.rules:
            if rule.ours in ours:
                state |= _tensors(rule, ours[rule.ours])
    left = [n for n in ours if n not in used]
    if missing or left:
        raise ConfigError(f"not a {name} model: {_not_fitting(missing, left)}")
    for constant in family.constants:
        if constant.array in ours:
            state |= _constants(constant, grid, ours[constant.array])
    return state


def _tensors(rule: Rule, array: Array) -> dict[str, Array]:
    if "{l}" not in rule.theirs[0]:
        return dict(zip(rule.theirs, rule.layout.to_theirs(array), strict=True))
    return {
        template.format(l=i): tensor
        for i, layer in enumerate(array)
        for template, tensor in zip(rule.theirs, rule.layout.to_theirs(layer), strict=True)
    }


def _constants(constant: Constant, grid: Grid, array: Array) -> dict[str, Array]:
    value = constant.value(grid, array)
    layers = range(len(array)) if "{l}" in constant.theirs else range(1)
    return {constant.theirs.format(l=i): value for i in layers}
