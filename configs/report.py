"""One page about one run, or comparing several: what was logged, and what analyses of its weights and features say.

    python -m crate_jax.main --config=configs/report.py --config.checkpoint=RUN
    python -m crate_jax.main --config=configs/report.py --config.checkpoint=RUN_A,RUN_B,RUN_C --workdir=W

A RUN is the workdir of a run, a folder of runs such as a sweep's, which stands for all of them, or a file of weights.
The first command writes RUN/report.html, one file that opens from
disk without a network, and RUN/report.json with its numbers unrounded; with --workdir they go there.

The images are the run's own. Where they are no longer there, or to look at others:
--config.data.source=folder:DIR (and data_dir, train_split, eval_split); without images the sections that need
none remain, and the page says which are left out. --config.report.sections=overview,pictures chooses
among overview, pictures, whitebox, views, collapse and alignment.
--config.whitebox.images says how many images the layers are measured on.
Theorem 3 of arXiv 2404.02446 as an experiment needs neither a run nor images, and is there only if it is asked for:

    python -m crate_jax.main --config=configs/report.py --config.report.sections=theory --workdir=W
"""

from crate_jax.config import base, parse_arg


def get_config(arg: str | None = None):
    """Returns the config; there is nothing to say in `arg`."""
    parse_arg(arg)
    c = base()
    c.job = "report"
    c.data.source = ""  # the run's
    c.whitebox.images = 256
    return c
