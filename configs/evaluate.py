"""Evaluates a pre-trained encoder under a named protocol.

    python -m crate_jax.main --config=configs/evaluate.py:protocol=logreg --config.checkpoint=DIR \
        --config.data.source=folder:IMAGES --workdir=W
    python -m crate_jax.main --config=configs/evaluate.py:protocol=finetune_crate,task=cifar10 \
        --config.checkpoint=DIR --config.data.data_dir=TFDS --workdir=W

DIR is the workdir of a pre-training run, RUN/checkpoints/STEP, or a file of weights. The config string has:

* ``protocol``: knn, logreg, linear_sgd, fewshot (these four share frozen features, which W keeps),
  finetune_crate, finetune_mae, finetune_ropim;
* ``scratch``: a random encoder of the checkpoint's shape under the same recipe (Table 3 of arXiv 2404.02446);
* ``task``: a data set's name; sets its splits;
* ``debug``: a few images and steps.

Image size, mean, standard deviation and pooling are the checkpoint's, unless flags set them; so is the share of an
image that the central crop shows (config.data.eval_crop) on frozen features. finetune_mae and finetune_ropim pool the
mean. Each run appends one line to W/results.jsonl.
"""

from ml_collections import ConfigDict

from crate_jax.config import base
from crate_jax.config_files import parse_arg
from crate_jax.evals.protocols import PROTOCOLS

# task -> (TFDS name, training split, test split)
TASKS = {
    "": None,
    "cifar10": ("cifar10", "train", "test"),
    "cifar100": ("cifar100", "train", "test"),
    "flowers102": ("oxford_flowers102", "train", "test"),  # 1,020 images, as CRATE's code
    "pets": ("oxford_iiit_pet", "train", "test"),  # TFDS's `train` is `trainval`
    "food101": ("food101", "train", "validation"),
    "dtd": ("dtd", "train+validation", "test"),
    "inaturalist2017": ("i_naturalist2017", "train", "validation"),
    "imagenet": ("imagenet2012", "train", "validation"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` may hold ``protocol``, ``task``, ``scratch`` and ``debug``."""
    arg = parse_arg(
        arg, protocol=("logreg", *(p for p in PROTOCOLS if p != "logreg"), *RECIPES), task=tuple(TASKS),
        scratch=False, debug=False,
    )  # fmt: skip
    c = base()
    frozen = arg.protocol in PROTOCOLS
    c.job = "evaluate" if frozen else "finetune"
    c.protocol.name = arg.protocol
    if frozen:
        with c.protocol.unlocked():
            c.protocol.update(PROTOCOLS[arg.protocol].options)
    c.protocol.scratch = arg.scratch

    c.data.source = "folder:images"
    c.data.image_size, c.data.mean, c.data.std = (0, 0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)  # the checkpoint's
    c.evaluation.pool = ""  # likewise
    if frozen:
        c.data.eval_crop = 0.0  # likewise; a recipe of fine-tuning has its own
    c.evaluation.train_images = c.evaluation.test_images = 0
    if arg.task:
        name, c.data.train_split, c.data.eval_split = TASKS[arg.task]
        c.data.source = f"tfds:{name}"
    if not frozen:
        RECIPES[arg.protocol](c)
    if arg.debug:
        c.evaluation.train_images = c.evaluation.test_images = 64
        c.evaluation.batch_size = c.batch_size = 8
        if not frozen:
            c.epochs, c.steps, c.optimizer.warmup_epochs, c.log.every, c.save.every = 0.0, 4, 0.0, 2, 2
    return c


def _crate(c: ConfigDict) -> None:
    """Fine-tuning of CRATE-MAE, arXiv 2404.02446 appendix B.1: layer norm and a linear head on the class token.

    A run that pooled otherwise keeps its pooling, unless config.evaluation.pool is set. The paper gives optimiser,
    rate, decay and batch. Epochs, betas, crop and interpolation come from the authors' finetune.py, which fine-tunes
    supervised CRATE; docs/evaluation.md lists what differs from it.
    """
    c.epochs, c.batch_size = 200.0, 256
    c.data.crop_scale, c.data.interpolation = (0.08, 1.0), "bilinear"
    c.data.randaugment_layers, c.data.randaugment_magnitude = 2, 14
    c.data.eval_crop = 1.0
    c.optimizer.lr, c.optimizer.lr_batch, c.optimizer.weight_decay, c.optimizer.b2 = 5e-5, 0, 0.01, 0.999


def _mae(c: ConfigDict) -> None:
    """End-to-end fine-tuning of MAE ViT-B, arXiv 2111.06377 Table 9 and the released FINETUNE.md.

    Our RandAugment has one strength; timm's draws one per operation, around 9. ViT-L: 50 epochs, lr 1e-3,
    layer_decay 0.75, drop_path 0.2.
    """
    c.epochs, c.batch_size = 100.0, 1024
    _strong(c)
    c.optimizer.lr, c.optimizer.min_lr, c.optimizer.warmup_epochs = 5e-4, 1e-6 / 4, 5.0
    c.optimizer.layer_decay = 0.65


def _ropim(c: ConfigDict) -> None:
    """Fine-tuning of ROPIM ViT-B, the released config: each block gets its own copy of the relative bias.

    The batch is the code's 128 per GPU on the paper's 8 GPUs; for fine-tuning neither says a total. All rates are
    per 512 images. ViT-S: 200 epochs, min_lr 2.5e-7, layer_decay 0.65. ViT-Ti (ImageNet-100): lr 1e-2, min_lr 2.5e-7,
    layer_decay 0.7.
    """
    c.epochs, c.batch_size = 100.0, 1024
    _strong(c)
    c.optimizer.lr, c.optimizer.min_lr, c.optimizer.lr_batch = 5e-3, 5e-6, 512
    c.optimizer.warmup_epochs, c.optimizer.warmup_lr = 5.0, 2.5e-7
    c.optimizer.layer_decay, c.optimizer.clip_norm = 0.75, 5.0
    c.finetune.relative_bias = "per_block"


def _strong(c: ConfigDict) -> None:
    """Sets what the fine-tuning of MAE and of ROPIM share, both after BEiT."""
    c.evaluation.pool = "mean"
    c.finetune.final_norm = False  # the head's norm takes its place, after pooling
    c.finetune.head_init = 1e-3
    c.finetune.drop_path = 0.1
    c.finetune.label_smoothing, c.finetune.mixup, c.finetune.cutmix, c.finetune.erase = 0.1, 0.8, 1.0, 0.25
    c.data.crop_scale = (0.08, 1.0)
    c.data.randaugment_layers, c.data.randaugment_magnitude = 2, 9
    c.optimizer.b2 = 0.999


RECIPES = {"finetune_crate": _crate, "finetune_mae": _mae, "finetune_ropim": _ropim}
