"""Weights under other people's names: the authors' PyTorch state dicts as our parameter trees."""

from crate_jax.convert.authors import FAMILIES, import_state_dict

__all__ = ["FAMILIES", "import_state_dict"]
