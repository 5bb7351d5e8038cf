"""Command line: ``python -m crate_jax.main --config=configs/NAME.py[:key=value,...] --workdir=DIR``.

Any key of the config can be set by a flag, ``--config.optimizer.lr=1e-3``. The same command in the
same workdir continues a run that was stopped.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

try:
    import jax
except ValueError as e:  # a variable of the environment, such as JAX_NUM_CPU_DEVICES=two
    if __name__ != "__main__":
        raise
    print(f"error: {e}; set the variable of that name right, or unset it", file=sys.stderr)
    sys.exit(2)
from absl import app, flags, logging as absl_logging
from ml_collections import ConfigDict, config_flags

from crate_jax.errors import ConfigError, NonFiniteError, UserError
from crate_jax.jobs import align, evaluate, finetune, sweep
from crate_jax.parallel import distributed
from crate_jax.parallel.interrupt import Interrupted
from crate_jax.training import loop
from crate_jax.validation import require_keys

USAGE = "python -m crate_jax.main --config=configs/NAME.py[:key=value,...] --workdir=DIR"


def define_flags() -> None:
    """Defines the flags of the command line; not done by an import, which other commands may do too."""
    try:
        config_flags.DEFINE_config_file("config", None, "A file of configs/, with its argument after a colon.")
    except flags.Error as e:  # it reads --flagfile
        fail(e)
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, pictures, summary.")
    flags.DEFINE_string("coordinator_address", "", "Of several processes: HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", 0, "Of several processes: how many.", lower_bound=0)
    flags.DEFINE_integer("process_id", -1, "Of several processes: the number of this one, from 0.", lower_bound=-1)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Absl's parser, but a bad flag, config file or key is one line and status 2."""
    try:
        path = _config_file(argv)
        if path and not os.path.isfile(path):
            what = "a folder, not a config file" if os.path.isdir(path) else "no such file"
            raise ConfigError(f"--config={path}: {what}; this library's are configs/*.py")
        rest = flags.FLAGS(list(argv))
        if not path:
            raise ConfigError(f"--config is missing; usage: {USAGE}")
        require_keys(flags.FLAGS.config)
        if not flags.FLAGS["workdir"].present and flags.FLAGS.config.job != "report":
            raise ConfigError(f"--workdir is missing; usage: {USAGE}")
        if len(rest) > 1:
            raise ConfigError(f"unexpected argument {rest[1]!r}; flags start with --")
        return rest
    except Exception as e:  # whatever a config file or an override raises is the user's to mend
        fail(e)


