"""A white-box masked autoencoder on scikit-learn's digits, without a download.

    python -m crate_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

A CRATE-MAE (arXiv 2404.02446) of four layers reconstructs 8 x 8 digits from half of their 2 x 2
patches. Measured (seed 0, two CPU cores): k-NN 86.1 %, probe 90.3 %; untrained encoder 60.3 % and 72.8 %;
raw pixels, which are hard to beat on such small digits, 98.3 % and 97.5 %. docs/results.md says how far rounding
moves these numbers.
"""

from ml_collections import ConfigDict

from crate_jax.config import PENALTY_WEIGHTS, base
from crate_jax.config_files import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` may hold ``penalty=so|srip`` and ``debug``."""
    arg = parse_arg(arg, penalty=("none", "so", "srip"), debug=False)
    c = base()
    c.steps = 1200
    c.batch_size = 128

    c.data.source = "digits"
    c.data.image_size = (8, 8)
    c.data.mean, c.data.std = (0.3, 0.3, 0.3), (0.37, 0.37, 0.37)
    c.data.crop_scale = (0.9, 1.0)
    c.data.flip = 0.0  # a mirrored digit is another sign
    c.data.eval_crop = 1.0

    c.encoder.patch_size, c.encoder.width, c.encoder.depth, c.encoder.heads = 2, 64, 4, 4
    c.encoder.lam = 0.1
    c.corruption.mask_ratio = 0.5  # a ratio of 0.75 would leave only 4 of 16 patches
    c.decoder.depth, c.decoder.heads = 4, 4

    c.penalty.name, c.penalty.weight = arg.penalty, PENALTY_WEIGHTS[arg.penalty]

    c.optimizer.lr, c.optimizer.lr_batch = 2e-3, 0
    c.optimizer.warmup_steps = 100
    c.optimizer.clip_norm = 1.0

    c.evaluation.pool = "mean"
    c.save.every = 500
    c.log.every = 100
    c.whitebox.every, c.whitebox.images = 400, 64  # the report shows how the layers change
    if arg.debug:
        c.steps, c.optimizer.warmup_steps, c.log.every, c.save.every = 4, 1, 2, 2
        c.whitebox.every = 0
        c.encoder.depth = c.decoder.depth = 2
        c.evaluation.train_images = c.evaluation.test_images = 64
    return c
