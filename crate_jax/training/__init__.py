"""The loop, the state and the one jitted step. This room knows the interface of a method, but not any method."""

from __future__ import annotations

from crate_jax.validation import Key, Section, anything, at_least, must, positive

SAVE = Section(
    "save",
    "When checkpoints are saved.",
    of_the_run=False,
    effect=False,
    keys=dict(
        every=Key(1000, positive, "steps between checkpoints; the last step is always saved"),
        keep=Key(3, positive, "number of newest checkpoints that are kept"),
    ),
)

LOG = Section(
    "log",
    "What a run logs and draws.",
    of_the_run=False,
    effect=False,
    keys=dict(
        every=Key(50, positive, "steps between log points"),
        parameters=Key(False, anything, "log a table of the parameters: shape, weight decay, penalty, layout"),
        pictures=Key(8, at_least(0), "number of images in the grid of pictures; 0: no pictures"),
        pictures_every=Key(0, at_least(0), "steps between grids; 0: only at the end"),
        tensorboard=Key(True, anything, "also write TensorBoard's files; needs tensorboardX"),
        wandb=Key("", anything, "project of Weights & Biases; empty: off"),
        report=Key(True, anything, "write report.html at the end: curves, scores and pictures"),
        profile=Key(
            (),
            must(
                "be FROM,TO: two numbers of steps, 1 <= FROM <= TO",
                lambda v: not v or len(v) == 2 and 1 <= v[0] <= v[1],
            ),
            "first and last step of a trace by jax.profiler; of several processes, process 0 writes it",
            items=int,
        ),
    ),
)
