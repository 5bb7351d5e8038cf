"""Reads a file of weights as a model, which is parameters and the config that fits them; and our own file format.

Our format is .safetensors with our own names (``encoder/blocks/mssa/subspaces/kernel``) and, as text under the key
``crate_jax`` of its metadata, JSON with the version of the format, the family of the names (``crate_jax``) and the
config. Exports to other formats hold the same text with the family of their names, so that a later import guesses
nothing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from crate_jax.config import base, parts, validate
from crate_jax.convert import beside, branches, files, flags, torch_crate
from crate_jax.convert.describe import Hints, config_of, grid_of, with_class_row
from crate_jax.convert.families import FAMILIES, import_state_dict
from crate_jax.convert.rules import Match, canonical_name, match
from crate_jax.errors import CheckpointError, ConfigError, escaped, some
from crate_jax.models import autoencoder, representation
from crate_jax.models.patches import grid_shape
from crate_jax.parallel.parameters import names
from crate_jax.workdir import bucket
from crate_jax.workdir.checkpoint_files import nest

log = logging.getLogger(__name__)

METADATA_KEY, VERSION, OURS = "crate_jax", 1, "crate_jax"
MAX_MESSAGE = 2000  # characters; it may hold values from a file
UNSURE = ("timm_vit", "beit", "hf_vit")  # families whose models have different statistics of pixels
MASK_TOKENS = ("encoder/embedding/mask_token", "encoder/mask_token")  # of patches; of a ResNet's pixels


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model that was read from a file.

    Attributes:
      family: the family of the file's names; `OURS` for our own names.
      config: the whole config, as a dictionary.
      params: nested dictionaries of float32 arrays: ``encoder``, and ``decoder`` where the file has one.
      match: how the file's names fit the family; None for our own names.
    """

    family: str
    config: dict[str, Any]
    params: dict[str, Any]
    match: Match | None


def load(path: str | os.PathLike[str], name: str = "", hints: Hints | None = None, prefix: str = "") -> Weights:
    """Reads a file of weights of any known model.

    What `hints` leave open comes from our own metadata if it is in the file. Otherwise it comes from a ``config.json``
    of timm or transformers beside the file, then from a training script's arguments in the file, then from the
    published models.

    Args:
      path: see :func:`crate_jax.convert.files.read`.
      name: a key of FAMILIES; empty: the tensors' names decide.
      hints: what is known about the model besides its tensors.
      prefix: what the names of the network begin with, if the file holds several; empty: `branches.PREFERRED` decides.

    Raises:
      CheckpointError: the file cannot be read, or does not fit a model; the message names the file.
    """
    path = files.weights_file(path) or path
    state, about = files.read(path, prefix)
    try:
        return _load(Path(path), state, about, name, hints or Hints(), prefix)
    except ConfigError as e:
        message = str(e)
        if len(message) > MAX_MESSAGE:
            message = f"{message[:MAX_MESSAGE]}..."
        raise CheckpointError(f"{path}: {message}") from None


def choose(state: files.Arrays, about: Mapping[str, Any], name: str, prefix: str) -> tuple[branches.Branch, Match]:
    """The network to read among all tensors of a file, and how its names fit its family; arguments as in :func:`load`.

    Raises:
      ConfigError: there is no known model, or several and none is preferred.
    """
    prefix = prefix.removeprefix("".join(f"{key}." for key in about["nested"]))
    for part in re.findall(r"[^.]+\.", about["prefix"]):
        prefix = prefix.removeprefix(part)
    branch = branches.find(state, prefix, name)
    found = match(FAMILIES[branch.family], [canonical_name(FAMILIES[branch.family], n) for n in branch.state])
    why = f"outside of the encoder '{branch.prefix}'"
    outside = {part if n == 1 else f"{part} ({n} tensors)": why for part, n in branch.outside.items()}
    others = {f"{keys} ({n} tensors)": "another network" for keys, n in about["others"].items()}
    return branch, dataclasses.replace(found, ignored={**found.ignored, **outside, **others})


