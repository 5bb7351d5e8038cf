"""One page about one run or several: their logs, and analyses of their weights and features.

    python -m crate_jax.main --config=configs/report.py --config.checkpoint=RUN
    python -m crate_jax.main --config=configs/report.py --config.checkpoint=RUN_A,RUN_B,RUN_C --workdir=W

A RUN is a run's workdir, a folder of runs such as a sweep's (all its runs are compared), or a file of weights. The
first command writes RUN/report.html, one file that opens from disk without a network, and RUN/report.json with the
unrounded numbers; with --workdir both files go to W.

The images are the run's own. --config.data.source=folder:DIR (and data_dir, train_split, eval_split) takes others.
Without images the page has only the sections that need none, and names the others. Sections are chosen by
--config.report.sections=overview,pictures, out of overview, pictures, details, neighbours, whitebox, views, collapse
and alignment.
--config.whitebox.images sets the number of images on which the layers are measured.
Theorem 3 of arXiv 2404.02446 as an experiment needs neither a run nor images. The page has it only on request:

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
