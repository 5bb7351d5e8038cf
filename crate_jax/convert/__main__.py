"""Exchange weights with other libraries: ``python -m crate_jax.convert inspect|import|export``."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from crate_jax.errors import (
    ConfigError,
    UserError,
    end_output,
    escaped,
    import_jax,
    open_closed_streams,
    print_error,
    some,
)

if __name__ == "__main__":
    open_closed_streams()  # before the other imports, which keep the streams
    import_jax()

from crate_jax.config import base, parts
from crate_jax.convert import files, flags, pretrained, weights
from crate_jax.convert.describe import Hints
from crate_jax.convert.export import FORMATS, export
from crate_jax.convert.families import FAMILIES
from crate_jax.convert.rules import Match
from crate_jax.models import batch_norm
from crate_jax.parallel.parameters import count
from crate_jax.validation import changed_keys
from crate_jax.workdir import bucket, checkpoint
from crate_jax.workdir.folder import expanduser


def inspect(args: argparse.Namespace) -> None:
    """Prints what a file or a workdir holds, then raises if it cannot be used.

    Raises:
      UserError: the file cannot be read, or its weights do not fit a model.
    """
    file = files.weights_file(args.path)
    if file is None and (bucket.is_address(args.path) or checkpoint.of_step(args.path) or Path(args.path).is_dir()):
        found = {"--family": args.family, "--prefix": args.prefix, **flags.given(_hints(args))}
        if wrong := [flag for flag, value in found.items() if value not in ("", None)]:
            raise ConfigError(f"{', '.join(wrong)}: {args.path} is of a run, whose config says it; leave the flag out")
        encoder = pretrained.load(args.path, "PATH")
        _show(encoder.name, encoder.config, encoder.params)
        return
    state, about = files.read(args.path, args.prefix)
    where = "".join(f", under '{key}'" for key in about["nested"])
    print(escaped(f"{file}: {about['format']}{where}, {len(state)} tensors"))
    if weights.METADATA_KEY not in about["metadata"]:
        _show_match(weights.choose(state, about, args.family, args.prefix)[1])
    loaded = _load(args)
    _show(f"family {loaded.family}", loaded.config, loaded.params)


def _show(name: str, config: dict[str, Any], params: dict[str, Any]) -> None:
    trained = batch_norm.split(params)[0]  # as the log of a training run and its summary.json count them
    counts = ", ".join(f"{part} {count(tree):,}" for part, tree in trained.items())
    print(escaped(f"{name}: {count(trained):,} parameters ({counts})"))
    c = weights.model_config(config, params)
    old, new = ({section: x[section].to_dict() for section in (*parts(c, params), "data")} for x in (base(), c))
    for line in changed_keys(old, new):
        key, _, change = line.partition(": ")
        print(f"  config.{key} = {change.partition(' -> ')[2]}")


def _show_match(found: Match) -> None:
    for name in found.missing:
        print(f"  missing: {name}")
    for name in found.unknown:
        print(f"  not known: {name}")
    for why in sorted(set(found.ignored.values())):
        print(f"  not needed: {some(sorted(n for n, w in found.ignored.items() if w == why), ', ')} ({why})")
    for part in found.absent:
        print(f"  without: {part}")


def import_(args: argparse.Namespace) -> None:
    """Writes other people's weights in our own format.

    Raises:
      UserError: the file cannot be read or written, or its weights do not fit a model.
    """
    loaded = _load(args)
    weights.require_replaceable(expanduser(args.out), args.path)
    weights.save(args.out, loaded.config, loaded.params)
    if loaded.match is not None:
        _show_match(loaded.match)
    _show(f"family {loaded.family}", loaded.config, loaded.params)
    print(f"wrote {args.out}")


def _load(args: argparse.Namespace) -> weights.Weights:
    """The model of a file, to which all flags apply."""
    hints = _hints(args)
    loaded = weights.load(args.path, args.family, hints, args.prefix)
    weights.require_used(args.path, loaded, hints)
    return loaded


def export_(args: argparse.Namespace) -> None:
    """Writes our weights for another library.

    Raises:
      UserError: the checkpoint cannot be read, or the format cannot hold it.
    """
    encoder = pretrained.load(args.path, "CHECKPOINT")
    made = export(encoder.config, encoder.params, args.format, args.out, args.path)
    for part in made.left_out:
        print(f"  left out: {part}")
    print(f"{encoder.name}: wrote {len(made.state)} tensors under the names of {made.family} to {args.out}")


def _hints(args: argparse.Namespace) -> Hints:
    size = args.image_size
    if size is not None:
        sides = size.lower().split("x")
        if len(sides) > 2 or not all(re.fullmatch("0*[1-9][0-9]{0,8}", side) for side in sides):
            raise ConfigError(f"--image-size={size}: must be a number of pixels, or HEIGHTxWIDTH")
        size = (int(sides[0]), int(sides[-1]))
    return Hints(
        heads=args.heads,
        decoder_heads=args.decoder_heads,
        image_size=size,
        mean=_three("mean", args.mean),
        std=_three("std", args.std),
        target=args.target,
        lam=args.lam,
        stem_padding=args.stem_padding,
    )


def _three(flag: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(map(float, text.split(",")))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(map(math.isfinite, values)) or (flag == "std" and min(values) <= 0):
        raise ConfigError(f"--{flag}={text}: must be three numbers, such as 0.5,0.5,0.5")
    return values


MODULE = "python -m crate_jax.convert"  # how it is called without crate-jax


class Parser(argparse.ArgumentParser):
    """Argparse's parser, with errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        print_error(f"{escaped(message)}; {self.prog} --help says more")
        sys.exit(2)

    def print_help(self, file: Any = None) -> None:
        """Prints the help; argparse would not say that it cannot be written."""
        print(self.format_help(), end="", file=file)
        end_output()


