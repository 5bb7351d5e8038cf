"""ViT-MAE on ImageNet-1K at 224 px (He et al. 2022), the baseline of both reconstruction papers.

    python -m crate_jax.main --config=configs/vit_mae.py:variant=B \
        --config.data.source=folder:IMAGENET --workdir=runs/vit_mae_b

| variant | encoder | parameters with decoder | fine-tune top-1 | linear top-1 |
|---|---|---|---|---|
| S | 12 x 384, 6 heads | 47.4 M | not published | not published |
| B | 12 x 768, 12 heads | 111.7 M | 83.66 | 67.8 |
| L | 24 x 1024, 16 heads | 329.2 M | not repeated here | 76.0 |

Recipe of facebookresearch/mae: 800 epochs (1600 for the best numbers), 40 epochs of warm-up, batch 4096, base
learning rate 1.5e-4 per 256 images, AdamW with betas (0.9, 0.95), weight decay 0.05, crop scale
(0.2, 1), 75 % of the patches dropped, decoder 8 x 512, pixels normalised per patch.
"""

from ml_collections import ConfigDict

from crate_jax.config import PENALTY_WEIGHTS, base
from crate_jax.config_files import parse_arg

VARIANTS = {  # width, depth, heads
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` may hold ``variant=S|B|L``, ``penalty=none|so|srip``, ``debug``."""
    arg = parse_arg(arg, variant=("B", "S", "L"), penalty=("none", "so", "srip"), debug=False)
    c = base()
    c.epochs, c.batch_size = 800.0, 4096
    c.dtype = "bfloat16"

    c.data.source = "tfds:imagenet2012"
    c.data.image_size = (224, 224)
    c.data.crop_scale = (0.2, 1.0)
    c.data.workers = 8

    c.encoder.name = "vit"
    c.encoder.width, c.encoder.depth, c.encoder.heads = VARIANTS[arg.variant]
    c.decoder.name, c.decoder.width, c.decoder.depth, c.decoder.heads = "transformer", 512, 8, 16
    c.corruption.name, c.corruption.mask_ratio, c.corruption.mask_fill = "mask", 0.75, "drop"
    c.loss.norm, c.loss.target = "l2", "patch_normalised"

    c.penalty.name, c.penalty.weight = arg.penalty, PENALTY_WEIGHTS[arg.penalty]

    c.optimizer.lr, c.optimizer.lr_batch = 1.5e-4, 256
    c.optimizer.weight_decay = 0.05
    c.optimizer.b1, c.optimizer.b2 = 0.9, 0.95
    c.optimizer.warmup_epochs = 40.0

    c.evaluation.pool = "cls"
    c.save.every = 1000
    if arg.debug:
        c.data.source, c.steps, c.epochs, c.batch_size = "synthetic", 4, 0.0, 8
        c.data.image_size, c.data.workers = (64, 64), 0
        c.encoder.width, c.encoder.depth, c.encoder.heads = 96, 2, 3
        c.decoder.width, c.decoder.depth, c.decoder.heads = 64, 2, 4
        c.dtype = "float32"
        c.optimizer.warmup_epochs, c.log.every, c.save.every = 0.0, 2, 2
        c.evaluation.train_images = c.evaluation.test_images = 32
    return c
