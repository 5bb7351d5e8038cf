"""Weights under other people's names: their state dicts as our parameter trees, and back.

`files` reads and writes files, `families` says which of our arrays a tensor is, `describe` builds the config that
fits the tensors, `weights` uses all three, `export` writes for other libraries.
"""

from crate_jax.convert.families import FAMILIES, detect, export_state_dict, import_state_dict

__all__ = ["FAMILIES", "detect", "export_state_dict", "import_state_dict"]