def fail(error: BaseException) -> NoReturn:
    """Prints an error as one line and leaves with status 2."""
    for stream, text in ((sys.stderr, f"error: {one_line(error)}\n"), (sys.stdout, "")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # what could not be written must not be tried once more at the end, with another status
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if distributed.processes() > 1:
        distributed.leave(2)
    sys.exit(2)


# What absl and ml_collections say of a value, and what is said here.
PARSERS_SAY = (
    (r"invalid literal for int\(\) with base 10: .*", "must be a whole number"),
    (r"could not convert string to float: .*", "must be a number"),
    (r"\('Non-boolean argument to boolean flag', .*\)", "must be true or false"),
    (r"Failed to parse .* as a ConfigDict: .*", "is a group of keys; set one of them, as in --config.log.every=10"),
    (r"Error while parsing string: .* as tuple\. .*", "must be values with commas between them, texts in quotes"),
    (r"Attribute .* does not exist and .* Attempting to lookup: (\S+)", r"config: unknown key '\1'"),
    (r" Other fields present: .*?}\"", ""),  # of a locked config: all of them
    (r"^ERROR:: ", ""),
)
OUT_OF_MEMORY = (
    "not enough memory; use a smaller config.batch_size or config.encoder, more micro-batches (config.accumulate), or "
    "config.remat=True"
)
FROM_CONFIG_FILE = (
    "Error whilst parsing config file:"  # ml_collections' wrapper of what a file raised, with its traceback
)


def one_line(error: BaseException) -> str:
    """An error's message on one line.

    The parsers of flags wrap what a config file or a value made them raise; what that was is the message to show, with
    the line of the config file it came from.
    """
    chain = [error]
    while (following := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(following)
    chain = [e for e in chain if not str(e).startswith(FROM_CONFIG_FILE)] or chain
    message = next((str(e) for e in chain if isinstance(e, UserError)), "") or _of_config_file(chain) or _text(chain[0])
    message = " ".join(message.split())
    for found, right in PARSERS_SAY:
        message = re.sub(found, right, message)
    return message


def _text(error: BaseException) -> str:
    """An error's message; an unknown key with what was meant, maybe."""
    if error.args and isinstance(error.args[0], KeyError):  # as an attribute's error
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if not (isinstance(error, KeyError) and text.startswith(("'", '"'))):
        return text
    key, _, hint = " ".join(text.split()).partition(" Did you mean ")
    return f"config: unknown key {key}" + (f"; did you mean {hint.partition(' instead')[0]}?" if hint else "")


def _of_config_file(chain: Sequence[BaseException]) -> str:
    """Where in the config file an error came up, and what it is; empty: not in it."""
    path = _config_file(sys.argv)
    for e in chain:
        if isinstance(e, SyntaxError) and e.filename != "<unknown>":  # that is the value of a flag
            return f"{e.filename or path}, line {e.lineno or 1}: SyntaxError: {e.msg}"
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        if lines:
            return f"{path}, line {lines[-1]}: {type(e).__name__}: {_text(e)}"
        if isinstance(e, AttributeError) and "has no attribute 'get_config'" in str(e):
            return f"--config={path}: has no function get_config, which returns the config"
        if isinstance(e, TypeError) and "get_config()" in str(e):
            return f"--config={path}: {e}; what follows the colon of --config is its only argument"
    return ""


def _config_file(argv: Sequence[str]) -> str:
    """The path that --config names, without the text after its colon; empty: none."""
    for i, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        if flag in ("--config", "-config"):
            return (value if equals else "".join(argv[i + 1 : i + 2])).partition(":")[0]
    return ""


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
    from crate_jax.jobs import report

    return report.run(config, workdir)


def show_report(result: dict[str, Any]) -> None:
    """Prints where the report is, and what is not in it."""
    for title, why in result["left_out"].items():
        print(f"left out: {title}: {why}")
    print(f"report: {result['report']}")


# job -> (what runs it, what prints its result)
JOBS: dict[str, tuple[Callable[[ConfigDict, Any], dict[str, Any]], Callable[[dict[str, Any]], None]]] = {
    "pretrain": (loop.run, show_pretraining),
    "evaluate": (evaluate.run, show_evaluation),
    "finetune": (finetune.run, show_evaluation),
    "segment": (finetune.run, show_evaluation),
    "sweep": (sweep.run, show_sweep),
    "align": (align.run, show_alignment),
    "report": (run_report, show_report),
}


def set_up_log(process: int) -> None:
    """Process 0 says everything; the others only what is wrong, and who says it."""
    absl_logging.set_verbosity(absl_logging.WARNING if process else absl_logging.INFO)
    who = f"process {process}: " if process else ""
    formatter = logging.Formatter(f"%(asctime)s %(levelname).1s {who}%(message)s", "%H:%M:%S")
    absl_logging.get_absl_handler().setFormatter(formatter)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no room; `JaxRuntimeError` is also what a collective raises that another process left."""
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(
        re.search("RESOURCE_EXHAUSTED|Out of memory", str(error))
    )


def main(argv: Sequence[str]) -> int:
    """Runs the config's job."""
    set_up_log(process=0)
    config = flags.FLAGS.config
    try:
        if config.job not in JOBS:
            raise ConfigError(f"config.job={config.job!r}: must be one of {', '.join(JOBS)}")
        given = flags.FLAGS
        cluster = distributed.find(os.environ, given.coordinator_address, given.num_processes, given.process_id)
        if cluster is not None:
            set_up_log(cluster.process)
            distributed.start(cluster)
            set_up_log(distributed.process())  # of a TPU slice it is known only now
        run, show = JOBS[config.job]
        result = run(config, flags.FLAGS.workdir)
        distributed.unwatch()
        if distributed.first():
            show(result)
            sys.stdout.flush()  # where it is full or its reader is gone, that is said here
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
    except Exception as e:
        if isinstance(e, MemoryError) or is_out_of_memory(e):
            fail(UserError(f"{OUT_OF_MEMORY} ({' '.join(str(e).split())[:200]})"))
        if distributed.processes() == 1:
            raise
        traceback.print_exc()  # of a collective, maybe, that another process left: the watch says which
        distributed.fall_behind()
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
