"""What ``import crate_jax`` offers in Python: encoders that others or you have trained, and pre-training.

    import crate_jax

    encoder = crate_jax.load("runs/mine")  # a run's workdir; or weights of MAE, timm, CRATE, solo-learn ...
    features = encoder.features("photos/")  # (n, D) float32: a folder, a NumPy array, images of PIL

Wrong arguments raise :class:`crate_jax.UserError` (ConfigError, DataError, CheckpointError) with one clear line.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from crate_jax import config_files
from crate_jax.analysis.whitebox import measures, pictures
from crate_jax.config import keys_of, parts, require_keys, validate
from crate_jax.convert import pretrained, weights
from crate_jax.data import given
from crate_jax.data.folder import FolderSource
from crate_jax.data.given import Images
from crate_jax.data.pixels import normalise
from crate_jax.errors import CheckpointError, ConfigError, UserError, did_you_mean
from crate_jax.evals.features import encode_split
from crate_jax.methods import classify, segment
from crate_jax.methods.reconstruction import reconstruct
from crate_jax.models import (
    ENCODERS,
    autoencoder,
    build_encoder,
    corruption as corruptions,
    prefix_tokens,
    representation,
)
from crate_jax.parallel import distributed, sharding
from crate_jax.validation import check_values, flatten, place

__all__ = ["Encoder", "Images", "Reconstruction", "UserError", "get_config", "list_configs", "load", "pretrain"]

log = logging.getLogger(__name__)

Params = dict[str, Any]
Read = Callable[..., jax.Array]  # (parameters, ..., images uint8 (b, H, W, C)) -> (b, ...)
P = ParamSpec("P")
R = TypeVar("R")


def list_configs() -> dict[str, str]:
    """The library's configs, name -> what it is for.

    >>> list_configs()["vit_mae"]
    'ViT-MAE on ImageNet-1K at 224 px (He et al. 2022), the baseline of both reconstruction papers.'
    """
    return {name: config_files.card(name) for name in config_files.names()}


def _text(name: str, value: str | os.PathLike[str]) -> str:
    """An argument, `name`, that must be a text or a path, as text."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise ConfigError(f"{name}={text!r:.60}: must be a text or a path, not {type(text).__name__}")
    return text


