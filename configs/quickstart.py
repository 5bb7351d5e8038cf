"""Two first runs on images that scikit-learn ships, without a download, in three minutes and in one on two CPU cores.

    python -m crate_jax.main --config=configs/quickstart.py:method=vibcreg --workdir=runs/quickstart
    python -m crate_jax.main --config=configs/quickstart.py --workdir=runs/digits

* ``method=vibcreg``, or another method of configs/joint.py: a thin ResNet18 learns from pairs of crops of coloured
  digits over the colours of photographs (``data.source=scenes``), 24 px. Measured (three seeds, classifiers fitted on
  1,000 images): k-NN 63 %, probe 69 %; untrained encoder 24 % and 24 %; raw pixels 52 % and 21 %.
* ``method=reconstruction``, the default: a white-box CRATE-MAE (arXiv 2404.02446) of four layers reconstructs 8 x 8
  digits from half of their 2 x 2 patches. Measured (seed 0, two CPU cores): k-NN 86.1 %, probe 90.3 %; untrained
  encoder 60.3 % and 72.8 %; raw pixels, which are hard to beat on such small and aligned digits, 98.3 % and 97.5 %.
  docs/results.md says how far rounding moves these numbers.
"""

from ml_collections import ConfigDict

from crate_jax.config import PENALTY_WEIGHTS, PRETRAINING, base
from crate_jax.config_files import named, parse_arg
from crate_jax.data.recipes import recolour


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` may hold ``method=``, ``penalty=so|srip`` and ``debug``."""
    arg = parse_arg(arg, method=PRETRAINING, penalty=("none", "so", "srip"), debug=False)
    if arg.method != "reconstruction":
        return _joint(arg.method, arg.penalty, arg.debug)
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


def _joint(method: str, penalty: str, debug: bool) -> ConfigDict:
    """A joint-embedding method with the recipe of ``scale=thin``; the crops are large, the changes of colour strong."""
    c = named(f"joint:method={method},encoder=resnet18,penalty={penalty},scale=thin{',debug' if debug else ''}")
    c.data.mean, c.data.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    c.views.scale_min, c.views.flip = (0.5,), (0.0,)  # a mirrored digit is another sign
    recolour(c, hue=0.5, saturation=0.6, grey=0.3, brightness=0.6, contrast=0.6, solarise=0.3, blur=0.0)
    if not debug:
        c.data.source, c.data.image_size = "scenes", (24, 24)
        c.epochs, c.steps = 0.0, 600
        c.optimizer.warmup_epochs, c.optimizer.warmup_steps = 0.0, 50
        c.evaluation.train_images, c.save.every = 1000, 300
    return c
