"""Names of parameters, and how rules (weight decay, penalties, learning rates, freezing) select parameters by name.

A parameter's name is its path, such as ``encoder/blocks/mssa/subspaces/kernel``. A rule holds regular expressions that
must match a whole name. A pattern that matches nothing is an error: otherwise a misspelt rule would train another model
in silence.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax

from crate_jax.errors import ConfigError

log = logging.getLogger(__name__)

STACKED = "blocks"  # the path component under which every leaf has a leading layer axis L


def path_name(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf from its key path in the parameter tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(params: Any) -> dict[str, Any]:
    """Flattens a parameter tree to ``{name: leaf}``, in the order of JAX's own flattening.

    >>> names({"head": {"kernel": 1, "bias": 2}})
    {'head/bias': 2, 'head/kernel': 1}
    """
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def is_stacked(name: str) -> bool:
    """Whether the parameter holds one slice per layer, (L, ...).

    >>> is_stacked("encoder/blocks/mssa/subspaces/kernel"), is_stacked("encoder/norm/scale")
    (True, False)
    """
    return STACKED in name.split("/")


def unstacked_ndim(name: str, leaf: Any) -> int:
    """Returns the number of axes of one layer's parameter, without the layer axis."""
    return leaf.ndim - is_stacked(name)


def count(params: Any) -> int:
    """Returns the number of scalars in a tree of arrays or of shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def match(params: Any, patterns: Iterable[str], key: str) -> tuple[str, ...]:
    """Returns the names that at least one pattern matches as a whole, in the tree's order.

    Args:
      params: tree of arrays or of shapes.
      patterns: regular expressions.
      key: the config key that holds the patterns, such as ``penalty.include``; only for the error.

    Raises:
      ConfigError: a pattern matches no parameter.

    >>> match({"head": {"kernel": 1, "bias": 2}}, [".*kernel"], "penalty.include")
    ('head/kernel',)
    """
    all_names = list(names(params))
    found: set[str] = set()
    for pattern in patterns:
        matched = [name for name in all_names if re.fullmatch(pattern, name)]
        if not matched:
            nearest = difflib.get_close_matches(pattern, all_names, n=6, cutoff=0.0)
            raise ConfigError(
                f"config.{key}: pattern {pattern!r} matches none of the {len(all_names)} parameters; it must match a "
                f"whole name, such as {', '.join(nearest)}"
            )
        found.update(matched)
    return tuple(name for name in all_names if name in found)


def select(params: Any, include: Iterable[str], exclude: Iterable[str], what: str) -> tuple[str, ...]:
    """Returns the names that `include` matches and `exclude` does not, in the tree's order.

    Args:
      params: tree of arrays or of shapes.
      include: regular expressions that match whole names.
      exclude: regular expressions that match whole names; these are taken out again.
      what: the config section that holds both lists, such as ``penalty``; only for the error.

    Raises:
      ConfigError: a pattern of either list matches no parameter.
    """
    dropped = set(match(params, exclude, f"{what}.exclude"))
    return tuple(name for name in match(params, include, f"{what}.include") if name not in dropped)


def mask(params: Any, selected: Collection[str]) -> Any:
    """Returns a tree of booleans shaped like `params`: True where the name is selected."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) in selected, params)


def log_rules(
    params: Any, decayed: Collection[str], penalised: Collection[str], notes: Mapping[str, str] | None = None
) -> None:
    """Logs one line per parameter (shape, weight decay, penalty, layout) and the totals, in one log record.

    Args:
      params: tree of arrays or of shapes.
      decayed: names under weight decay.
      penalised: names under the orthogonality penalty.
      notes: {name: what else there is to say}, such as how the parameter is split over devices.
    """
    leaves = names(params)
    width = max(map(len, leaves))

    def row(name: str, shape: str, size: int, decay: str, penalty: str, note: str) -> str:
        return f"{name:<{width}}  {shape:<20} {size:>12,}  {decay:<5}  {penalty:<7}  {note}".rstrip()

    rows = [
        row(
            name,
            "x".join(map(str, leaf.shape)),
            count(leaf),
            "decay" if name in decayed else "",
            "penalty" if name in penalised else "",
            (notes or {}).get(name, ""),
        )
        for name, leaf in leaves.items()
    ]
    total = [count([leaf for name, leaf in leaves.items() if name in group]) for group in (leaves, decayed, penalised)]
    log.info(
        "%d parameters\n%s\ntotal %s, under weight decay %s, under the penalty %s",
        len(leaves),
        "\n".join(rows),
        *(f"{n:,}" for n in total),
    )
