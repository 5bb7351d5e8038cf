"""Finds the encoder in a training script's checkpoint, beside projectors, momentum copies, queues and the like.

A branch is what the names of a network's tensors begin with, such as ``backbone.``. Each branch that holds a known
model is a candidate; if there are several, PREFERRED decides. Names that only number the parts of a ResNet
(``nn.Sequential``, as lightly builds it) are turned into torchvision's.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Collection, Mapping

import numpy as np

from crate_jax.convert.families import ENCODER_OF_TIMM, FAMILIES, SIGNATURES, detect
from crate_jax.convert.rules import Array, canonical_name, match
from crate_jax.errors import ConfigError, some

# The networks that methods evaluate: a teacher or a moving average, else the trained one before its momentum copies.
# Each in turn narrows the choice, until one is left.
PREFERRED = (
    "teacher.",  # DINO, iBOT, DINOv2
    "state_dict_ema.",
    "model_ema.",
    "ema_model.",
    "ema.",
    "online.",
    "backbone.",  # solo-learn, lightly, DINO, Barlow Twins, VICReg, mmselfsup
    "encoder_q.",  # MoCo v1 and v2
    "base_encoder.",  # MoCo v3
    "online_encoder.",  # BYOL
    "online_network.",  # BYOL
    "teacher_backbone.",  # lightly's DINO, as DINO evaluates its teacher
    "student_backbone.",
    "encoder.",  # SimSiam, solo-learn before 1.0.4
)
BLOCK = r"^((?:.*\.)?)(\d+)\.0\.conv1\.weight$"  # of a numbered ResNet
MAX_NETWORKS = 100  # that one file may hold beside each other; each is compared with the rules of its family
CHUNK = r"^((?:.*\.)?)blocks\.0\.0\.attn\.qkv\.weight$"  # of a ViT whose blocks are in chunks (DINOv2)


@dataclasses.dataclass(frozen=True)
class Branch:
    """One network of a checkpoint.

    Attributes:
      prefix: what its names begin with in the file; empty if the file holds nothing else.
      state: its tensors, by the names that its family knows.
      family: a key of FAMILIES.
      outside: the other parts of the file -> number of their tensors.
      numbered: number of modules before the first stage, if the names were numbers; else 0.
    """

    prefix: str
    state: dict[str, Array]
    family: str
    outside: Mapping[str, int]
    numbered: int


def find(state: Mapping[str, Array], prefix: str = "", family: str = "") -> Branch:
    """Chooses the network to read.

    Args:
      state: all tensors of a file.
      prefix: what the network's names begin with; empty: chosen by PREFERRED.
      family: a key of FAMILIES; empty: detected.

    Raises:
      ConfigError: there is no known model, or several and none is preferred.
    """
    if family and family not in FAMILIES:
        raise ConfigError(f"unknown model family '{family}'; valid: {', '.join(FAMILIES)}")
    if not prefix:
        whole, shift = _named(state)
        candidates = _candidates(state)
        if _known(whole) or not candidates:
            return Branch("", whole, family or detect(whole), {}, shift)
        if len(candidates) > MAX_NETWORKS:
            raise ConfigError(f"holds {len(candidates)} networks: choose one with `convert import` (--prefix)")
        if len(candidates) > 1:
            parts = {p: [name.removeprefix(p) for name in state if name.startswith(p)] for p in candidates}
            candidates = [p for p in candidates if fits(parts[p])] or candidates
        prefix = _choose(candidates)
    inside = {name.removeprefix(prefix): a for name, a in state.items() if name.startswith(prefix)}
    if not inside:
        known = some(sorted(_parts(state, "")), ", ")
        raise ConfigError(f"--prefix={prefix}: no tensor's name begins with it; the parts are {known}")
    named, shift = _named(inside)
    outside = _parts([name for name in state if not name.startswith(prefix)], prefix)
    return Branch(prefix, named, family or detect(named), outside, shift)


def holds_network(names: Collection[str]) -> bool:
    """Whether tensors of these names hold something like a known model, by itself or as a branch."""
    return _known(_named(_without_numbers(names))[0]) or bool(_candidates(names))


def fits(names: Collection[str]) -> bool:
    """Whether tensors of these names hold a network that can be read: no tensor of it is missing or unknown."""
    try:
        branch = find(_without_numbers(names))
    except ConfigError:
        return False
    family = FAMILIES[branch.family]
    return not match(family, [canonical_name(family, name) for name in branch.state]).problem()


def _without_numbers(names: Collection[str]) -> dict[str, Array]:
    return dict.fromkeys(names, np.empty(0))


def _known(state: Mapping[str, Array]) -> bool:
    try:
        detect(state)
    except ConfigError:
        return False
    return True


def _candidates(state: Collection[str]) -> list[str]:
    """The prefixes of the networks of known families."""
    ends = [*(name for _, name in SIGNATURES), ENCODER_OF_TIMM]
    found = {name.removesuffix(end) for name in state for end in ends if name.endswith(f".{end}")}
    return sorted(found | {m[1] for name in state for block in (BLOCK, CHUNK) if (m := re.match(block, name)) and m[1]})


def _choose(found: list[str]) -> str:
    """The preferred one of some prefixes.

    Raises:
      ConfigError: see :func:`find`.
    """
    for preferred in PREFERRED:
        found = [prefix for prefix in found if f".{preferred}" in f".{prefix}"] or found
    if len(found) == 1:
        return found[0]
    raise ConfigError(f"holds several networks, {some(found, ', ')}: choose one with `convert import` (--prefix)")


def _parts(names: Mapping[str, Array] | list[str], prefix: str) -> dict[str, int]:
    """Groups names by their first component that differs from `prefix`.

    >>> _parts(["a.b.weight", "a.b.bias", "queue"], "a.encoder.")
    {'a.b.': 2, 'queue': 1}
    """
    count: collections.Counter[str] = collections.Counter()
    for name in names:
        *parents, leaf = name.split(".")
        part = ""
        for parent in parents:
            part += f"{parent}."
            if not prefix.startswith(part):
                break
        else:
            part += leaf
        count[part] += 1
    return dict(count)


def _named(state: Mapping[str, Array]) -> tuple[dict[str, Array], int]:
    """Names a ResNet's numbered parts as torchvision does; and the number of modules before its stages, else 0."""
    stages = sorted({int(m[2]) for name in state if (m := re.match(BLOCK, name)) and not m[1]})
    if not stages or stages != list(range(stages[0], stages[0] + 4)) or not {"0.weight", "1.weight"} <= state.keys():
        return dict(state), 0
    parts = {"0": "conv1", "1": "bn1", **{str(stage): f"layer{k}" for k, stage in enumerate(stages, 1)}}

    def named(name: str) -> str:
        first, dot, rest = name.partition(".")
        return f"{parts.get(first, first)}{dot}{rest}"

    return {named(name): a for name, a in state.items()}, stages[0]