def _load(path: Path, state: files.Arrays, about: Mapping[str, Any], name: str, hints: Hints, prefix: str) -> Weights:
    own = _own_metadata(about["metadata"])
    if own and own["family"] == OURS:
        config, found = own["config"], None
        try:
            params = nest(state)
        except (AttributeError, IndexError, TypeError, ValueError):
            raise ConfigError("one name stands for a tensor and for a group of tensors") from None
        for flag, value in (("--family", name), ("--prefix", prefix)):
            if value:
                raise ConfigError(f"{flag}={value}: its names are our own, {OURS}; leave the flag out")
        config = _with_flags(config, params, hints)
        require_fit(config, params)
        return Weights(OURS, config, params, found)
    branch, found = choose(state, about, name or (own["family"] if own else ""), prefix)
    if not own and branch.family == torch_crate.FAMILY and (theirs := torch_crate.config_beside(path)):
        own = {"family": branch.family, "config": theirs}
    if about["others"] or branch.outside:
        read = ".".join([*about["nested"], branch.prefix or "all tensors"])
        left = some([*about["others"], *branch.outside], ", ")
        log.info("%s: %s read as %s; not read: %s", path, read, branch.family, left)
    name, state = branch.family, branch.state
    read_names = {n: canonical_name(FAMILIES[name], n) for n in state}
    if empty := [n for n, a in state.items() if 0 in a.shape and read_names[n] not in found.ignored]:
        raise ConfigError(f"{name} weights: arrays without numbers, {some(empty, ', ')}")
    if own:
        config, c = own["config"], model_config(own["config"], {})
        grid = (0, 0) if name == "resnet" else grid_shape(c.data.image_size, c.encoder.patch_size)
        params = import_state_dict(name, state, grid)
        config = _with_flags(config, params, hints)
    else:
        hints = hints.or_else(beside.hints(path.parent)).or_else(_hints_of_script(about["args"]))
        hints = hints.or_else(_hints_of_names(branch))
        if found.problem():  # before grid_of, which needs some of these tensors
            raise ConfigError(f"{name} weights do not fit: {found.problem()}")
        state = dict(with_class_row(name, state, hints.image_size))
        grid = grid_of(name, state, hints.image_size)
        params = import_state_dict(name, state, grid)
        config = config_of(name, params, grid, hints).to_dict()
        if name in UNSURE and (hints.mean is None or hints.std is None):
            log.warning(
                "%s: neither a flag nor a file says what mean and std its images had: those of ImageNet are taken, "
                "while many of timm's and transformers' ViTs have 0.5; `crate-jax convert import` sets others with "
                "--mean=0.5,0.5,0.5 --std=0.5,0.5,0.5, an evaluation with --config.data.mean and --config.data.std",
                escaped(str(path)),
            )
    params = jax.tree.map(lambda a: np.ascontiguousarray(a, np.float32), params)
    require_fit(config, params)
    return Weights(name, config, params, found)


def _with_flags(config: dict[str, Any], params: Mapping[str, Any], hints: Hints) -> dict[str, Any]:
    if not flags.given(hints):
        return config
    require_fit(config, params)  # then what does not fit below is a flag
    return flags.applied(config, model_config(config, params), params, hints)


def require_used(path: str, loaded: Weights, hints: Hints) -> None:
    """Checks that the model has everything that flags have said of it, whoever wrote its file.

    Args:
      path: the file, for the message.
      loaded: what :func:`load` returned for these hints.
      hints: what the flags say.

    Raises:
      CheckpointError: the model lacks something, or its tensors show something else.
    """
    try:
        require_fit(_with_flags(loaded.config, loaded.params, hints), loaded.params)
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e}") from None


