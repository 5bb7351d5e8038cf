"""BYOL on ImageNet-1K with ResNet50 as in lightly's benchmark, plain or with an orthogonality penalty.

    python -m crate_jax.main --config=configs/joint_lightly.py:penalty=so \
        --config.data.data_dir=DIR --workdir=W

arXiv 2411.00392 reports top-1 65.81 plain and 67.84 with its penalty after 100 epochs of batch 128 (linear evaluation);
lightly's own table has 62.5 for batch 256. Not measured here. The learning rate is per 256 images, so
--config.batch_size changes it as in lightly.

The linear protocol of lightly's benchmark is SGD for 90 epochs with a rate of 0.1 per 256 images and cosine decay, its
k-NN has k = 200 and T = 0.1; --config=configs/evaluate.py has both.
"""

from ml_collections import ConfigDict

from crate_jax.config_files import named, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` may hold ``penalty`` and ``debug``."""
    arg = parse_arg(arg, penalty=("none", "so", "srip"), debug=False)
    c = named(f"joint:method=byol,encoder=resnet50,data=imagenet,penalty={arg.penalty}{',debug' if arg.debug else ''}")
    if not arg.debug:
        c.batch_size = 128
        c.joint.update(dict(hidden=4096, out=256, predictor_hidden=4096))
    c.optimizer.update(dict(lr=0.45, warmup_lr=0.0, warmup_peak="after", weight_decay=1e-6))
    c.optimizer.update(dict(trust_coefficient=1e-3, clip_lr=False))
    c.evaluation.knn_k, c.evaluation.knn_temperature = 200, 0.1
    return c
