"""Your own photos in one flag: any encoder and method, on images of one size, in as many minutes as you have.

    python -m crate_jax.main --config=configs/photos.py:size=64,minutes=10 --config.data.source=DIR --workdir=W

DIR is a folder of images, with or without labels; docs/data.md lists the other sources. The config string has:

* ``size``: the side to which images are resized, in pixels: 32, 64, 96, 128, 160, 192 or 224. A patch is an eighth of
  it, at most 16 px: 64 tokens up to 128 px, and 196, as in the papers, at 224;
* ``minutes``: the time for training on the machine at hand, without start and evaluation. The first start measures the
  time of a step and writes it to W/pace.json; the number of steps follows from it, so that the same command continues
  the run after a stop with the same bits. With minutes=0, --config.epochs or --config.steps count;
* ``encoder``: vit, crate, resnet18;
* ``method``: reconstruction, or a method of configs/joint.py with its recipe of ``scale=thin``;
* ``corruption``: mask, rop, noise, none; only reconstruction reads it;
* ``penalty``: none, so, srip;
* ``debug``: a run of seconds.

The recipe is for some thousand photos: the small models of configs/cifar10.py, weak crops, a warm-up of a tenth of the
run, the mean and deviation of ImageNet. Nobody has published it. On a GPU take more: --config.encoder.width=384
--config.encoder.depth=12 --config.encoder.heads=6.
"""

from ml_collections import ConfigDict

from crate_jax.config import PRETRAINING
from crate_jax.config_files import named, parse_arg
from crate_jax.data import IMAGENET_MEAN, IMAGENET_STD

SIZES = (64, 32, 96, 128, 160, 192, 224)
ENCODERS = {"vit": "vit_tiny", "crate": "crate_tiny", "resnet18": "resnet18"}  # here -> in configs/joint.py
WIDTH, DEPTH, HEADS = 128, 4, 4


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` may hold ``size``, ``minutes``, ``encoder``, ``method`` and others, see above."""
    arg = parse_arg(
        arg,
        size=SIZES,
        minutes=10.0,
        encoder=tuple(ENCODERS),
        method=PRETRAINING,
        corruption=("mask", "rop", "noise", "none"),
        penalty=("none", "so", "srip"),
        debug=False,
    )
    debug = ",debug" if arg.debug else ""
    if arg.method == "reconstruction":
        c = named(f"cifar10:encoder={arg.encoder},corruption={arg.corruption},penalty={arg.penalty}{debug}")
        c.data.crop_scale = (0.4, 1.0)
    else:
        encoder = ENCODERS[arg.encoder]
        c = named(f"joint:method={arg.method},encoder={encoder},penalty={arg.penalty},scale=thin{debug}")
        if arg.encoder != "resnet18":
            c.evaluation.pool = "mean"
            if not arg.debug:
                c.encoder.width, c.encoder.depth, c.encoder.heads = WIDTH, DEPTH, HEADS
    c.data.image_size = (arg.size, arg.size)
    c.data.mean, c.data.std = IMAGENET_MEAN, IMAGENET_STD
    c.data.eval_crop = 1.0
    c.encoder.patch_size = min(arg.size // 8, 16)
    if arg.encoder == "resnet18":  # with the other stem, 64 px take a CPU many times as long
        c.encoder.stem = "cifar" if arg.size < 64 else "imagenet"
    c.optimizer.warmup_epochs, c.optimizer.warmup_share = 0.0, 0.1
    c.evaluation.every = 0
    if not arg.debug:
        c.data.source = "folder:photos"
        c.epochs, c.minutes = 0.0, arg.minutes
    return c
