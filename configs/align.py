"""Shows which corruption can teach an encoder of this width about these labels, by a closed form, without training.

    python -m crate_jax.main --config=configs/align.py --config.data.source=folder:DIR --workdir=W
    python -m crate_jax.main --config=configs/align.py --config.checkpoint=RUN \
        --config.data.source=folder:DIR --workdir=W

The measure is the alignment of Balestriero & LeCun, "How Learning by Reconstruction Produces Uninformative Features For
Perception" (ICML 2024): the share of the label Gram matrix that k latents of the best linear (denoising) auto-encoder
hold. The corruptions are masks of three patch sizes at ten ratios each (the paper's Figure 7 has 0 .. 0.99), and ten
ratios of random orthogonal projection (docs/alignment.md). DIR holds one folder of images per class. The width is that
of RUN's encoder, or --config.align.width (default 384). Images larger than --config.align.side (default 32 px) are
shrunk to it.

The command prints each corruption's best ratio, the alignment that it adds, and which corruptions never help. W holds
table.md, alignment.json and the figures. `debug` takes two ratios of each corruption and 512 images.

Expected, on CIFAR-10: docs/alignment.md. The paper says that masking raises a low alignment (CIFAR-100) and does not
raise a high one (Arabic digits); none of its tables has a number for this.
"""

from ml_collections import ConfigDict

from crate_jax.config import base
from crate_jax.config_files import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` may hold ``debug``."""
    arg = parse_arg(arg, debug=False)
    c = base()
    c.job = "align"
    c.data.source = "folder:images"
    c.data.image_size = (32, 32)
    c.data.eval_crop = 1.0
    c.encoder.patch_size, c.encoder.width = 4, 384
    c.evaluation.train_images = 0
    if arg.debug:
        c.evaluation.train_images = 512
        c.data.image_size, c.align.width, c.align.latents = (8, 8), 64, 64
        c.align.mask_ratios = c.align.rop_ratios = (0.25, 0.75)
    return c