def _own_metadata(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    if METADATA_KEY not in metadata:
        return None
    try:
        own = json.loads(metadata[METADATA_KEY])
        if own["version"] <= VERSION:
            return {"family": own["family"], "config": own["config"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"its metadata '{METADATA_KEY}' is damaged") from None
    raise ConfigError(f"written by a later version of crate_jax (format {own['version']}, known here: {VERSION})")


def metadata(family: str, config: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file of weights: family of the names, and config."""
    return {METADATA_KEY: json.dumps({"version": VERSION, "family": family, "config": dict(config)})}


def save(path: str | os.PathLike[str], config: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Writes parameters in our own format; :func:`load` returns the same bits.

    Raises:
      CheckpointError: the file cannot be written.
    """
    flat = {n: np.asarray(a) for n, a in names(params).items()}
    files.write(path, flat, metadata(OURS, config))


def require_replaceable(
    path: Path, source: str | os.PathLike[str], exported: bool = False, others: Collection[Path] = ()
) -> None:
    """Checks that no file of somebody else, nor the one that is read, would be replaced by a file of weights.

    Args:
      path: the file of weights that will be written.
      source: the file, folder or workdir that was read; '': none.
      exported: whether an export writes it; else an import.
      others: files that will be written with it.

    Raises:
      ConfigError: one of the files is there, and no earlier import, or export, has written it.
    """
    local = os.fspath(source) and not bucket.is_address(source)
    read = files.weights_file(source) if local else None
    if read is not None and path.exists() and path.samefile(read):
        raise ConfigError(f"{path}: is the file that is read; choose another --out")
    try:
        before = _own_metadata(files.metadata_of(path)) if path.is_file() else None
    except ConfigError:
        before = None  # damaged, or of a later version
    if before is not None and (before["family"] != OURS) == exported:
        return
    if found := [file for file in (path, *others) if file.is_file()]:
        what = "an export" if exported else "an import"
        raise ConfigError(f"{found[0]}: exists, and is not the result of {what}; remove it, or choose another --out")


def model_config(config: Mapping[str, Any], params: Mapping[str, Any]) -> ConfigDict:
    """The base config, with the keys that describe a model taken from `config`.

    Args:
      config: a config, perhaps of an older version that lacks keys.
      params: the model's parameters; without ``decoder`` the config's decoder and corruption are not checked.

    Raises:
      ConfigError: `config` is not a config, or no model can be built from it.
    """
    c = base()
    c.job = "evaluate"  # this job does not check steps
    try:
        for section in ("encoder", "decoder", "corruption", "loss", "data"):
            c[section].update({key: value for key, value in config[section].items() if key in c[section]})
        read = config.get("evaluation", {})
        c.evaluation.update({key: read.get(key, c.evaluation[key]) for key in ("pool", "layer")})
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ConfigError(f"its config is damaged ({type(e).__name__}: {e})") from None
    validate(c, parts(c, params))
    return c


def require_fit(config: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Checks names and shapes of the encoder, and of the decoder if there is one, against the config.

    Raises:
      ConfigError: arrays are missing, unexpected or of another shape (the first are listed).
    """
    c = model_config(config, params)
    init = autoencoder.init_params if "decoder" in params else representation.init_params
    shapes = jax.eval_shape(lambda: init(c, jax.random.key(0)))
    wanted = {n: tuple(s.shape) for n, s in names(shapes).items()}
    given = {n: np.shape(a) for n, a in names({part: params.get(part, {}) for part in shapes}).items()}
    if "decoder" not in params:  # an encoder alone does not need the mask token, and may have it
        given = {n: shape for n, shape in given.items() if n not in MASK_TOKENS}
    wrong = [
        f"{n}: {list(given[n]) if n in given else 'missing'}, not {list(wanted[n]) if n in wanted else 'expected'}"
        for n in sorted(wanted.keys() | given.keys())
        if wanted.get(n) != given.get(n)
    ]
    if wrong:
        raise ConfigError(f"the weights do not fit together: {some(wrong, '; ')}")


def _hints_of_names(branch: branches.Branch) -> Hints:
    """The padding of a 3 x 3 stem where the names show whose code made the ResNet."""
    theirs = {"classifier."} <= branch.outside.keys() and branch.prefix in ("backbone.", "encoder.")  # solo-learn
    no_pool = branch.numbered == 2 or any(".shortcut." in name for name in branch.state)  # lightly's ResNetGenerator
    return Hints(stem_padding=1 if no_pool else 2 if theirs else None)


def _hints_of_script(args: Mapping[str, Any]) -> Hints:
    """Hints from the arguments of MAE's training script."""
    normalised, ratio = args.get("norm_pix_loss"), args.get("mask_ratio")
    return Hints(
        target=None if normalised is None else "patch_normalised" if normalised else "pixel",
        mask_ratio=ratio if isinstance(ratio, float) else None,
    )