def get_config(name: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """A config of the library or of a file, as ``--config`` and ``--config.KEY`` give it on the command line.

    Args:
      name: a name of :func:`list_configs`, or a path; what follows a colon is the file's argument.
      overrides: values by the whole names of keys.

    Raises:
      ConfigError: there is no such file, it fails, or there is no such key, or a value breaks its rule, or an argument
        has another type.

    >>> get_config("cifar10:encoder=vit", {"optimizer.lr": 3e-4, "data.image_size": (64, 64)}).data.image_size
    (64, 64)
    """
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        raise ConfigError(
            f"overrides={overrides!r:.60}: must be a dictionary with names of keys, such as {{'optimizer.lr': 3e-4}}"
        )
    config = config_files.named(_text("name", name))
    require_keys(config)
    for key, value in overrides.items():
        _set(config, key, value)
    require_keys(config)
    given = {key: value for key, value in flatten(config).items() if key in overrides}
    check_values(given, {key: keys_of(config)[key] for key in given})
    return config


def _set(config: ConfigDict, key: str, value: Any) -> None:
    keys = flatten(config)
    if key not in keys:
        raise ConfigError(f"config: there is no key {key!r}{did_you_mean(key, keys)}")
    group, leaf = place(config, key)
    value = value.item() if isinstance(value, np.generic) else value  # out of np.linspace, say
    if isinstance(group[leaf], tuple) and not isinstance(value, list | tuple):
        value = (value,)  # as a flag is read: data.image_size=64
    try:
        group[leaf] = value
    except TypeError as e:
        with group.ignore_type():
            group[leaf] = value
        require_keys(config)  # says what type the key must have
        raise ConfigError(f"config.{key}={value!r}: {e}") from None


def _changeable(config: ConfigDict | str | os.PathLike[str]) -> ConfigDict:
    """The config of a name; the config itself, or a copy of the config of an :class:`Encoder`."""
    config = config if isinstance(config, ConfigDict) else get_config(_text("config", config))
    # ConfigDict(config) would share its sections with the next such copy.
    return ConfigDict(config.to_dict()) if isinstance(config, FrozenConfigDict) else config


def pretrain(
    config: ConfigDict | str | os.PathLike[str], workdir: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Pre-trains an encoder, or continues the run that `workdir` holds, as ``crate-jax pretrain`` does.

    Ctrl-C saves the state and raises :class:`crate_jax.parallel.interrupt.Interrupted`; a call with the same `workdir`
    continues.

    Args:
      config: a config, or a name as for :func:`get_config`.
      workdir: the run's folder, which :func:`load` reads afterwards. None: a new folder ``runs/TIME`` in the current
        one; the log, the result and the note of an exception name it. To continue its run, give it as `workdir`.

    Returns:
      what the run writes to ``summary.json``: steps, loss, k-NN and probe accuracy ...; and ``workdir``.

    Raises:
      UserError: the config, the images or the workdir cannot be used; the message, one line, says why.
      crate_jax.data.reading.Stalled: images do not come (config.data.stall_seconds); a call with the same `workdir`
        continues.
    """
    from crate_jax.jobs import JOBS  # here: with Matplotlib and all jobs, which an encoder does not need

    config = _changeable(config)
    require_keys(config)
    if config.job != "pretrain":
        raise ConfigError(f"config.job={config.job!r}: must be pretrain; crate-jax {config.job} runs the other jobs")
    if workdir is not None:
        folder = _text("workdir", workdir)
        return JOBS["pretrain"].run(config, folder) | {"workdir": folder}
    validate(config)  # before there is a folder
    folder = str(_new_folder())
    log.info("workdir %s", folder)
    try:
        return JOBS["pretrain"].run(config, folder) | {"workdir": folder}
    except BaseException as e:  # also of Ctrl-C; a notebook shows no log unless it is set up
        e.add_note(f"workdir: {folder}")
        raise


def _new_folder() -> Path:
    """A new folder ``runs/TIME`` in the current one.

    Raises:
      UserError: it cannot be created, or there are several processes, which need one folder.
    """
    if distributed.processes() > 1:
        raise ConfigError("workdir is missing: several processes must be given the same one")
    runs, now, number = Path("runs").absolute(), time.strftime("%Y-%m-%d_%H-%M-%S"), 1
    try:
        runs.mkdir(exist_ok=True)
        while True:
            folder = runs / (now if number == 1 else f"{now}_{number}")
            with contextlib.suppress(FileExistsError):  # of another run, which stays as it is
                folder.mkdir()
                return folder
            number += 1
    except OSError as e:
        raise UserError(f"workdir {runs}: no folder can be created in it ({e.strerror})") from None


def load(path: str | os.PathLike[str]) -> Encoder:
    """A pre-trained encoder.

    Args:
      path: a run's workdir, or one of its checkpoints, ``RUN/checkpoints/STEP``; or a file or folder of weights: ours,
        or those of MAE, timm, Hugging Face, CRATE, ROPIM, solo-learn, lightly and others (docs/weights.md); also in a
        bucket, ``gs://`` or ``s3://`` (docs/buckets.md). Nothing in a file is executed.

    Returns:
      the encoder; its activations are in float32, as in evaluation, whatever the run's were in.

    Raises:
      CheckpointError: there is no (such) checkpoint, it is damaged, or its model is unknown.
      ConfigError: `path` is neither a text nor a path.
    """
    found = pretrained.load(_text("path", path), "path")
    try:
        config = weights.model_config(found.config, found.params)
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e}") from None
    config.encoder.norm_groups = 1  # of the run's batches
    if not prefix_tokens(config):
        config.evaluation.pool = "mean"
    task = found.config.get("job", "") if "head" in found.params else ""
    if task in PREDICTS:
        for section in ("finetune", "segment"):
            config[section].update({k: v for k, v in found.config.get(section, {}).items() if k in config[section]})
    return Encoder(found.name, config, found.params, task=task, classes=found.classes)


def _probabilities(config: ConfigDict, classes: int) -> Read:
    scores = classify.scorer(config, classes)
    return lambda params, images_uint8: jax.nn.softmax(scores(params, images_uint8))


PREDICTS: dict[str, Callable[[ConfigDict, int], Read]] = {"finetune": _probabilities, "segment": segment.predictor}


# Errors name the keys of a config; whoever calls a method of an encoder has given an argument instead.
REWORDED = (
    (r"config\.evaluation\.(pool|layer)=", r"\1="),
    (r"config\.encoder\.name='(\w+)':? has", r"\1 has"),
    (r" \([^()]*max_undecodable[^()]*\); repair or remove them, or allow more", "; repair them, or leave them out"),
    (r"^evaluation: ", ""),
)


def _worded(method: Callable[P, R]) -> Callable[P, R]:
    """Words the errors of an encoder's method for people who have set no keys."""

    @functools.wraps(method)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except UserError as e:
            text = str(e)
            for pattern, words in REWORDED:
                text = re.sub(pattern, words, text)
            raise (e if text == str(e) else type(e)(text)) from None

    return called


class Reconstruction(NamedTuple):
    """What :meth:`Encoder.reconstruct` returns, each float32 (n, H, W, C) in 0..1.

    Attributes:
      original: the images after the evaluation crop.
      corrupted: what the encoder got, P x.
      added: what the decoder adds, (I - P) x^; where a mask left a patch, the colour of 0, the data's mean.
      completed: both together, P x + (I - P) x^.
    """

    original: np.ndarray
    corrupted: np.ndarray
    added: np.ndarray
    completed: np.ndarray


class Encoder:
    """An encoder, with the transform of its images; :func:`load` and :meth:`untrained` make one.

    All methods take `images` in one of these forms, any number of them, and return NumPy arrays with one row per image:

    * an array, uint8 (n, H, W, C), or one image (H, W, C), with C = ``config.data.channels``; for one and three
      channels also grey images (n, H, W), for three (n, H, W, 1), and (n, C, H, W), unless it may be (n, H, W, C);
    * an image of PIL, or a list of images of PIL, of arrays (H, W, C) or (H, W) and of paths, of any sizes;
    * the path of an image, or of a folder, whose images are taken without labels, in the order of :meth:`paths`.

    Images are cropped and resized as in evaluation (``config.data.eval_crop``, ``config.data.image_size``), encoded in
    batches on all devices, and not corrupted. An image that cannot be decoded is an error. The programs are compiled
    once per number of images up to the next power of two, at most `batch_size`.

    Attributes:
      name: the encoder's origin.
      config: a whole config. It cannot be changed, since the compiled programs depend on it;
        ``ConfigDict(config.to_dict())`` is a copy, of which you can make another encoder. The sections data, encoder,
        decoder, corruption and loss are those of the training run; evaluation.pool and evaluation.layer say which
        tokens :meth:`features` reads.
      params: nested dictionaries of NumPy arrays with the keys ``encoder`` and, after a reconstruction, ``decoder``.
        Arrays may be replaced by others; numbers that change inside an array are not seen.
      module: the Linen module ``(images, float32, normalised) -> tokens``, for your own code and, by
        ``flax.nnx.bridge.ToNNX``, for NNX.
      batch_size: images encoded at once, over all devices.
      task: the job of the run whose head :meth:`predict` reads, ``finetune`` or ``segment``; '' if it lacks a head.
      classes: the names of a fine-tuned run's classes, in the order of :meth:`predict`; () if they are not known.

    >>> encoder = Encoder.untrained("quickstart:debug")  # 8 x 8 images, 16 patches, 64 numbers per token
    >>> encoder.features(np.zeros((3, 20, 28, 3), np.uint8)).shape
    (3, 64)
    """

    def __init__(
        self,
        name: str,
        config: ConfigDict,
        params: Params,
        batch_size: int = 256,
        task: str = "",
        classes: tuple[str, ...] = (),
    ) -> None:
        self.name, self.task, self.classes = name, task, classes
        self._config = FrozenConfigDict(config.to_dict())
        self.params = params
        self.module: nn.Module = build_encoder(config)
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise ConfigError(f"batch_size={batch_size!r:.60}: must be a whole number from 1")
        self.batch_size = batch_size
        self._compiled: dict[tuple[Any, ...], tuple[Callable[..., jax.Array], jax.ShapeDtypeStruct]] = {}
        self._copied: tuple[list[Any], Params] = ([], {})  # arrays of `params`, and their copies on the devices

    @property
    def config(self) -> FrozenConfigDict:  # noqa: D102 - under the class's attributes
        return self._config

    @classmethod
    def untrained(cls, config: ConfigDict | str | os.PathLike[str], seed: int = 0) -> Encoder:
        """A random encoder, a baseline or a start for your own training; `config` as for :func:`pretrain`.

        Raises:
          ConfigError: the config cannot be built.
        """
        config = _changeable(config)
        validate(config)
        params = jax.device_get(jax.jit(functools.partial(representation.init_params, config))(jax.random.key(seed)))
        return cls("untrained", config, params)

    def __repr__(self) -> str:
        c = self.config
        return f"Encoder({self.name!r}, {c.encoder.name}, image_size={tuple(c.data.image_size)})"

    def paths(self, images: Images) -> list[str]:
        """What each row that the other methods return for `images` comes from.

        Of a folder these are the paths of all images below it, as bytes in increasing order ("B" before "a"); a path is
        itself, and another image ``images[3]``.

        Raises:
          DataError: `images` is none of the forms, or there are none.
        """
        source = given.source(images, int(self.config.data.channels))
        name = source.path if isinstance(source, FolderSource) else source.name
        return [name(i) for i in range(len(source))]

    @_worded
    def features(self, images: Images, pool: str | None = None, layer: int | None = None) -> np.ndarray:
        """One vector per image, (n, D) float32, (n, 2 D) for ``cls_mean``.

        Args:
          images: see the class.
          pool: ``cls``, the class token; ``mean``, the mean of the patch tokens; ``cls_mean``, both. None: as
            config.evaluation.pool says, which is the run's own.
          layer: the block (ResNet: stage) whose tokens are read, from 1; 0: the output. None: config.evaluation.layer.

        Raises:
          ConfigError: there is no such pooling or layer, or no class token.
          DataError: an image cannot be decoded, or `images` is none of the forms.
        """
        config = self._with(pool=pool, layer=layer)
        read = representation.build(config)
        key = ("features", config.evaluation.pool, config.evaluation.layer)
        return self._rows(images, key, lambda params, x: read(params, normalise(x, config)))

    @_worded
    def tokens(self, images: Images, layer: int | None = 0) -> np.ndarray:
        """The tokens of each image, (n, T + N, D) float32: T = 1 class token (ResNet: none), then N patch tokens.

        Args:
          images: see the class.
          layer: the block (ResNet: stage) whose tokens are read, from 1; 0: the output, after the final norm.

        Raises:
          ConfigError: there is no such layer.
          DataError: see :meth:`features`.
        """
        config = self._with(layer=layer)
        chosen, layers = config.evaluation.layer, representation.layers(config)

        def read(params: Params, images_uint8: jax.Array) -> jax.Array:
            output, by_layer = layers(params, normalise(images_uint8, config))
            return by_layer[chosen - 1] if chosen else output

        return self._rows(images, ("tokens", chosen), read)

    @_worded
    def attention(self, images: Images, layer: int | None = None) -> np.ndarray:
        """The attention of the class token to the patches, (n, heads, h, w) float32; each map sums to 1.

        Args:
          images: see the class.
          layer: the block, from 1; None: the last but one, as in arXiv 2404.02446, section B.3.2. The output, 0, has
            none.

        Raises:
          ConfigError: the encoder has no class token (ResNet), or there is no such layer.
          DataError: see :meth:`features`.
        """
        config = self._with(layer=layer)
        if layer == 0:
            raise ConfigError("layer=0: the output has no attention; blocks count from 1")
        block = config.evaluation.layer - 1 if layer else None
        read = functools.partial(pictures.class_attention, config, block=block)
        return self._rows(images, ("attention", block), read)

    @_worded
    def coding_rate(self, images: Images, subspaces: bool = False) -> np.ndarray:
        """The coding rate of the patch tokens after the attention step of each block, (n, L) float32, in nats.

        Args:
          images: see the class.
          subspaces: False: R(Z), eq. 2.4 of arXiv 2404.02446; True: R^c(Z | U_1..U_H), eq. 2.5, only for CRATE.

        Raises:
          ConfigError: the encoder has no blocks (ResNet), or no subspaces.
          DataError: see :meth:`features`.
        """
        config, name = _changeable(self.config), self.config.encoder.name
        if not ENCODERS[name].patches or (subspaces and name != "crate"):
            what = "subspaces" if subspaces else "attention"
            raise ConfigError(f"{name} has no {what}, so it has no such coding rate")
        measure, measured = measures.build(config, ("paper",)), "subspace_rate" if subspaces else "rate"

        def read(params: Params, images_uint8: jax.Array) -> jax.Array:
            keys_B = jax.random.split(jax.random.key(0), len(images_uint8))  # of a corruption that is not used
            layers = measure({"encoder": params["encoder"]}, normalise(images_uint8, config), keys_B)
            return layers["encoder"][measured].T

        return self._rows(images, ("coding_rate", subspaces), read)

    @_worded
    def predict(self, images: Images) -> np.ndarray:
        """What a fine-tuned run says of each image.

        Returns:
          of a run of job ``finetune``: the probabilities of its classes, (n, C) float32, in the order of ``classes``;
          of job ``segment``: the class of each pixel of the whole image, which is resized to ``config.data.image_size``
          whatever its aspect, (n, H, W) int32.

        Raises:
          ConfigError: there is not a head: the run has pre-trained, or the weights are those of an encoder only.
          DataError: see :meth:`features`.
        """
        if self.task not in PREDICTS:
            raise ConfigError(
                f"{self.name}: lacks a head that predicts classes; give the workdir of a fine-tuning "
                "(docs/evaluation.md) or of a segmentation (docs/segmentation.md)"
            )
        config, classes = _changeable(self.config), self.params["head"]["linear"]["kernel"].shape[-1]
        read, segments = PREDICTS[self.task](config, classes), self.task == "segment"
        return self._rows(images, ("predict",), read, stretched=segments)

    @_worded
    def reconstruct(self, images: Images, seed: int = 0) -> Reconstruction:
        """Images, their corruption, and what the decoder makes of it.

        Args:
          images: see the class.
          seed: seed of the corruptions. An image's corruption also depends on its place in its batch.

        Raises:
          ConfigError: there is no decoder.
          DataError: see :meth:`features`.
        """
        config = _changeable(self.config)
        if "decoder" not in self.params:
            raise ConfigError(f"{self.name}: has no decoder, so it reconstructs nothing")
        apply: Any = autoencoder.build(config).apply
        sample = corruptions.sampler(config, *autoencoder.patch_numbers(config))

        def read(params: Params, key: jax.Array, images_uint8: jax.Array) -> jax.Array:
            trained = {name: params[name] for name in ("encoder", "decoder")}
            corruption = sample(jax.random.split(key, len(images_uint8)))
            return jnp.stack(reconstruct(config, apply, corruption, trained, normalise(images_uint8, config)), axis=1)

        columns = self._rows(images, ("reconstruct",), read, jax.random.key(seed))
        return Reconstruction(*np.moveaxis(columns, 1, 0))

    def _with(self, **evaluation: Any) -> ConfigDict:
        """The config with other entries of config.evaluation, validated; those that are None stay."""
        config = _changeable(self.config)
        for key, value in evaluation.items():
            if value is not None:
                _set(config, f"evaluation.{key}", value)
        validate(config, parts(config, self.params))
        return config

    def _placed(self) -> Params:
        """The parameters on the devices."""
        arrays = jax.tree.leaves(self.params)
        if len(arrays) != len(self._copied[0]) or any(map(operator.is_not, arrays, self._copied[0])):
            self._copied = arrays, jax.device_put(self.params, sharding.replicated(self._mesh))
        return self._copied[1]

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        return sharding.make_mesh(len(sharding.all_devices()), 1)

    def _rows(
        self, images: Images, key: tuple[Any, ...], read: Read, *more: jax.Array, stretched: bool = False
    ) -> np.ndarray:
        """What `read` (parameters, *more, images) returns for each image; `key` names it: it is compiled once.

        The images are cropped and resized as in evaluation, or with `stretched` as a segmentation's.
        """
        source = given.source(images, int(self.config.data.channels))
        source.stretched = stretched
        config = _changeable(self.config)
        config.data.max_undecodable = 0.0  # rows and images go together
        config.evaluation.batch_size = min(self.batch_size, 1 << (len(source) - 1).bit_length())
        if key not in self._compiled:

            def flat(*args: Any) -> jax.Array:
                found = read(*args)
                return found.reshape(len(found), -1).astype(jnp.float32)

            one = jax.ShapeDtypeStruct((1, *config.data.image_size, config.data.channels), np.uint8)
            jitted = jax.jit(sharding.on_mesh(self._mesh, flat), out_shardings=sharding.split(self._mesh))
            self._compiled[key] = jitted, jax.eval_shape(read, self.params, *more, one)
        compiled, made = self._compiled[key]
        rows, _ = encode_split(
            functools.partial(compiled, self._placed(), *more), config, source, np.arange(len(source)), self._mesh
        )
        return rows.reshape(len(rows), *made.shape[1:]).astype(made.dtype, copy=False)
