"""The command line: ``python -m crate_jax.main --config=configs/NAME.py[:key=value,...] --workdir=DIR``.

A flag can set any key of the config, such as ``--config.optimizer.lr=1e-3``. The same command in the same workdir
continues a run that was stopped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from crate_jax import usage
from crate_jax.errors import ConfigError, UserError, escaped, import_jax, open_closed_streams, print_error

if __name__ == "__main__":
    open_closed_streams()  # before the other imports, which keep the streams
    if usage.wanted(sys.argv[1:]):
        sys.exit(usage.tell(usage.main()))
    import_jax()

from absl import app, flags, logging as absl_logging

from crate_jax.data.reading import Stalled, kill_workers, leave_if_hung
from crate_jax.flags import OUT_OF_MEMORY, define_flags, fail, is_out_of_memory, parse_flags
from crate_jax.parallel import distributed
from crate_jax.parallel.interrupt import Interrupted
from crate_jax.parallel.watch import LOST


class PrintableFormatter(logging.Formatter):
    """Escapes what a terminal would not print: a name in a message may hold a terminal's codes."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's text; line breaks stay."""
        return "\n".join(map(escaped, super().format(record).split("\n")))


def is_news(record: logging.LogRecord) -> bool:
    """Returns whether JAX says more than that a backend that nobody asked for is missing (TPUs, a proxy)."""
    text = record.getMessage()
    return not (("backend 'tpu'" in text and "libtpu.so" in text) or "backend 'proxy'" in text)


def set_up_log(process: int) -> None:
    """Sets the log's level and format: process 0 logs everything, the others only warnings, with their number."""
    logging.getLogger("jax._src.xla_bridge").addFilter(is_news)
    absl_logging.set_verbosity(absl_logging.WARNING if process else absl_logging.INFO)
    who = f"process {process}: " if process else ""
    formatter = PrintableFormatter(f"%(asctime)s %(levelname).1s {who}%(message)s", "%H:%M:%S")
    absl_logging.get_absl_handler().setFormatter(formatter)


def main(argv: Sequence[str]) -> int:
    """Runs the job of the config; returns the exit status."""
    try:
        status = _run(argv)
    except SystemExit as e:
        leave_if_hung(int(e.code or 0))
        raise
    leave_if_hung(status)
    return status


def _run(argv: Sequence[str]) -> int:
    from crate_jax.jobs import JOBS  # here: a second and a half that a wrong flag need not spend

    set_up_log(process=0)
    config = flags.FLAGS.config
    try:
        if config.job not in JOBS:
            raise ConfigError(f"config.job={config.job!r}: must be one of {', '.join(JOBS)}")
        given = flags.FLAGS
        cluster = distributed.find(
            os.environ,
            given.coordinator_address,
            given.num_processes,
            given.process_id,
            given.cluster_detection_method,
        )
        if cluster is not None:
            set_up_log(cluster.process)
            distributed.start(cluster)
            set_up_log(distributed.process())  # on a TPU slice the number is known only now
        job = JOBS[config.job]
        result = job.run(config, flags.FLAGS.workdir)

        def show() -> None:
            job.show(result)
            sys.stdout.flush()  # raises OSError if the disk is full or the reader is gone

        distributed.run_in_first(show)  # an error in it, such as a run that diverged, ends all processes alike
        distributed.unwatch()
    except Interrupted as e:
        distributed.unwatch()
        if distributed.first():
            with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
                print(escaped(f"{e}; the same command continues it"), file=sys.stderr)
        return e.exit_code
    except Stalled as e:
        print_error(str(e) + "; the same command continues it")
        if distributed.processes() > 1:
            kill_workers()
            distributed.leave(LOST)
        return 128 + e.signum if e.signum else LOST
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
        traceback.print_exc()  # another process may have caused it by leaving a collective; the watch names that one
        distributed.leave_last()
    return 0


if __name__ == "__main__":
    define_flags()
    flags.adopt_module_key_flags(sys.modules["crate_jax.flags"])  # `--helpshort` lists them
    app.run(main, flags_parser=parse_flags)
