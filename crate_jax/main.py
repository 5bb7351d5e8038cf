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
from collections.abc import Sequence

try:
    import jax  # noqa: F401
except ValueError as e:  # a variable of the environment, such as JAX_NUM_CPU_DEVICES=two
    if __name__ != "__main__":
        raise
    print(f"error: {e}; set the variable of that name right, or unset it", file=sys.stderr)
    sys.exit(2)
from absl import app, flags, logging as absl_logging

from crate_jax.errors import ConfigError, UserError
from crate_jax.flags import OUT_OF_MEMORY, define_flags, fail, is_out_of_memory, parse_flags
from crate_jax.jobs import JOBS
from crate_jax.parallel import distributed
from crate_jax.parallel.interrupt import Interrupted


def set_up_log(process: int) -> None:
    """Process 0 says everything; the others only what is wrong, and who says it."""
    absl_logging.set_verbosity(absl_logging.WARNING if process else absl_logging.INFO)
    who = f"process {process}: " if process else ""
    formatter = logging.Formatter(f"%(asctime)s %(levelname).1s {who}%(message)s", "%H:%M:%S")
    absl_logging.get_absl_handler().setFormatter(formatter)


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
        job = JOBS[config.job]
        result = job.run(config, flags.FLAGS.workdir)
        distributed.unwatch()
        if distributed.first():
            job.show(result)
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
        distributed.leave_last()
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
