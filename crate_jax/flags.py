"""The flags of the command line, and the wording of its errors: each is one line and status 2."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import jax
from absl import flags
from ml_collections import config_flags

from crate_jax.config import require_keys
from crate_jax.errors import ConfigError, UserError
from crate_jax.parallel import distributed

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


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no room; `JaxRuntimeError` is also what a collective raises that another process left."""
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(
        re.search("RESOURCE_EXHAUSTED|Out of memory", str(error))
    )
