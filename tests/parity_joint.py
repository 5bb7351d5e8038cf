"""Replays the first steps of the joint-embedding methods against solo-learn's own classes (tests/golden/README.md).

A file of the kind ``steps_METHOD.npz`` holds images, weights before the first step and the whole state after each step
of a run with a tiny encoder and plain SGD. Here the library's own method, optimiser and `after` make the same steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from ml_collections import ConfigDict

import crate_jax.methods as methods
from crate_jax import config as configs
from crate_jax.methods import joint
from crate_jax.methods.method import Method, Progress
from crate_jax.models import batch_norm
from crate_jax.models.batch_norm import BatchNorm
from crate_jax.models.projector import MLP
from crate_jax.training import optimizer

File = Mapping[str, np.ndarray]
Errors = dict[str, float]
WIDTH, CLASSES = 16, 7


class Tiny(nn.Module):
    """The encoder of the files: two 3x3 convolutions of stride 2 with batch norm, then the mean over the map."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        for i, width in ((1, 8), (2, WIDTH)):
            x_BHWC = nn.Conv(width, (3, 3), 2, 1, use_bias=False, name=f"conv{i}")(x_BHWC)
            x_BHWC = nn.relu(BatchNorm(name=f"bn{i}")(x_BHWC, train))
        return x_BHWC.mean((1, 2))


def tiny_encoder() -> joint.Encoder:
    net = Tiny()
    return joint.Encoder(
        lambda key: net.init(key, jnp.zeros((2, 8, 8, 3)), False)["params"],
        lambda tree, images, keys: batch_norm.train(net, tree, images, True),
        WIDTH,
    )


