"""Small models for 32 px images in 4 x 4 patches: any encoder under any corruption, in minutes on a CPU.

    python -m crate_jax.main --config=configs/cifar10.py:encoder=crate,corruption=mask \
        --config.data.source=folder:DIR --workdir=W

DIR holds ``train/CLASS/*`` and ``test/CLASS/*`` images, such as CIFAR-10 unpacked to files, or any
other labelled images of 32 px. Measured numbers and curves: docs/results.md. No paper has these
runs; we chose widths, depths and epochs so that a run takes about 35 minutes on one CPU core.
"""

from ml_collections import ConfigDict

from crate_jax.config import PENALTY_WEIGHTS, base
from crate_jax.config_files import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` may hold ``encoder``, ``corruption``, ``penalty`` and ``debug``."""
    arg = parse_arg(
        arg,
        encoder=("crate", "vit", "resnet18"),
        corruption=("mask", "rop", "noise", "none"),
        penalty=("none", "so", "srip"),
        debug=False,
    )
    c = base()
    c.epochs, c.batch_size = 6.0, 64

    c.data.source = "folder:cifar10"
    c.data.image_size = (32, 32)
    c.data.mean, c.data.std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    c.data.crop_scale = (0.5, 1.0)
    c.data.eval_crop = 1.0

    c.encoder.name, c.encoder.patch_size = arg.encoder, 4
    if arg.encoder == "resnet18":  # of 16 to 128 channels; the patches are those of pixels
        c.encoder.stem, c.encoder.stage_width = "cifar", 16
    else:
        c.encoder.width, c.encoder.depth, c.encoder.heads = 128, 4, 4
    c.corruption.name = arg.corruption
    c.corruption.rop_ratio = 0.25
    if arg.encoder == "crate":
        c.encoder.lam = 0.1  # the best value in Table 6 of arXiv 2404.02446
        c.decoder.name, c.decoder.depth, c.decoder.heads = "crate", 2, 4
    elif arg.encoder == "resnet18":
        c.corruption.mask_fill = "zero"
        c.decoder.name, c.decoder.width, c.decoder.depth, c.decoder.heads = "transformer", 64, 2, 2
    elif arg.corruption == "mask":
        c.corruption.mask_fill = "drop"
        c.decoder.name, c.decoder.width, c.decoder.depth, c.decoder.heads = "transformer", 64, 2, 2
    else:
        c.encoder.positions, c.encoder.qkv_bias, c.encoder.layer_scale = "relative", "qv", 0.1
        c.decoder.name = "linear"
    c.loss.norm = "l1" if arg.corruption == "rop" else "l2"

    c.penalty.name, c.penalty.weight = arg.penalty, PENALTY_WEIGHTS[arg.penalty]

    c.optimizer.lr, c.optimizer.lr_batch = 1e-3, 0
    c.optimizer.warmup_epochs = 1.0
    c.optimizer.clip_norm = 1.0

    c.evaluation.pool = "mean"
    c.evaluation.every = 1000
    c.log.every = 100
    if arg.debug:
        c.data.source, c.steps, c.epochs, c.batch_size = "synthetic", 4, 0.0, 8
        c.encoder.width, c.encoder.depth, c.decoder.depth = 48, 2, 2
        if arg.encoder == "resnet18":
            c.encoder.stage_width = 4
        c.decoder.width = 48 if c.decoder.name == "transformer" else 0
        c.optimizer.warmup_epochs, c.log.every, c.save.every = 0.0, 2, 2
        c.evaluation.train_images = c.evaluation.test_images = 32
    return c
