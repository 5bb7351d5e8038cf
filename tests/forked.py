"""Runs command lines in forked processes: one import for many, and nothing of one reaches the next.

    python -m tests.forked < commands.jsonl

Reads lines {"argv", "env"} from stdin and answers each, before it reads the next, by a line {"status", "stdout",
"stderr", "seconds"}. `argv` begins with the module. The process that imports never starts JAX's backend, so that it
can be forked; what JAX reads of the environment when it is imported cannot be set by `env`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback

import sklearn.datasets  # noqa: F401  (what reading the digits imports later: a second and a half)
from absl import app

from crate_jax import jobs as _jobs, main as jobs  # noqa: F401  (what `main` imports later)
from crate_jax.convert import __main__ as convert

SECONDS = 300


def run(argv: list[str], env: dict[str, str]) -> dict[str, object]:
    """Status, stdout, stderr and processor seconds of `python -m ARGV...`."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = os.fork()
        if not process:
            signal.alarm(SECONDS)  # ends a command that hangs, by a signal that nothing handles
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.environ.update(env)
            status = 1
            try:
                status = call(argv)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, waited, used = os.wait4(process, 0)
        status = os.waitstatus_to_exitcode(waited)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "backslashreplace"))
    return {"status": status, "stdout": texts[0], "stderr": texts[1], "seconds": used.ru_utime + used.ru_stime}


def call(argv: list[str]) -> int:
    """The command itself; returns its exit status."""
    sys.argv = argv
    try:
        if argv[0] == "crate_jax.convert":
            return convert.main(argv[1:])
        jobs.define_flags()
        app.run(jobs.main, flags_parser=jobs.parse_flags)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    return 0


if __name__ == "__main__":
    for line in iter(sys.stdin.readline, ""):
        command = json.loads(line)
        print(json.dumps(run(command["argv"], command["env"])), flush=True)