class Source:
    """All that a method asks of the training images."""

    class_names = tuple("abcdefg")

    def __init__(self, images: int) -> None:
        self._images = images

    def __len__(self) -> int:
        return self._images


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a state_dict: where it lies in {student, target, online, own entries}, and how it is laid out."""

    path: tuple[str, ...]
    load: Callable[[np.ndarray], np.ndarray] = lambda x: x
    dump: Callable[[np.ndarray], np.ndarray] = lambda x: x


def transposed(*path: str) -> Entry:
    return Entry(path, np.transpose, np.transpose)


def entry_of_leaf(path: tuple[str, ...], leaf: str) -> tuple[str, Entry]:
    """(name in PyTorch, entry) of a parameter of a layer."""
    kind = path[-1]
    if kind.startswith("conv"):
        return "weight", Entry((*path, leaf), lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
    if leaf == "kernel":
        return "weight", transposed(*path, leaf)
    return {"scale": "weight"}.get(leaf, leaf), Entry((*path, leaf))


def mlp_places(module: MLP) -> dict[str, int]:
    """The number of each layer of an MLP in a torch.nn.Sequential."""
    places, n = {}, 0
    for i in range(len(module.widths)):
        places[f"layer{i}"], n = n, n + 1
        hidden = i < len(module.widths) - 1
        if module.norm if hidden else module.last != "none":
            places[f"norm{i}"], n = n, n + 1
        n += hidden
    return places


def network_entries(root: str, name: str, prefix: str, tree: Any, places: Mapping[str, Any]) -> dict[str, Entry]:
    """The entries of a network whose parts are numbered or renamed by `places`; `prefix` ends without a dot."""
    out = {}
    for path in traverse_util.flatten_dict(tree):
        part = ".".join(str(places.get(p, p)) for p in path[:-1])
        leaf, entry = entry_of_leaf((root, name, *path[:-1]), path[-1])
        out[".".join(filter(None, (prefix, part, leaf)))] = entry
    return out


def entries(algorithm: joint.Algorithm, state: Any) -> dict[str, Entry]:
    """The entries of encoder, heads made of MLPs, their slow copies and the classifier."""
    out = {"classifier.weight": transposed("online", "kernel"), "classifier.bias": Entry(("online", "bias"))}
    for root, prefix in (("student", ""), ("target", "momentum_")):
        for name, tree in state.get(root, {}).items():
            if name == "encoder":
                out |= network_entries(root, name, f"{prefix}backbone", tree, {})
            elif isinstance(algorithm.heads[name][0], MLP):
                out |= network_entries(root, name, prefix + name, tree, mlp_places(algorithm.heads[name][0]))
    return out


def joined(params: Any, carried: Any) -> dict[str, Any]:
    """One tree of everything: {student, target, online, own entries}."""
    rest = {k: v for k, v in carried.items() if k != joint.STATISTICS}
    return {"student": batch_norm.merge(params, carried.get(joint.STATISTICS, {})), **rest}


def parted(state: dict[str, Any]) -> tuple[Any, Any]:
    """Inverts :func:`joined`."""
    params, statistics = batch_norm.split(state["student"])
    return params, {**{k: v for k, v in state.items() if k != "student"}, joint.STATISTICS: statistics}


@dataclasses.dataclass(frozen=True)
class Special:
    """What a method's files need beyond encoder, MLPs and classifier.

    Attributes:
      configure: (config, meta) -> sets the method's own keys.
      entries: (state) -> entries of the method's own arrays.
      ignored: beginnings of names in the state_dict that this library keeps otherwise or not at all.
      start: (state, file) -> state; what the file holds in another form.
      prepare: (file, step, params, carried) -> (params, carried) before each step.
      check: (file, step, params, carried) -> errors of what is compared in another form.
      patch: (file) -> a context manager around the whole replay, to hand over the file's random draws.
    """

    configure: Callable[[ConfigDict, dict], None] = lambda c, meta: None
    entries: Callable[[Any], dict[str, Entry]] = lambda state: {}
    ignored: tuple[str, ...] = ()
    start: Callable[[Any, File], Any] = lambda state, file: state
    prepare: Callable[..., tuple[Any, Any]] = lambda file, step, params, carried: (params, carried)
    check: Callable[..., Errors] = lambda file, step, params, carried: {}
    patch: Callable[[File], contextlib.AbstractContextManager[Any]] = lambda file: contextlib.nullcontext()


def queue_entries(queue: Entry = Entry(("queue",))) -> Callable[[Any], dict[str, Entry]]:
    """The entries of a queue, of the classes of its rows, if it has them, and of its place."""
    found = {"queue": queue, "queue_y": Entry(("queue_label",)), "queue_ptr": Entry(("queue_place",))}
    return lambda state: {name: entry for name, entry in found.items() if entry.path[0] in state}


def mocov3_heads(kind: str) -> Special:
    return Special(lambda c, meta: c.mocov3.update({"heads": kind}))


def ressl_temperatures(c: ConfigDict, meta: dict) -> None:
    kw = meta["method_kwargs"]
    c.ressl.update({"student_temperature": kw["temperature_q"], "target_temperature": kw["temperature_k"]})


SPECIAL: dict[str, Special] = {}
SPECIAL |= {
    "mocov2plus": Special(
        entries=queue_entries(Entry(("queue",), lambda x: x.transpose(0, 2, 1), lambda x: x.transpose(0, 2, 1)))
    ),
    "mocov3": mocov3_heads("resnet"),
    "mocov3_vit": mocov3_heads("vit"),
    "nnclr": Special(entries=queue_entries()),
    "nnbyol": Special(entries=queue_entries()),
    "nnsiam": Special(entries=queue_entries()),
    "ressl": Special(ressl_temperatures, queue_entries()),
}


def own_keys(section: str, names: Mapping[str, str], **fixed: Any) -> Callable[[ConfigDict, dict], None]:
    """The function that copies a file's settings, ours -> theirs, where it has them, and sets the fixed ones."""

    def configure(c: ConfigDict, meta: dict) -> None:
        kw = meta["method_kwargs"]
        c[section].update({ours: kw[theirs] for ours, theirs in names.items() if theirs in kw} | fixed)

    return configure


