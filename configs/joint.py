"""Joint-embedding methods with the recipes of solo-learn, plain or with an orthogonality penalty (arXiv 2411.00392).

    python -m crate_jax.main --config=configs/joint.py:method=byol,encoder=resnet18,data=cifar10,penalty=so --workdir=W

The config string has:

* ``method``: a row of the table;
* ``encoder``: resnet18, resnet34, resnet50, wide_resnet50_2, vit_tiny, vit_small, vit_base, crate_tiny, crate_small,
  crate_base. ViTs and CRATEs are trained with AdamW as in MoCo v3 (DINO: as in solo-learn's ViT file) instead of the
  table's optimiser; CRATE under joint embedding has no published recipe. MoCo v3's ViTs are those of its code (12
  heads, fixed positions), the others those of timm (learned positions), as in solo-learn;
* ``data``: cifar10, cifar100, imagenet100, imagenet; --config.data.source=folder:DIR reads other images of that kind;
* ``penalty``: none, so, srip; --config.penalty.weight sets gamma, which the paper searched in 1e-5 .. 1e-7 for SO and
  1e-3 .. 1e-5 for SRIP;
* ``views``: a recipe of crate_jax/data/recipes.py instead of the method's own, such as multicrop_cifar (byol, dino,
  simclr, supcon and swav take small views); what else solo-learn's files for these views change stays as it is;
* ``scale``: full, or thin: a ResNet of 16 channels with the ImageNet stem on images of 32 px, small heads and queues,
  20 epochs of batch 128, for minutes on a CPU;
* ``debug``: a run of seconds.

Recipes: solo-learn, scripts/pretrain/cifar and imagenet-100; for data=imagenet its ImageNet files of BYOL, Barlow Twins
and MoCo v2+, and for other methods those of ImageNet-100. ResNets of 32 px images have a 3x3 stem of stride 1 with
padding 2 and no max-pool. Batch 256, 1000 epochs on CIFAR, 400 on ImageNet-100, 100 on ImageNet.

Numbers of solo-learn's README for ResNet18 after 1000 epochs: the top-1 of its online classifier, on which
`online_top1` is modelled (SGD here; solo-learn's has the method's optimiser). Ours after the full recipe are not
measured yet; docs/results.md has all methods at scale=thin, without a penalty, with SO and with SRIP.

| method | CIFAR-10 | CIFAR-100 |
|---|---|---|
| barlow_twins | 92.10 | 70.90 |
| byol | 92.58 | 70.46 |
| deepclusterv2 | 88.85 | 63.61 |
| dino | 89.52 | 66.76 |
| mocov2plus | 92.94 | 69.89 |
| mocov3 | 93.10 | 68.83 |
| nnclr | 91.88 | 69.62 |
| ressl | 90.63 | 65.92 |
| simclr | 90.74 | 65.78 |
| simsiam | 90.51 | 66.04 |
| swav | 89.17 | 64.88 |
| vibcreg | 91.18 | 67.37 |
| vicreg | 92.07 | 68.54 |
| wmse | 88.67 | 61.33 |
| all4one, nnbyol, nnsiam, supcon | - | - |
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from crate_jax.config import PENALTY_WEIGHTS, base
from crate_jax.config_files import parse_arg
from crate_jax.data.recipes import PRESETS, preset

LARS: dict[str, Any] = {
    "name": "lars_torch",
    "momentum": 0.9,
    "trust_coefficient": 0.02,
    "clip_lr": True,
    "decay_vectors": False,
}
SGD: dict[str, Any] = {"name": "sgd", "momentum": 0.9, "decay_vectors": True}
ADAM: dict[str, Any] = {"name": "adam", "b1": 0.9, "b2": 0.999, "decay_vectors": True}
ADAMW: dict[str, Any] = {"name": "adamw", "b1": 0.9, "b2": 0.999}

# method -> (optimiser, lr, weight decay), (hidden, out, predictor's hidden), views on CIFAR, on ImageNet, other keys.
RECIPES: dict[str, tuple[tuple[dict[str, Any], float, float], tuple[int, int, int], str, str, dict[str, Any]]] = {
    "all4one": (
        (LARS, 1.0, 1e-5), (2048, 256, 4096), "asymmetric_cifar", "asymmetric_imagenet",
        # The transformer's rate is 0.1 where the others' is 1.
        {"joint.queue": 98304, "optimizer.scaled_lr": ("transformer/.*",), "optimizer.scaled_lr_by": 0.1},
    ),
    "barlow_twins": ((LARS, 0.3, 1e-4), (2048, 2048, 4096), "asymmetric_cifar", "asymmetric_imagenet", {}),
    "byol": ((LARS, 1.0, 1e-5), (4096, 256, 4096), "asymmetric_cifar", "asymmetric_imagenet", {}),
    "deepclusterv2": (
        (LARS, 0.6, 1e-6), (2048, 128, 4096), "symmetric", "symmetric",
        {
            "joint.temperature": 0.1, "optimizer.min_lr": 6e-4, "optimizer.warmup_epochs": 11.0,
            "optimizer.warmup_lr": 0.0,
        },
    ),
    "dino": ((LARS, 0.3, 1e-6), (2048, 256, 4096), "asymmetric_cifar", "asymmetric_imagenet", {"joint.tau": 0.9995}),
    "mocov2plus": (
        (SGD, 0.3, 1e-4), (2048, 256, 4096), "weak", "weak",
        {"joint.queue": 32768, "joint.tau_final": 0.999, "online.lr": 0.3},
    ),
    "mocov3": (
        (LARS, 0.3, 1e-6), (4096, 256, 4096), "asymmetric_cifar", "asymmetric_imagenet", {"online.lr": 0.3},
    ),
    "nnbyol": ((LARS, 1.0, 1e-5), (4096, 256, 4096), "asymmetric_cifar", "asymmetric_imagenet", {}),
    "nnclr": ((LARS, 0.4, 1e-5), (2048, 256, 4096), "asymmetric_cifar", "asymmetric_imagenet", {}),
    "nnsiam": (
        (SGD, 0.5, 1e-5), (2048, 2048, 4096), "asymmetric_cifar", "asymmetric_imagenet",
        {"optimizer.constant_lr": ("predictor/.*",)},
    ),
    "ressl": ((SGD, 0.05, 1e-4), (4096, 256, 4096), "ressl", "ressl", {}),
    "simclr": ((LARS, 0.4, 1e-4), (2048, 256, 4096), "symmetric", "symmetric", {}),
    "simsiam": (
        (SGD, 0.5, 1e-5), (2048, 2048, 512), "weak", "asymmetric_imagenet",
        {"optimizer.constant_lr": ("predictor/.*",)},
    ),
    "supcon": ((SGD, 0.4, 1e-5), (2048, 256, 4096), "symmetric", "symmetric", {}),
    "swav": ((LARS, 0.6, 1e-6), (2048, 128, 4096), "symmetric", "symmetric", {"joint.temperature": 0.1}),
    "vibcreg": (  # solo-learn's CIFAR file forgets clip_lr
        (LARS, 0.3, 1e-4), (2048, 2048, 4096), "vicreg_cifar", "vicreg_imagenet100", {"optimizer.clip_lr": False},
    ),
    "vicreg": ((LARS, 0.3, 1e-4), (2048, 2048, 4096), "vicreg_cifar", "vicreg_imagenet100", {}),
    "wmse": (
        (ADAM, 2e-3, 1e-6), (1024, 64, 4096), "wmse_cifar", "wmse_imagenet100",
        {"optimizer.warmup_lr": 0.0, "wmse.gradient": "first"},
    ),
}  # fmt: skip
# What ImageNet-100 changes.
IMAGENET100: dict[str, dict[str, Any]] = {
    "byol": {"optimizer.lr": 0.5, "optimizer.weight_decay": 1e-6, "joint.predictor_hidden": 8192},
    "dino": {"dino.warm_epochs": 50},  # with a ResNet
    "mocov2plus": {"joint.queue": 65536},
    "ressl": {"optimizer.lr": 0.3},
    "simclr": {"optimizer.lr": 0.3, "joint.hidden": 4096, "joint.out": 512},
    "supcon": {"optimizer.lr": 0.5, "joint.out": 512},
    "vibcreg": {"optimizer.clip_lr": True},
}
# What ImageNet changes beyond ImageNet-100.
IMAGENET: dict[str, dict[str, Any]] = {
    "barlow_twins": {
        "optimizer.lr": 0.8, "optimizer.weight_decay": 1.5e-6, "optimizer.trust_coefficient": 1e-3,
        "optimizer.clip_lr": False, "joint.hidden": 4096, "joint.out": 4096, "barlow_twins.scale": 0.048,
    },
    "byol": {
        "optimizer.lr": 0.45, "optimizer.weight_decay": 1e-6, "optimizer.trust_coefficient": 1e-3,
        "optimizer.clip_lr": False, "joint.predictor_hidden": 4096, "online.lr": 0.2,
    },
    "mocov2plus": {"optimizer.lr": 0.3, "optimizer.weight_decay": 3e-5, "online.lr": 0.4},
}  # fmt: skip
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
# data -> source, side, mean and deviation (None: ImageNet's), epochs
DATA: dict[str, tuple[str, int, Any, float]] = {
    "cifar10": ("tfds:cifar10", 32, CIFAR10, 1000.0),
    "cifar100": ("tfds:cifar100", 32, CIFAR100, 1000.0),
    "imagenet100": ("folder:imagenet100", 224, None, 400.0),
    "imagenet": ("tfds:imagenet2012", 224, None, 100.0),
}
RESNETS = ("resnet18", "resnet34", "resnet50", "wide_resnet50_2")
TRANSFORMERS = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}  # width, depth, heads


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` may hold ``method``, ``encoder``, ``data``, ``penalty``, ``scale``, ``debug``."""
    arg = parse_arg(
        arg,
        method=("byol", *sorted(set(RECIPES) - {"byol"})),
        encoder=(*RESNETS, *(f"{name}_{size}" for name in ("vit", "crate") for size in TRANSFORMERS)),
        data=tuple(DATA),
        penalty=("none", "so", "srip"),
        views=("", *PRESETS),
        scale=("full", "thin"),
        debug=False,
    )
    c = base()
    c.method = arg.method
    c.batch_size = 256
    c.data.source, side, colours, c.epochs = DATA[arg.data]
    c.data.image_size = (side, side)
    if colours:
        c.data.mean, c.data.std = colours
        c.data.eval_crop = 1.0
    cifar = side == 32

    (optimizer, lr, decay), (hidden, out, predictor), cifar_views, views, other = RECIPES[arg.method]
    preset(c, arg.views or (cifar_views if cifar else views))
    c.joint.update(dict(hidden=hidden, out=out, predictor_hidden=predictor))
    c.optimizer.update({**optimizer, "lr": lr, "weight_decay": decay})
    c.optimizer.update(dict(warmup_epochs=10.0, warmup_lr=3e-5, warmup_peak="last", decay_exclude=()))
    c.update_from_flattened_dict(other)
    if not cifar:
        c.update_from_flattened_dict(IMAGENET100.get(arg.method, {}))
    if arg.data == "imagenet":
        c.update_from_flattened_dict(IMAGENET.get(arg.method, {}))

    name, _, size = arg.encoder.partition("_")
    if arg.encoder in RESNETS:
        c.encoder.name, c.encoder.stem = arg.encoder, "cifar" if cifar else "imagenet"
        c.evaluation.pool = "mean"
    else:
        c.encoder.name = name
        c.encoder.width, c.encoder.depth, c.encoder.heads = TRANSFORMERS[size]
        c.encoder.patch_size = 4 if cifar else 16
        # As MoCo v3's ViT: AdamW 3e-4 and decay 0.1 per 256 images. DINO: as solo-learn's file of DINO's ViT-Ti.
        lr, decay = (0.005, 1e-4) if arg.method == "dino" else (3e-4, 0.1)
        c.optimizer.update({**ADAMW, "lr": lr, "weight_decay": decay, "decay_vectors": True})
        c.optimizer.update(dict(min_lr=0.0, warmup_lr=1e-5 if arg.method == "dino" else 3e-5))
        if arg.method == "dino":
            c.dino.update(dict(prototypes=65536, norm_last_layer=False, warm_epochs=0))
        if name == "vit" and arg.method == "mocov3":
            c.encoder.heads, c.encoder.init = 12, "mocov3"
        elif name == "vit":
            c.encoder.positions, c.encoder.init = "learned", "timm"
    if c.optimizer.name == "adamw":  # rates of single networks belong to the table's recipes
        c.optimizer.constant_lr = c.optimizer.scaled_lr = ()

    c.penalty.name, c.penalty.weight = arg.penalty, PENALTY_WEIGHTS[arg.penalty]
    if not cifar:
        c.dtype = "bfloat16"
    c.evaluation.every = 10_000  # also says when the representation collapses
    c.log.every = 100
    if arg.scale == "thin":
        _thin(c)
    if arg.debug:
        _shrink(c, arg.encoder in RESNETS)
    return c


