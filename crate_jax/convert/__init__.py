"""Weights under other people's names: their state dicts as our parameter trees, and back.

`files` reads and writes files, `families` says which of our arrays a tensor is, `describe` builds the config that
fits the tensors, `weights` uses all three, `export` writes for other libraries. The names are imported when they are
first used, so that the command can say in one line what is wrong where JAX cannot be imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crate_jax.convert.families import FAMILIES, detect, export_state_dict, import_state_dict

__all__ = ["FAMILIES", "detect", "export_state_dict", "import_state_dict"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from crate_jax.convert import families

    return getattr(families, name)
