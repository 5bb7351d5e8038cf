"""The command ``crate-jax``, also ``python -m crate_jax``: one word for each job, and the exchange of weights.

``crate-jax JOB FLAGS`` is ``python -m crate_jax.main --job=JOB FLAGS``, with the job's own config if there is one.
"""

from __future__ import annotations

import difflib
import re
import runpy
import sys

from crate_jax import __version__
from crate_jax.errors import end_output, escaped, open_closed_streams, print_error

# The jobs of crate_jax.jobs.JOBS, which takes a second to import.
JOBS = {
    "pretrain": "train an encoder without labels",
    "evaluate": "judge an encoder by k-NN, a probe or few labels",
    "finetune": "fine-tune an encoder on labels",
    "segment": "learn a class for every pixel on an encoder",
    "sweep": "one pre-training run per value and seed, as a table and a figure",
    "align": "which corruption can teach something about given labels, before any training",
    "report": "one page about one run or several",
}
# The other jobs have a config of their own name, which needs no --config.
CONFIG_NEEDED = {"pretrain": "cifar10:encoder=crate", "finetune": "evaluate:protocol=finetune_crate"}
OTHERS = {
    "convert": "read and write weights of other libraries: inspect, import, export",
    "configs": "list the configs that --config takes by name",
}


def usage() -> str:
    """The commands, one a line."""
    return "\n".join(
        [
            "usage: crate-jax COMMAND [--config=NAME_OR_FILE[:key=value,...]] [--workdir=DIR] [--config.KEY=VALUE ...]",
            "",
            *(f"  {name:<10}{what}" for name, what in (JOBS | OTHERS).items()),
            "",
            "crate-jax COMMAND --help says more. The same command in the same workdir continues what was stopped.",
        ]
    )


def cards() -> str:
    """The library's configs, one a line: name, and what it is for."""
    from crate_jax import config_files  # here: it brings ml_collections, which no other answer needs

    return "\n".join(f"{name:<15}{config_files.card(name)}" for name in config_files.names())


def main() -> int:
    """Runs the command of sys.argv; returns the exit status."""
    open_closed_streams()
    command, *rest = sys.argv[1:] or ["--help"]
    answers = {"configs": cards, "--help": usage, "-h": usage, "--version": lambda: f"crate-jax {__version__}"}
    if command in answers:
        try:
            print(answers[command]())
            end_output()
        except OSError as e:
            print_error(f"the output cannot be written ({e.strerror})")
            return 2
    elif command == "convert":
        from crate_jax.convert.__main__ import main as convert

        return convert(rest)
    elif command in JOBS:
        given = any(re.match("--?(config|help|helpfull)(=|$)", arg) for arg in rest)
        if not given and command in CONFIG_NEEDED:
            print_error(f"crate-jax {command}: --config is missing, such as --config={CONFIG_NEEDED[command]}")
            return 2
        sys.argv = [sys.argv[0], f"--job={command}", *[f"--config={command}"] * (not given), *rest]
        runpy.run_module("crate_jax.main", run_name="__main__", alter_sys=True)  # as `python -m crate_jax.main`
    else:
        close = difflib.get_close_matches(command, JOBS | OTHERS, 1)
        hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(JOBS | OTHERS)}"
        print_error(f"crate-jax: there is no command {escaped(command)!r}; {hint}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
