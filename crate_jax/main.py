"""Command line: ``python -m crate_jax.main --config=configs/NAME.py[:key=value,...] --workdir=DIR``.

Any key of the config can be set by a flag, ``--config.optimizer.lr=1e-3``. The same command in the
same workdir continues a run that was stopped.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging as absl_logging
from ml_collections import ConfigDict, config_flags

from crate_jax import distributed, sweep, train
from crate_jax.alignment import job as align
from crate_jax.errors import ConfigError, NonFiniteError, UserError
from crate_jax.evals import finetune, job
from crate_jax.interrupt import Interrupted


def define_flags() -> None:
    """Defines the flags of the command line; not done by an import, which other commands may do too."""
    config_flags.DEFINE_config_file("config", None, "A file of configs/, with its argument after a colon.")
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, pictures, summary.")
    flags.DEFINE_string("coordinator_address", "", "Of several processes: HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", 0, "Of several processes: how many.", lower_bound=0)
    flags.DEFINE_integer("process_id", -1, "Of several processes: the number of this one, from 0.", lower_bound=-1)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Absl's parser, but a bad flag, config file or key is one line and status 2."""
    try:
        rest = flags.FLAGS(list(argv))
        for name in ("config", "workdir"):
            if not flags.FLAGS[name].present and (name == "config" or flags.FLAGS.config.job != "report"):
                raise ConfigError(f"--{name} is missing; usage: {__doc__.splitlines()[0]}")
        if len(rest) > 1:
            raise ConfigError(f"unexpected argument {rest[1]!r}; flags start with --")
        return rest
    except Exception as e:  # whatever a config file or an override raises is the user's to mend
        fail(e)


def fail(error: BaseException) -> NoReturn:
    """Prints an error as one line and leaves with status 2."""
    told = True
    try:
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
    except OSError:  # the log lies on the disk that is full
        told = False
    if distributed.processes() > 1:
        distributed.leave(2)
    if not told:
        os._exit(2)  # Python would try again to write it, and leave with another status
    sys.exit(2)


def one_line(error: BaseException) -> str:
    """An error's message on one line.

    ml_collections wraps whatever a config file raises, traceback included, into a flag's error; the
    error that the file raised is the one to show.
    """
    if error.args and isinstance(error.args[0], KeyError):  # an unknown key, as an attribute's error
        error = error.args[0]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    message = str(cause or (error.args[0] if isinstance(error, KeyError) and error.args else error))
    if isinstance(error, KeyError) and message.startswith("'"):
        message = f"config: unknown key {message}"
    if isinstance(error, SyntaxError):
        message = f"{error.filename}, line {error.lineno}: {message} (SyntaxError)"
    if "Traceback (most recent call last)" in message:
        message = message.split(":")[0] + ": " + message.strip().splitlines()[-1]
    return " ".join(message.split())


def show_pretraining(summary: dict[str, Any]) -> None:
    """Prints the end of a pre-training run for a person."""
    print(f"steps {summary['steps']}  loss {summary['loss']:.4g}  parameters {summary['params']:,}")
    if summary["knn_top1"] is not None:
        print(f"{'top-1 accuracy':<20}{'k-NN':>8}{'probe':>8}")
        for label, suffix in (("trained encoder", ""), ("untrained encoder", "_untrained"), ("raw pixels", "_pixels")):
            print(f"{label:<20}{summary['knn_top1' + suffix]:>8.1%}{summary['probe_top1' + suffix]:>8.1%}")
    if summary["pictures"]:
        print(f"pictures: {summary['pictures']}")
    if summary["report"]:
        print(f"report: {summary['report']}")


SHOWN = ("top1", "top5", "mean_per_class", "miou", "mean_accuracy", "pixel_accuracy")  # shares in 0..1


def show_evaluation(record: dict[str, Any]) -> None:
    """Prints the numbers of one evaluation for a person."""
    print(f"{record['protocol']} of {record['checkpoint'] or 'a random encoder'} on {record['data']}")
    if "chosen" in record:
        setting = ", ".join(f"{key} {value:g}" for key, value in record["chosen"].items())
        print(f"{setting}" + (f", chosen on {record['selected_on']}" if "selected_on" in record else ""))
    for name, value in record.items():
        if isinstance(value, float) and name in SHOWN:
            print(f"{name:<20}{value:>8.1%}")
    if record.get("report"):  # of a training run
        print(f"report: {record['report']}")


def show_sweep(result: dict[str, Any]) -> None:
    """Prints the table of a sweep.

    Raises:
      NonFiniteError: some of its runs failed.
    """
    print(result["table"])
    print(f"table, figure and runs: {result['folder']}")
    if result["failed"]:
        names = ", ".join(result["failed"])
        raise NonFiniteError(f"the loss became NaN or infinite in {names}; all other runs are finished")


def show_alignment(result: dict[str, Any]) -> None:
    """Prints the answer of an alignment analysis."""
    print(result["summary"])
    print(f"table, figures and all curves: {result['folder']}")


def run_report(config: ConfigDict, workdir: str | None) -> dict[str, Any]:
    """The job ``report``; imported here, since it alone draws, and drawing takes 0.3 s to import."""
    from crate_jax.report import job as report

    return report.run(config, workdir)


def show_report(result: dict[str, Any]) -> None:
    """Prints where the report is, and what is not in it."""
    for title, why in result["left_out"].items():
        print(f"left out: {title}: {why}")
    print(f"report: {result['report']}")


# job -> (what runs it, what prints its result)
JOBS: dict[str, tuple[Callable[[ConfigDict, Any], dict[str, Any]], Callable[[dict[str, Any]], None]]] = {
    "pretrain": (train.run, show_pretraining),
    "evaluate": (job.run, show_evaluation),
    "finetune": (finetune.run, show_evaluation),
    "segment": (finetune.run, show_evaluation),
    "sweep": (sweep.run, show_sweep),
    "align": (align.run, show_alignment),
    "report": (run_report, show_report),
}


def main(argv: Sequence[str]) -> int:
    """Runs the config's job."""
    absl_logging.set_verbosity(absl_logging.INFO)
    absl_logging.get_absl_handler().setFormatter(
        logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    )
    config = flags.FLAGS.config
    try:
        if config.job not in JOBS:
            raise ConfigError(f"config.job={config.job!r}: must be one of {', '.join(JOBS)}")
        given = flags.FLAGS
        cluster = distributed.find(os.environ, given.coordinator_address, given.num_processes, given.process_id)
        if cluster is not None:
            if cluster.process:
                absl_logging.set_verbosity(absl_logging.WARNING)
            distributed.start(cluster)
            if not distributed.first():  # of a TPU slice this is known only now
                absl_logging.set_verbosity(absl_logging.WARNING)
        run, show = JOBS[config.job]
        result = run(config, flags.FLAGS.workdir)
        distributed.unwatch()
        if distributed.first():
            show(result)
    except Interrupted as e:
        distributed.unwatch()
        if distributed.first():
            print(f"{e}; the same command continues it", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        print("stopped by SIGINT; the same command continues from the last checkpoint, if any", file=sys.stderr)
        if distributed.processes() > 1:
            distributed.leave(128 + signal.SIGINT)
        return 128 + signal.SIGINT
    except (UserError, OSError) as e:
        fail(e)
    except Exception:
        if distributed.processes() == 1:
            raise
        traceback.print_exc()  # of a collective, maybe, that another process left: the watch says which
        distributed.fall_behind()
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
