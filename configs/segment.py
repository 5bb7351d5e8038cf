"""Semantic segmentation: a linear head or UPerNet on a pre-trained encoder, scored by mIoU.

    python -m crate_jax.main --config=configs/segment.py:head=linear --config.checkpoint=RUN \
        --config.data.source=folder:DIR --workdir=W
    python -m crate_jax.main --config=configs/segment.py:head=upernet --config.checkpoint=RUN \
        --config.data.source=folder:ADE20K --config.data.image_size=512,512 --config.data.workers=8 \
        --config.segment.classes=150 --config.segment.reduce_zero_label=True --workdir=W

RUN is the workdir of a pre-training run. DIR holds pairs of images and masks; layouts: docs/segmentation.md.
The config string has:

* ``head``: linear (one linear map from the last block's tokens) or upernet (arXiv 1807.10221, on four blocks);
* ``freeze``: trains the head only;
* ``scratch``: a random encoder of the checkpoint's shape under the same recipe;
* ``debug``: a few steps and images.

| ADE20K, ViT-B, 512 px, UPerNet | mIoU |
|---|---|
| MAE (arXiv 2111.06377) | 48.1 |
| ROPIM (2310.18737) | in the paper, not repeated here; the segmentation code was not released |

`upernet` takes BEiT's released recipe for encoders that were pre-trained without labels: 160,000 steps of
batch 16, AdamW with betas (0.9, 0.999), rate 7e-4 falling linearly to 0 after 1,500 steps of warm-up, weight
decay 0.05, layer decay 0.65, drop path 0.1, auxiliary loss of weight 0.4, one relative bias per block.
MMSegmentation reproduces MAE's number with the rate 1e-4 (--config.optimizer.lr=1e-4). We differ from BEiT:
crops of 1/4 to all of the image without padding or colour changes, no dropout, layer norms, and evaluation
of whole images at `image_size` instead of sliding windows. Our numbers compare with each other, and only
roughly with a paper's.

The recipe of `linear` is our own starting point; none of the library's papers has it. `freeze` also turns
drop path off; `scratch` changes nothing else. We have not run ADE20K yet. Image size, mean and standard
deviation are the checkpoint's, unless flags set them. Each run appends one line to W/results.jsonl.
"""

from ml_collections import ConfigDict

from crate_jax.config import base
from crate_jax.config_files import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` may hold ``head``, ``freeze``, ``scratch`` and ``debug``."""
    arg = parse_arg(arg, head=("linear", "upernet"), freeze=False, scratch=False, debug=False)
    c = base()
    c.job = "segment"
    c.protocol.name, c.protocol.metric = f"segment_{arg.head}", "miou"
    c.protocol.scratch = arg.scratch
    c.segment.head, c.finetune.freeze = arg.head, arg.freeze

    c.data.source = "folder:pairs"
    c.data.image_size, c.data.mean, c.data.std = (0, 0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)  # the checkpoint's
    c.evaluation.pool = ""  # nothing is pooled
    c.data.crop_scale = (0.25, 1.0)
    c.data.eval_crop = 1.0

    c.batch_size = 16
    c.optimizer.lr_batch, c.optimizer.b2 = 0, 0.999
    c.optimizer.schedule = "linear"
    if arg.head == "upernet":
        c.steps = 160_000
        c.segment.auxiliary = 0.4
        c.optimizer.lr, c.optimizer.warmup_steps, c.optimizer.layer_decay = 7e-4, 1500, 0.65
        c.finetune.relative_bias, c.finetune.final_norm = "per_block", False
        c.save.every = c.evaluation.every = 16_000
    else:
        c.steps = 40_000
        c.optimizer.lr, c.optimizer.warmup_steps, c.optimizer.layer_decay = 1e-3, 1500, 0.65
        c.save.every = c.evaluation.every = 4000
    c.finetune.drop_path = 0.0 if arg.freeze else 0.1
    c.evaluation.batch_size, c.evaluation.test_images = 16, 0
    if arg.debug:
        c.steps, c.batch_size, c.optimizer.warmup_steps, c.log.every, c.save.every = 4, 8, 0, 2, 2
        c.evaluation.test_images, c.evaluation.every = 16, 0
    return c
