"""Which corruption can teach an encoder of this width anything about these labels: a closed form, no training.

    python -m crate_jax.main --config=configs/align.py --config.data.source=folder:DIR --workdir=W
    python -m crate_jax.main --config=configs/align.py --config.checkpoint=RUN \
        --config.data.source=folder:DIR --workdir=W

Alignment of Balestriero & LeCun, "Learning by Reconstruction Produces Uninformative Features For Perception" (ICML
2024): the share of the label Gram matrix that k latents of the best linear (denoising) auto-encoder hold. Masks of
three patch sizes at ten ratios each (the paper's Figure 7 has 0 .. 0.99), and ten ratios of random orthogonal
projection (docs/alignment.md). DIR holds one folder of images per class. The width is RUN's encoder's, or set by
--config.align.width (384 unless given). Larger images are shrunk to 32 px at most, --config.align.side says to what.

Prints the best ratio of each corruption, what it adds and what never helps; W holds table.md, alignment.json and the
figures. `debug` takes two ratios of each and 512 images.

Expected, on CIFAR-10: docs/alignment.md. The paper says that masking raises alignment where it is low (CIFAR-100) and
not where it is high (Arabic digits); it has no number for it in a table.
"""

from crate_jax.config import base, parse_arg


def get_config(arg: str | None = None):
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