def dino_keys(c: ConfigDict, meta: dict) -> None:
    kw = meta["method_kwargs"]
    c.dino.update(
        prototypes=kw["num_prototypes"],
        batch_norm=kw.get("use_bn_in_head", False),
        norm_last_layer=kw.get("norm_last_layer", True),
        warm_epochs=kw.get("warmup_teacher_temperature_epochs", 0),
        hold_epochs=float(kw.get("freeze_last_layer", 1)),
    )
    c.optimizer.update(clip_each=kw.get("clip_grad", 0.0), clip_each_include=("encoder/.*",))


def dino_entries(state: Any) -> dict[str, Entry]:
    out = {"dino_loss_func.center": Entry(("centre",))}
    for root, prefix in (("student", ""), ("target", "momentum_")):
        tree, last = state[root]["projector"], f"{prefix}head.last_layer.weight_"
        places = mlp_places(MLP((1, 1, 1), norm="norm0" in tree))
        out |= network_entries(root, "projector", f"{prefix}head.mlp", tree, places)
        out[f"{last}v"] = transposed(root, "prototypes", "kernel")
        out[f"{last}g"] = transposed(root, "prototypes", "lengths")
    return out


def swav_keys(c: ConfigDict, meta: dict) -> None:
    kw = meta["method_kwargs"]
    starts, frozen = float(kw["epoch_queue_starts"]), float(kw["freeze_prototypes_epochs"])
    c.swav.update(prototypes=kw["num_prototypes"], queue=kw["queue_size"], queue_from=starts, hold_epochs=frozen)


def iter_norm_entries(state: Any) -> dict[str, Entry]:
    ours = {"weight": "scale", "bias": "bias", "running_mean": "running_mean", "running_wm": "running_whitening"}
    return {f"projector.7.{theirs}": Entry(("student", "whitening", name)) for theirs, name in ours.items()}


def transformer_entries(state: Any) -> dict[str, Entry]:
    out = queue_entries()(state)
    parts = {
        "self_attn.out_proj.": "out{}",
        "linear1.": "hidden{}",
        "linear2.": "back{}",
        "self_attn.in_proj_": "qkv{}",
    }
    for i in range(3):
        for theirs, ours in parts.items():
            path = ("student", "transformer", ours.format(i))
            out[f"transformer_encoder.layers.{i}.{theirs}weight"] = transposed(*path, "kernel")
            out[f"transformer_encoder.layers.{i}.{theirs}bias"] = Entry((*path, "bias"))
        for n in (1, 2):
            for theirs, ours in (("weight", "scale"), ("bias", "bias")):
                path = ("student", "transformer", f"norm{i}_{n - 1}", ours)
                out[f"transformer_encoder.layers.{i}.norm{n}.{theirs}"] = Entry(path)
    return out


