"""One page about one run or several: their logs, and analyses of their weights and features.

    python -m crate_jax.main --config=configs/report.py --config.checkpoint=RUN
    python -m crate_jax.main --config=configs/report.py --config.checkpoint=RUN_A,RUN_B,RUN_C --workdir=W

A RUN is a run's workdir, a folder of runs such as a sweep's (all its runs are compared), or a file of weights. The
first command writes RUN/report.html, one file that opens from disk without a network, and RUN/report.json with the
unrounded numbers; with --workdir both files go to W.

The page has the quick sections, which read what the runs wrote: overview, recipes, pictures and details. It says about
how long the others take, which compute from images: neighbours, completion, whitebox, views, collapse, alignment and
speed. --config.report.sections=all adds them all, --config.report.sections=overview,views makes these two alone.

The images are the run's own. --config.data.source=folder:DIR (and data_dir, train_split, eval_split) takes others.
Without images the page leaves out the sections that need them, and names them. --config.whitebox.images sets the number
of images on which the layers are measured.

Three experiments need neither a run nor images: theory (Theorem 3 of arXiv 2404.02446), initialisation (Theorem 2 of
arXiv 2402.11337) and projection (noise of projections and masks). The page has them only if they are named:

    python -m crate_jax.main --config=configs/report.py --config.report.sections=theory --workdir=W
"""

from ml_collections import ConfigDict

from crate_jax.config import base
from crate_jax.config_files import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` must be empty."""
    parse_arg(arg)
    c = base()
    c.job = "report"
    c.data.source = ""  # the run's
    c.whitebox.images = 256
    return c