# The same for all methods but for what a method cannot do without; we chose these sizes.
THIN: dict[str, dict[str, Any]] = {
    "deepclusterv2": {"deepclusterv2.prototypes": (100, 100, 100)},
    # Without batch norm in the head, and with a faster target, its projections are all alike from the first steps on.
    "dino": {"dino.prototypes": 512, "dino.batch_norm": True, "joint.tau": 0.9995},
    # With an epsilon of 0.05 its loss stays at log(100): the assignments are equal for all prototypes.
    "swav": {"swav.prototypes": 100, "swav.queue": 1024, "swav.queue_from": 5.0, "swav.epsilon": 0.01},
    "wmse": {"joint.out": 32, "wmse.slice": 64},
}


def _thin(c: ConfigDict) -> None:
    """Makes a run of minutes on a CPU, with batches of half the size and so half the learning rate."""
    c.epochs, c.batch_size, c.dtype, c.data.image_size = 20.0, 128, "float32", (32, 32)
    c.encoder.stem, c.encoder.stage_width = "imagenet", 16
    c.joint.update(dict(hidden=512, out=128, predictor_hidden=512, queue=2048))
    c.optimizer.warmup_epochs = 1.0
    c.update_from_flattened_dict(THIN.get(c.method, {}))
    c.evaluation.every, c.log.every, c.save.every = 0, 50, 10_000


def _shrink(c: ConfigDict, resnet: bool) -> None:
    """Makes a run of seconds: a few steps of a thin encoder on made images of 16 px."""
    c.data.source, c.data.image_size = "synthetic", (16, 16)
    c.steps, c.epochs, c.batch_size, c.dtype = 4, 0.0, 16, "float32"
    if resnet:
        c.encoder.stage_width = 4
    else:
        c.encoder.width, c.encoder.depth, c.encoder.heads, c.encoder.patch_size = 32, 1, 2, 4
    c.joint.update(dict(hidden=32, out=16, predictor_hidden=32, queue=64))
    c.update_from_flattened_dict(THIN.get(c.method, {}))
    if c.method == "wmse":
        c.joint.out, c.wmse.slice = 6, 16
    c.optimizer.warmup_epochs, c.log.every, c.save.every = 0.0, 2, 2
    c.evaluation.train_images = c.evaluation.test_images = 32