@contextlib.contextmanager
def given_slices(file: File) -> Any:
    """W-MSE cuts the batch of each step, in turn, as the file says."""
    steps = iter(range(1000))

    def order(keys_B: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(keys_B.shape, jnp.int32)
        return jax.pure_callback(lambda: file[f"perm/{next(steps)}"].astype(np.int32), shape)

    with mock.patch.object(methods.wmse, "order", order):
        yield


HEADS = 3  # of the files of DeepCluster


def given_starts(file: File) -> Any:
    """K-means of head h after epoch e starts at the rows of the images that the file's permutation 3 e + h names.

    The file's memory lies by place in the epoch. `cluster_turn` sets the key to the number of the epoch.
    """
    meta = json.loads(str(file["meta"]))
    turns = []
    for e in range(meta["steps"] // meta["steps_per_epoch"] - 1):
        steps = range(e * meta["steps_per_epoch"], (e + 1) * meta["steps_per_epoch"])
        place = np.concatenate([file[f"in/{t}/indexes"] for t in steps])
        turns.append([place[file[f"perm/{HEADS * e + h}"]] for h in range(HEADS)])
    table = jnp.asarray(np.array(turns), jnp.int32)

    def starts(own: Any, filled_N: jax.Array) -> Any:
        e = own["cluster_key"][1]
        rows = [table[e, h, : own["centres"][str(h)].shape[0]] for h in range(HEADS)]
        return own["cluster_key"], rows

    return mock.patch.object(methods.deepclusterv2, "starts", starts)


def cluster_turn(file: File, step: int, params: Any, carried: Any) -> tuple[Any, Any]:
    epoch = step // json.loads(str(file["meta"]))["steps_per_epoch"]
    return params, {**carried, "cluster_key": jnp.array([0, epoch], jnp.uint32)}


def cluster_errors(file: File, step: int, params: Any, carried: Any) -> Errors:
    """The rows of memory that a step writes, and what a clustering returns: the file has it at the next step."""
    out = {}
    index, per_epoch = file[f"in/{step}/indexes"], json.loads(str(file["meta"]))["steps_per_epoch"]
    place = (step % per_epoch) * len(index) + np.arange(len(index))
    if f"{step}/state/local_memory_embeddings" in file:
        rows = file[f"{step}/state/local_memory_embeddings"][:, place]
        out[f"{step}/memory"] = float(np.max(np.abs(np.asarray(carried["memory"])[:, index] - rows)))
    if f"{step + 1}/assignments" in file:
        wrong = np.asarray(carried["assignments"]) != file[f"{step + 1}/assignments"]
        out[f"{step + 1}/assignments"] = float(np.sum(wrong))
        for h in range(HEADS):
            difference = np.abs(np.asarray(carried["centres"][str(h)]) - file[f"{step + 1}/centroids{h}"])
            out[f"{step + 1}/centroids{h}"] = float(np.max(difference))
    return out


DINO_HEADS = ("projector.", "momentum_projector.")  # the file has them under head.
WEIGHT_G = ("head.last_layer.weight_g", "momentum_head.last_layer.weight_g", "prototypes.weight_g")
SPECIAL |= {
    "barlow_twins": Special(own_keys("barlow_twins", {"lamb": "lamb", "scale": "scale_loss"})),
    "vicreg": Special(
        own_keys(
            "vicreg",
            {"similarity": "sim_loss_weight", "variance": "var_loss_weight", "covariance": "cov_loss_weight"},
            variance_terms="sum",
        )
    ),
    "vibcreg": Special(
        own_keys(
            "vibcreg",
            {"similarity": "sim_loss_weight", "variance": "var_loss_weight", "covariance": "cov_loss_weight"},
            whitening=True,
        ),
        iter_norm_entries,
    ),
    "dino": Special(dino_keys, dino_entries, ignored=(*WEIGHT_G, *DINO_HEADS)),
    "dino_options": Special(dino_keys, dino_entries, ignored=DINO_HEADS),
    "swav": Special(
        swav_keys,
        lambda state: {
            "queue": Entry(("queue",)),
            "prototypes.weight_v": transposed("student", "prototypes", "kernel"),
        },
        ignored=WEIGHT_G,
    ),
    "wmse": Special(own_keys("wmse", {"slice": "whitening_size"}, gradient="first"), patch=given_slices),
    "deepclusterv2": Special(
        lambda c, meta: c.deepclusterv2.update(prototypes=tuple(meta["method_kwargs"]["num_prototypes"])),
        ignored=("prototypes.", "local_memory"),
        prepare=cluster_turn,
        check=cluster_errors,
        patch=given_starts,
    ),
    "all4one": Special(own_keys("all4one", {}, dropout=0.0), transformer_entries, ignored=("queue_index", "pos_enc.")),
}
# Names of scalars in the files, ours, and what ours are multiplied by.
LOGGED = {
    "train_class_loss": ("online_loss", 1.0),
    "train_acc1": ("online_top1", 100.0),
    "train_acc5": ("online_top5", 100.0),
    "train_z_std": ("z_std", 1.0),
    "train_nn_acc": ("nn_acc", 1.0),
}


def load(path: Path) -> File:
    """The arrays of a file, and those of ``inputs``, a file beside it, if it names one: ``in/...`` of both."""
    with np.load(path) as archive:
        file = {name: archive[name] for name in archive.files}
    if "inputs" not in file:
        return file
    others = load(path.with_name(str(file["inputs"])))
    return {name: x for name, x in others.items() if name.startswith("in/")} | file


def config_of(meta: dict, name: str, special: Special) -> ConfigDict:
    """The config of a file's run."""
    c, kw = configs.base(), meta["method_kwargs"]
    c.method, c.batch_size, c.steps = name, meta["batch"], meta["steps"]
    c.views.small = meta["small_views"]
    c.joint.update({"tau": meta["tau"][0], "tau_final": meta["tau"][1]})
    for ours, theirs in (
        ("hidden", "proj_hidden_dim"),
        ("out", "proj_output_dim"),
        ("predictor_hidden", "pred_hidden_dim"),
        ("temperature", "temperature"),
        ("queue", "queue_size"),
    ):
        if theirs in kw:
            c.joint[ours] = kw[theirs]
    c.online.update({"lr": meta["lr"], "momentum": 0.0, "schedule": "constant"})
    c.optimizer.update(
        dict(name="sgd", lr=meta["lr"], lr_batch=0, momentum=0.0, weight_decay=0.0, schedule="constant", warmup_steps=0)
    )
    c.optimizer.decay_exclude = ()
    special.configure(c, meta)
    return c


def joint_steps(file: File) -> tuple[Errors, Errors]:
    """Losses (relative), scalars and states after each step, and the gradients of the first step."""
    meta = json.loads(str(file["meta"]))
    name = meta["method"]
    for suffix in ("_multicrop", "_options", "_vit"):
        name = name.removesuffix(suffix)
    special = SPECIAL.get(meta["method"], SPECIAL.get(name, Special()))
    c = config_of(meta, name, special)
    source: Any = Source(meta["batch"] * meta["steps_per_epoch"])
    algorithm = getattr(methods, name).algorithm(c, WIDTH, source)
    method = joint.assemble(c, algorithm, tiny_encoder(), lambda batch, keys: batch["views"], source)
    value_and_grad = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    run = functools.partial(replay, file, meta, c, special, algorithm, method, value_and_grad)
    with special.patch(file):
        outputs, gradients = run("")
        if "cos/0/tau" in file:
            c.joint.tau, c.joint.tau_final = 0.9, 1.0  # only `after` reads them
            outputs |= {f"cos/{k}": v for k, v in run("cos/")[0].items()}
    return outputs, gradients


def replay(
    file: File,
    meta: dict,
    c: ConfigDict,
    special: Special,
    algorithm: joint.Algorithm,
    method: Method,
    value_and_grad: Callable[..., Any],
    run: str,
) -> tuple[Errors, Errors]:
    """The errors of one run of a file: the main run (""), or the one whose tau rises ("cos/")."""
    state = joined(*method.init(jax.random.key(0), lambda drawn: drawn))
    networks = entries(algorithm, state)
    known = networks | special.entries(state)
    ignored = ("num_batches_tracked", *special.ignored)
    state = special.start(state, file)
    flat = traverse_util.flatten_dict(state)
    for theirs, value in under(file, "init/", ignored).items():
        require(theirs, known)
        before = flat[known[theirs].path]
        flat[known[theirs].path] = jnp.asarray(known[theirs].load(value), before.dtype).reshape(before.shape)
    missing = [name for name in networks if f"init/{name}" not in file and not name.startswith(ignored)]
    if missing:
        raise SystemExit(f"the file begins without {missing}, which ours has")
    params, carried = parted(traverse_util.unflatten_dict(flat))
    tx, _ = optimizer.build(c, params, meta["steps"], meta["steps_per_epoch"], held=method.held)
    opt_state = tx.init(params)
    total, per_epoch = meta["tau"][2], meta["steps_per_epoch"]
    after = jax.jit(lambda params, carried, done: method.after(params, carried, Progress(done, total, per_epoch)))
    keys = jax.random.split(jax.random.key(1), meta["batch"])
    outputs, gradients = {}, {}
    for t in range(meta["steps"]):
        params, carried = special.prepare(file, t, params, carried)
        views = meta["large_views"] + meta["small_views"]
        batch = {
            "views": [jnp.asarray(file[f"in/{t}/view{v}"]).transpose(0, 2, 3, 1) for v in range(views)],
            "label": jnp.asarray(file[f"in/{t}/labels"], jnp.int32),
            "index": jnp.asarray(file[f"in/{t}/indexes"], jnp.int32),
        }
        (value, (carried, scalars)), grads = value_and_grad(params, carried, batch, keys)
        ours = float(value + scalars["online_loss"])
        theirs = float(file[f"{run}{t}/total_loss"])
        if np.isfinite(theirs):
            outputs[f"{t}/total_loss"] = abs(ours - theirs) / abs(theirs)
        if t == 0 and not run:
            gradients = gradient_errors(file, known, grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        params, carried = after(params, carried, jnp.int32(t))
        outputs |= special.check(file, t, params, carried)
        flat = traverse_util.flatten_dict(joined(params, carried))
        for theirs_name, expected in under(file, f"{run}{t}/state/", ignored).items():
            require(theirs_name, known)
            found = known[theirs_name].dump(np.asarray(flat[known[theirs_name].path]))
            outputs[f"{t}/state/{theirs_name}"] = float(np.max(np.abs(found.reshape(expected.shape) - expected)))
        for key, (ours_name, factor) in LOGGED.items():
            if not run and ours_name in scalars and f"{t}/log/{key}" in file:
                outputs[f"{t}/log/{key}"] = abs(float(scalars[ours_name]) * factor - float(file[f"{t}/log/{key}"]))
    if not run and "eval/features" in file:
        view = jnp.asarray(file[f"in/{meta['steps'] - 1}/view0"]).transpose(0, 2, 3, 1)
        features = Tiny().apply({"params": method.judged(params, carried)["encoder"]}, view, False)
        outputs["eval/features"] = float(np.max(np.abs(np.asarray(features) - file["eval/features"])))
    return outputs, gradients


def under(file: File, prefix: str, ignored: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays under a prefix, without those whose names begin or end with an ignored one."""
    found = {k.removeprefix(prefix): file[k] for k in file if k.startswith(prefix)}
    return {k: v for k, v in found.items() if not (k.startswith(ignored) or k.endswith(ignored))}


def require(name: str, known: Mapping[str, Entry]) -> None:
    if name not in known:
        raise SystemExit(f"the file's {name} is not compared: add it to the method's entries")


def gradient_errors(file: File, known: Mapping[str, Entry], grads: Any) -> Errors:
    """Per parameter, the largest difference over the largest entry of its layer's gradients.

    A bias before batch norm has a gradient of rounding size, so its layer's weight is the measure.
    """
    flat = traverse_util.flatten_dict({"student": grads})
    theirs = under(file, "grad/", ("classifier",))
    largest: dict[str, float] = {}
    for name, array in theirs.items():
        layer = name.rpartition(".")[0]
        largest[layer] = max(largest.get(layer, 1e-5), float(np.max(np.abs(array))))
    out = {}
    for name, array in theirs.items():
        require(name, known)
        ours = known[name].dump(np.asarray(flat[known[name].path])).reshape(array.shape)
        out[name] = float(np.max(np.abs(ours - array))) / largest[name.rpartition(".")[0]]
    return out
