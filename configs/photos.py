"""Your own photos in one flag: any encoder and method, on images of one size, in as many minutes as you have.

    python -m crate_jax.main --config=configs/photos.py:size=64,minutes=10 --config.data.source=DIR --workdir=W

DIR is a folder of images, with or without labels; docs/data.md lists the other sources. The config string has:

* ``size``: the side to which images are resized, in pixels: 32, 64, 96, 128, 160, 192 or 224. A patch is an eighth of
  it, at most 16 px: 64 tokens up to 128 px, and 196, as in the papers, at 224;
* ``minutes``: the time for training on the machine at hand, without start and evaluation. The first start measures the
  time of a step and writes it to W/pace.json; the number of steps follows from it, so that the same command continues
  the run after a stop with the same bits. With minutes=0, --config.epochs or --config.steps count;
* ``method``: reconstruction, or a method of configs/joint.py with its recipe of ``scale=thin`` and stronger colours. By
  default vibcreg, but reconstruction with ``encoder=vit``, ``encoder=crate`` or a corruption;
* ``encoder``: vit, crate, resnet18. By default resnet18, under reconstruction vit;
* ``corruption``: mask, rop, noise, none; only reconstruction reads it. By default mask;
* ``penalty``: none, so, srip;
* ``debug``: a run of seconds.

The recipe is for some thousand photos: small models, a warm-up of a tenth of the run, the mean and deviation of
ImageNet; weak crops under reconstruction; under joint embedding the changes of colour of SimCLR's ImageNet runs (arXiv
2002.05709) and twice its share of grey views, so that an encoder can hardly compare views by colour. Nobody has
published it; docs/results.md has what it gave. On a GPU take more: --config.encoder.stage_width=64, or with a ViT
--config.encoder.width=384 --config.encoder.depth=12 --config.encoder.heads=6.
"""

from ml_collections import ConfigDict

from crate_jax.config import PRETRAINING
from crate_jax.config_files import named, parse_arg
from crate_jax.data import IMAGENET_MEAN, IMAGENET_STD
from crate_jax.data.recipes import recolour
from crate_jax.errors import ConfigError

SIZES = (64, 32, 96, 128, 160, 192, 224)
ENCODERS = {"vit": "vit_tiny", "crate": "crate_tiny", "resnet18": "resnet18"}  # here -> in configs/joint.py
WIDTH, DEPTH, HEADS = 128, 4, 4
COLOURS = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "grey": 0.4}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` may hold ``size``, ``minutes``, ``encoder``, ``method`` and others, see above."""
    arg = parse_arg(
        arg,
        size=SIZES,
        minutes=10.0,
        encoder=("", *ENCODERS),
        method=("", *PRETRAINING),
        corruption=("", "mask", "rop", "noise", "none"),
        penalty=("none", "so", "srip"),
        debug=False,
    )
    debug = ",debug" if arg.debug else ""
    restores = arg.corruption or arg.encoder in ("vit", "crate")
    method = arg.method or ("reconstruction" if restores else "vibcreg")
    encoder = arg.encoder or ("vit" if method == "reconstruction" else "resnet18")
    if method == "reconstruction":
        corruption = arg.corruption or "mask"
        c = named(f"cifar10:encoder={encoder},corruption={corruption},penalty={arg.penalty}{debug}")
        c.data.crop_scale = (0.4, 1.0)
    elif arg.corruption:
        raise ConfigError(f"config string: corruption={arg.corruption} needs method=reconstruction, not {method}")
    else:
        c = named(f"joint:method={method},encoder={ENCODERS[encoder]},penalty={arg.penalty},scale=thin{debug}")
        recolour(c, **COLOURS)
        if encoder != "resnet18":
            c.evaluation.pool = "mean"
            if not arg.debug:
                c.encoder.width, c.encoder.depth, c.encoder.heads = WIDTH, DEPTH, HEADS
    c.data.image_size = (arg.size, arg.size)
    c.data.mean, c.data.std = IMAGENET_MEAN, IMAGENET_STD
    c.data.eval_crop = 1.0
    c.encoder.patch_size = min(arg.size // 8, 16)
    if encoder == "resnet18" and arg.size >= 64:  # `scale=thin` has this stem for every size
        c.encoder.stem = "imagenet"
    c.optimizer.warmup_epochs, c.optimizer.warmup_share = 0.0, 0.1
    c.evaluation.every = 0
    if not arg.debug:
        c.data.source = "folder:photos"
        c.epochs, c.minutes = 0.0, arg.minutes
    return c
