"""Names of parameters and the one selector of them: weight decay, penalties, rates and freezing.

A parameter's name is its path, ``encoder/blocks/mssa/subspaces/kernel``. A rule names parameters by
regular expressions that must match a whole name. A pattern that matches nothing is an error: a
misspelt rule would otherwise train another model in silence.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
from absl import logging

from crate_jax.errors import ConfigError

STACKED = "blocks"  # the path component under which every leaf has a leading layer axis L


def path_name(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf from its key path in the parameter tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(params: Any) -> dict[str, Any]:
    """Flattens a parameter tree to ``{name: leaf}``, sorted as JAX flattens it."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def is_stacked(name: str) -> bool:
    """Says whether the parameter holds one slice per layer, [L, ...]."""
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
      key: the config key they come from, such as ``penalty.include``; only for the error.

    Raises:
      ConfigError: a pattern matches no parameter.
    """
    known = list(names(params))
    found: set[str] = set()
    for pattern in patterns:
        hits = [name for name in known if re.fullmatch(pattern, name)]
        if not hits:
            nearest = difflib.get_close_matches(pattern, known, n=6, cutoff=0.0)
            raise ConfigError(
                f"config.{key}: pattern {pattern!r} matches none of the {len(known)} parameters; it must match a whole "
                f"name, such as {', '.join(nearest)}"
            )
        found.update(hits)
    return tuple(name for name in known if name in found)


def select(params: Any, include: Iterable[str], exclude: Iterable[str], what: str) -> tuple[str, ...]:
    """Returns the names matched by `include` and not by `exclude`, in the tree's order.

    Args:
      params: tree of arrays or of shapes.
      include: regular expressions of whole names.
      exclude: regular expressions of the names taken out again.
      what: the config section that holds the two, such as ``penalty``; only for the error.

    Raises:
      ConfigError: a pattern of either list matches no parameter.
    """
    dropped = set(match(params, exclude, f"{what}.exclude"))
    return tuple(name for name in match(params, include, f"{what}.include") if name not in dropped)


def mask(params: Any, selected: Collection[str]) -> Any:
    """Returns a tree of booleans shaped like `params`: True where the name is selected."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) in selected, params)


def log_rules(
    params: Any, decayed: Collection[str], penalised: Collection[str], layout: Mapping[str, str] | None = None
) -> None:
    """Logs one line per parameter (shape, weight decay, penalty, layout) and the totals, as one record.

    Args:
      params: tree of arrays or of shapes.
      decayed: names under weight decay.
      penalised: names under the orthogonality penalty.
      layout: of those that are split over devices, how.
    """
    leaves = names(params)
    width = max(map(len, leaves))

    def row(name: str, shape: str, size: int, decay: str, penalty: str, layout: str) -> str:
        return f"{name:<{width}}  {shape:<20} {size:>12,}  {decay:<5}  {penalty:<7}  {layout}".rstrip()

    rows = [
        row(
            name,
            "x".join(map(str, leaf.shape)),
            count(leaf),
            "decay" if name in decayed else "",
            "penalty" if name in penalised else "",
            (layout or {}).get(name, ""),
        )
        for name, leaf in leaves.items()
    ]
    total = [count([leaf for name, leaf in leaves.items() if name in group]) for group in (leaves, decayed, penalised)]
    logging.info(
        "%d parameters\n%s\ntotal %s, under weight decay %s, under the penalty %s",
        len(leaves),
        "\n".join(rows),
        *(f"{n:,}" for n in total),
    )
