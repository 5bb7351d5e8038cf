"""A hyper-parameter search by one command: one run per value and seed, a table and a figure.

    python -m crate_jax.main --config=configs/sweep.py:over=mask_ratio,seeds=3 \
        --config.data.source=folder:DIR --workdir=W

| over | key | values | from |
|---|---|---|---|
| mask_ratio | corruption.mask_ratio | 0.25, 0.5, 0.75, 0.9 | Table 5 of CRATE-MAE, arXiv 2404.02446 |
| lam | encoder.lam | 0.1, 0.5, 5 | Table 6 of CRATE-MAE |
| rop_ratio | corruption.rop_ratio | 1/14, 1/7, 1/4, 1/2 | chosen here, around ROPIM's 1/7, arXiv 2310.18737 |
| penalty | penalty | none, so:1e-6, srip:1e-4 | the middle of the search of arXiv 2411.00392 |
| gamma | penalty | none, so:1e-7, so:1e-6, so:1e-5, srip:1e-5, srip:1e-4, srip:1e-3 | the whole search |
| guide | loss.guide | 0, 0.01, 0.1, 1 | chosen here, for the guided reconstruction of arXiv 2402.11337 |
| transfer | checkpoint | the runs to judge, --config.sweep.values="'RUN','RUN'" | Table 2 of CRATE-MAE |

With ``penalty=so`` or ``penalty=srip`` among the words, ``over=penalty`` varies penalty.weight over that search
and 0, no penalty. Both also measure LiDAR.

The table has the accuracy of each run's own k-NN and probe, on the labels of the pre-training set.
--config.sweep.judge adds accuracies by any protocols of configs/evaluate.py, PROTOCOL, PROTOCOL@TASK or
PROTOCOL@SOURCE: Tables 5 and 6 of CRATE-MAE pre-train on ImageNet-1K and probe CIFAR-10,
--config.sweep.judge=logreg@cifar10. Several are quoted: --config.sweep.judge="'knn','logreg@folder:DIR'". They read
all images of both splits. ``segment_linear@folder:PAIRS`` adds the mean IoU of a segmentation. Judges that train take
--config.sweep.judge_steps in place of their recipe's length.

``over=transfer`` trains nothing: it judges runs that exist, or all runs of a sweep's folder, on the tasks of Table 2,
by fine-tuning and by a probe.

Expected, from the paper (probe on CIFAR-10 after ImageNet-1K, `base=crate_mae`): Table 5, with
--config.encoder.lam=5: 69.78, 75.97, 75.99, 73.45; Table 6: 83.33, 80.87, 75.99. ROPIM ablates its ratio
in appendix C and 2411.00392 its weights; their lists and numbers are not repeated here. Cost: the base's
cost, times values, times seeds.

The config string has:

* ``over``: a row of the table, by default mask_ratio;
* ``base``: the config file whose run is varied, by default cifar10;
* ``seeds``: number of runs per value;
* the base's own words: ``over=lam,base=crate_mae,variant=S``,
  ``over=penalty,base=joint,method=byol,data=cifar100,seeds=3``.

These flags vary any other key: --config.sweep.key=optimizer.lr --config.sweep.values=1e-4,1e-3; these any
penalties: --config.sweep.key=penalty --config.sweep.values="'none','so:3e-6','srip:1e-3'". All other flags apply to
every run. The same command continues a stopped sweep and skips the finished runs.

W holds table.md, sweep.png, sweep.svg, sweep.csv (one line per run), sweep.json, and one folder per run,
such as ``encoder.lam=0.5,seed=0``.
"""

from ml_collections import ConfigDict

from crate_jax.config_files import named, parse_arg
from crate_jax.errors import ConfigError

BASES = ("cifar10", "quickstart", "crate_mae", "rop_vitb", "vit_mae", "joint", "joint_lightly")
PENALTY_VALUES = {"so": (0.0, 1e-7, 1e-6, 1e-5), "srip": (0.0, 1e-5, 1e-4, 1e-3)}
OVER = {  # over -> key, values
    "mask_ratio": ("corruption.mask_ratio", (0.25, 0.5, 0.75, 0.9)),
    "lam": ("encoder.lam", (0.1, 0.5, 5.0)),
    "rop_ratio": ("corruption.rop_ratio", (1 / 14, 1 / 7, 1 / 4, 1 / 2)),
    "penalty": ("penalty", ("none", "so:1e-6", "srip:1e-4")),
    "gamma": ("penalty", ("none", "so:1e-7", "so:1e-6", "so:1e-5", "srip:1e-5", "srip:1e-4", "srip:1e-3")),
    "transfer": ("checkpoint", ()),
    "guide": ("loss.guide", (0.0, 0.01, 0.1, 1.0)),
}
# (over, base) -> what the base's config string gets if it does not set the same word.
IMPLIED = {("rop_ratio", "cifar10"): "corruption=rop"}
LIDAR_IMAGES = 1000
TABLE_2 = tuple(
    f"{protocol}@{task}"
    for protocol in ("finetune_crate", "logreg")
    for task in ("cifar10", "cifar100", "flowers102", "pets")
)


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the base's config with job ``sweep``; `arg` may hold ``over``, ``base``, ``seeds`` and the base's own."""
    items = [item for item in (arg or "").split(",") if item]
    of_sweep = [item for item in items if item.partition("=")[0] in ("over", "base", "seeds")]
    of_base = [item for item in items if item not in of_sweep]
    arg = parse_arg(",".join(of_sweep), over=tuple(OVER), base=BASES, seeds=1)
    implied = IMPLIED.get((arg.over, arg.base), "")
    if implied and not any(item.partition("=")[0] == implied.partition("=")[0] for item in of_base):
        of_base.append(implied)
    try:
        c = named(f"{arg.base}:{','.join(of_base)}")
    except ConfigError as e:
        raise ConfigError(f"{e} (in base={arg.base}; the sweep itself knows over, base, seeds)") from e
    c.job = "sweep"
    c.sweep.key, c.sweep.values = OVER[arg.over]
    if arg.over == "penalty" and c.penalty.name in PENALTY_VALUES:
        c.sweep.key, c.sweep.values = "penalty.weight", PENALTY_VALUES[c.penalty.name]
    if arg.over in ("penalty", "gamma"):
        c.evaluation.lidar_images = min(LIDAR_IMAGES, c.evaluation.train_images)
    if arg.over == "transfer":
        c.sweep.judge = TABLE_2
    c.sweep.seeds = arg.seeds
    return c
