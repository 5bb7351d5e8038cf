"""What is optimised, one file per method: pure functions; no file, no mesh, no mutable state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from crate_jax.methods import classify, reconstruction, segment
from crate_jax.methods.method import Method
from crate_jax.validation import Section


@dataclasses.dataclass(frozen=True)
class Row:
    """A method of the table.

    Attributes:
      build: (validated config, training images) -> Method.
      parts: the sections of the config that mean something to the method; others are not checked.
      sections: those that the method declares; another method may read them too.
    """

    build: Callable[[ConfigDict, Any], Method]
    parts: tuple[str, ...]
    sections: tuple[Section, ...] = ()


METHODS: dict[str, Row] = {
    "reconstruction": Row(reconstruction.build, ("encoder", "corruption", "decoder", "loss"), reconstruction.SECTIONS),
    "classify": Row(classify.build, ("encoder", "finetune"), classify.SECTIONS),
    "segment": Row(segment.build, ("encoder", "finetune", "segment"), segment.SECTIONS),
}