def parser(prog: str = MODULE) -> Parser:
    """The parser of the command line; `prog` is what the user typed to call it."""
    top = Parser(prog=prog, description="Exchange weights with other libraries.")
    commands = top.add_subparsers(required=True, metavar="inspect|import|export")
    for name, run, path, what in (
        ("inspect", inspect, "FILE_OR_WORKDIR", "show what a file holds, and which tensors are used"),
        ("import", import_, "FILE", "write other people's weights in our own format"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.set_defaults(run=run)
        command.add_argument("path", metavar=path)
        command.add_argument("--family", default="", help=f"one of {', '.join(FAMILIES)}; default: detected")
        command.add_argument(
            "--prefix", default="", help="what the names of the network to read begin with, if the file holds several"
        )
        command.add_argument(
            "--stem-padding", type=int, choices=(1, 2), help="of a ResNet's 3x3 stem, if the names do not show it"
        )
        command.add_argument("--heads", type=int, help="the encoder's heads, if its width was never published")
        command.add_argument("--decoder-heads", type=int, help="the decoder's heads, if its width was never published")
        command.add_argument("--image-size", metavar="N|HxW", help="pixels, if there is no square position table")
        command.add_argument("--mean", metavar="R,G,B", help="mean of pixels scaled to [0, 1]; default: ImageNet's")
        command.add_argument("--std", metavar="R,G,B", help="their standard deviation; default: ImageNet's")
        command.add_argument("--target", choices=("pixel", "patch_normalised"), help="what the decoder predicts")
        command.add_argument("--lam", type=float, help="CRATE's lambda; default: as released")
        if name == "import":
            command.add_argument("--out", required=True, metavar="OUT.safetensors")
    command = commands.add_parser("export", help="write our weights to a folder for another library")
    command.set_defaults(run=export_)
    command.add_argument("path", metavar="CHECKPOINT", help="a workdir, RUN/checkpoints/STEP, or a file of weights")
    command.add_argument("--format", required=True, choices=tuple(FORMATS))
    command.add_argument("--out", required=True, metavar="DIR")
    return top


def main(argv: Sequence[str], prog: str = MODULE) -> int:
    """Runs one command; returns the exit status, which is 2 after an error of the user's: one line says it."""
    try:
        args = parser(prog).parse_args(argv)
        args.run(args)
        end_output()
    except (UserError, OSError) as e:
        message = str(e)
        if isinstance(e, OSError) and e.filename is None:  # of all that a command writes, only stdout has no name
            message = f"the output cannot be written ({e.strerror})"
        print_error(" ".join(message.split()))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
