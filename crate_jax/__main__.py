"""The command ``crate-jax``, also ``python -m crate_jax``: one word for each job, and the exchange of weights.

``crate-jax JOB FLAGS`` is ``python -m crate_jax.main --job=JOB FLAGS``, with the job's own config if there is one.
"""

from __future__ import annotations

import contextlib
import re
import runpy
import sys

from crate_jax import __version__, config_files, usage
from crate_jax.errors import did_you_mean, escaped, import_jax, open_closed_streams, print_error
from crate_jax.usage import CONFIG_NEEDED, JOBS, OTHERS


def cards() -> str:
    """The library's configs, one a line: name, and what it is for."""
    return "\n".join(f"{name:<15}{config_files.card(name)}" for name in config_files.names())


def main() -> int:
    """Runs the command of sys.argv; returns the exit status."""
    open_closed_streams()
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("--help", "-h"):
        return usage.tell(usage.commands())
    if command == "--version":
        return usage.tell(f"crate-jax {__version__}")
    if command == "configs":
        if usage.wanted(rest):
            return usage.tell(usage.configs())
        if rest:
            print_error(f"crate-jax configs: takes no argument, here {escaped(rest[0])!r}; it lists all configs")
            return 2
        return usage.tell(cards())
    if command == "convert":
        import_jax()
        from crate_jax.convert.__main__ import main as convert

        return convert(rest, "crate-jax convert")
    if command in JOBS:
        if usage.wanted(rest):
            return usage.tell(usage.job(command))
        if any(re.match("--?flagfile(=|$)", arg) for arg in rest):
            from absl import flags  # here: few commands need it

            with contextlib.suppress(flags.Error, OSError, ValueError):  # crate_jax.main says what is wrong
                rest = flags.FLAGS.read_flags_from_files(rest)
        given = any(re.match("--?(config|helpfull)(=|$)", arg) for arg in rest)
        if not given and command in CONFIG_NEEDED:
            print_error(f"crate-jax {command}: --config is missing, such as --config={CONFIG_NEEDED[command]}")
            return 2
        sys.argv = [sys.argv[0], f"--job={command}", *[f"--config={command}"] * (not given), *rest]
        runpy.run_module("crate_jax.main", run_name="__main__", alter_sys=True)  # as `python -m crate_jax.main`
    else:
        hint = did_you_mean(command, JOBS | OTHERS, f"the commands are {', '.join(JOBS | OTHERS)}")
        print_error(f"crate-jax: there is no command {escaped(command)!r}{hint}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
