"""The command line of :mod:`benchmarks.accelerator`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import jax

import benchmarks.accelerator
from benchmarks.accelerator import runner, table
from benchmarks.accelerator.parts import DEFAULT, PARTS, Row, Settings
from crate_jax.errors import UserError
from crate_jax.flags import fail
from crate_jax.workdir.folder import expanduser
from crate_jax.workdir.metrics import write_text


def main(argv: list[str]) -> int:
    """Runs the command; the status is 0 if all was measured, 1 if something failed or is left, 2 for a bad flag."""
    parser = argparse.ArgumentParser(
        "benchmarks.accelerator",
        description=benchmarks.accelerator.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="the time for all (8)")
    parser.add_argument("--out", required=True, help="the folder of the results")
    parser.add_argument("--data", default="", help="CIFAR-10: a folder train/CLASS/*, test/CLASS/*, or an .npz")
    parser.add_argument("--batch", type=int, default=128, help="images per step on each device (128)")
    parser.add_argument("--only", default=",".join(DEFAULT), help="some of the parts (all but questions)")
    parser.add_argument("--debug", action="store_true", help="tiny sizes, also on a CPU")
    args = parser.parse_args(argv)
    if unknown := set(args.only.split(",")) - set(PARTS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; must be of {', '.join(PARTS)}")
    if args.batch < 1:
        parser.error(f"--batch={args.batch}: must be at least 1")
    try:
        args.out, args.data = (str(expanduser(path)) if path else "" for path in (args.out, args.data))
    except UserError as e:
        parser.error(str(e))
    if args.data and not os.path.exists(args.data):
        parser.error(f"--data={args.data}: no such file or folder")
    settings = Settings(args.out, args.debug, args.batch, args.data and os.path.abspath(args.data))
    jax.config.update("jax_platforms", "cpu")  # here only: the accelerator is for the processes of the parts
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # kills the process of the part too
    path = Path(args.out) / "table.md"

    def show(rows: dict[str, dict[str, Row]]) -> None:
        write_text(path, table.markdown(rows))

    try:
        whole = runner.run(settings, args.minutes, [name for name in PARTS if name in args.only.split(",")], show)
    except (UserError, OSError) as e:
        fail(e)
    print(path.read_text(encoding="utf-8"), end="")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
