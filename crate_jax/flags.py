"""The flags of the command line, and how it words errors: each error is one line and status 2."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

import jax
from absl import flags
from ml_collections import config_flags

from crate_jax import config_files, usage
from crate_jax.config import KEYS, require_keys
from crate_jax.errors import ConfigError, UserError, did_you_mean, escaped, print_error
from crate_jax.parallel import distributed

USAGE = "python -m crate_jax.main --config=configs/NAME.py[:key=value,...] --workdir=DIR"


def define_flags() -> None:
    """Defines the flags of the command line. The import does not, since other commands import this module too."""
    try:
        config_flags.DEFINE_config_file("config", None, "A config's name or file; its argument follows a colon.")
    except flags.Error as e:  # absl reads --flagfile here
        fail(e)
    flags.DEFINE_string("job", None, usage.FLAGS["job"])
    flags.DEFINE_string("workdir", None, usage.FLAGS["workdir"])
    flags.DEFINE_string("coordinator_address", "", usage.FLAGS["coordinator_address"])
    flags.DEFINE_integer("num_processes", 0, usage.FLAGS["num_processes"], lower_bound=0)
    flags.DEFINE_integer("process_id", -1, usage.FLAGS["process_id"], lower_bound=-1)
    flags.DEFINE_string("cluster_detection_method", "", usage.FLAGS["cluster_detection_method"])


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the flags with absl; a bad flag, config file or key ends the command with one line and status 2.

    Returns:
      the arguments that are not flags: the program's name only.
    """
    try:
        argv = [*argv[:1], *flags.FLAGS.read_flags_from_files(argv[1:])]  # for --config, which ml_collections looks for
        if len(given := [value for *_, value in _configs(argv)]) > 1:
            raise ConfigError(f"--config is given {len(given)} times, as {' and as '.join(given)}: give it once")
        sys.argv = argv = _with_paths(argv)  # ml_collections reads sys.argv
        rest = flags.FLAGS(argv)
        if not _config_path(argv):
            raise ConfigError(f"--config is missing; usage: {USAGE}")
        require_keys(flags.FLAGS.config)
        job, wanted = flags.FLAGS.config.job, flags.FLAGS.job
        if wanted and job != wanted:
            raise ConfigError(
                f"the config has config.job={job!r}, not {wanted!r}: use crate-jax {job}, or another --config"
            )
        if not flags.FLAGS["workdir"].present and job != "report":
            usage = f"crate-jax {job} --config=NAME[:key=value,...] --workdir=DIR" if wanted else USAGE
            raise ConfigError(f"--workdir is missing; usage: {usage}")
        if len(rest) > 1:
            raise ConfigError(f"unexpected argument {rest[1]!r}; flags start with --")
        return rest
    except Exception as e:  # the user can correct whatever a config file or an override raises
        fail(e)


def fail(error: BaseException) -> NoReturn:
    """Prints an error as one line and ends the process with status 2."""
    print_error(one_line(error))
    if distributed.processes() > 1:
        distributed.leave(2)
    sys.exit(2)


# Messages of absl and ml_collections (regular expressions), and our text in their place.
REWORDED = (
    (r"invalid literal for int\(\) with base 10: .*", "must be a whole number"),
    (r"could not convert string to float: .*", "must be a number"),
    (r"\('Non-boolean argument to boolean flag', .*\)", "must be true or false"),
    (r"Failed to parse .* as a ConfigDict: .*", "is a group of keys; set one of them, as in --config.log.every=10"),
    (r"Error while parsing string: .* as tuple\. .*", "must be values with commas between them, texts in quotes"),
    (r"Attribute .* does not exist and .* Attempting to lookup: (\S+)", r"config: unknown key '\1'"),
    (r"^ERROR:: ", ""),
)
OUT_OF_MEMORY = (
    "not enough memory; use a smaller config.batch_size or config.encoder, more micro-batches (config.accumulate), or "
    "config.remat=True; in an evaluation, a smaller config.evaluation.batch_size"
)
# ml_collections wraps an error of a config file, with its traceback, in a message that begins so.
FROM_CONFIG_FILE = "Error whilst parsing config file:"


def one_line(error: BaseException) -> str:
    """An error's message on one line.

    The parsers of flags wrap the error that a config file or a value raised. The message is that of the wrapped error,
    with the line of the config file where it was raised.

    >>> one_line(ValueError("flag --num_processes=two: invalid literal for int() with base 10: 'two'"))
    'flag --num_processes=two: must be a whole number'
    """
    chain = [error]
    while (following := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(following)
    chain = [e for e in chain if not str(e).startswith(FROM_CONFIG_FILE)] or chain
    message = (
        next((str(e) for e in chain if isinstance(e, UserError)), "")
        or _config_file_error(chain)
        or config_files.message(chain[0])
    )
    message = " ".join(message.split())
    for pattern, text in REWORDED:
        message = re.sub(pattern, text, message)
    if match := re.match(r"config: unknown key '([^']+)'", message):
        message = _unknown_key(match[1])
    return escaped(message)


def _unknown_key(name: str) -> str:
    """The message about a key of the command line, of which ml_collections tells only the part that is unknown."""
    given = [match[1] for arg in sys.argv if (match := re.match(r"--?(?:no)?config\.([^=]+)", arg))]
    whole = next((key for key in given if name == key or name in key.split(".")), name)
    return f"config: unknown key '{whole}'{did_you_mean(whole, KEYS, most=2)}"


def _config_file_error(chain: Sequence[BaseException]) -> str:
    """The config file, the line that raised an error, and its message; empty if no line of the file did."""
    path = _config_path(sys.argv)
    for e in chain:
        if isinstance(e, SyntaxError) and e.filename != "<unknown>":  # "<unknown>" is the value of a flag
            return f"{e.filename or path}, line {e.lineno or 1}: SyntaxError: {e.msg}"
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        if lines:
            return f"{path}, line {lines[-1]}: {type(e).__name__}: {config_files.message(e)}"
        if isinstance(e, AttributeError) and "has no attribute 'get_config'" in str(e):
            return f"--config={path}: has no function get_config, which returns the config"
        if isinstance(e, TypeError) and "get_config()" in str(e):
            return f"--config={path}: {e}; the text after the colon of --config is its only argument"
    return ""


def _configs(argv: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Each value of --config: the argument that holds it, what stands before it there, the value."""
    for i, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        if flag in ("--config", "-config"):
            if equals:
                yield i, f"{flag}=", value
            elif i + 1 < len(argv):
                yield i + 1, "", argv[i + 1]


def _config_path(argv: Sequence[str]) -> str:
    """The path of --config without the colon and the text after it; empty if there is no --config."""
    return next((value.partition(":")[0] for _, _, value in _configs(argv)), "")


def _with_paths(argv: Sequence[str]) -> list[str]:
    """The arguments with the path of each config file in place of its name.

    Raises:
      ConfigError: there is no such file.
    """
    out = list(argv)
    for i, before, value in _configs(argv):
        name, colon, argument = value.partition(":")
        if name:
            try:
                out[i] = f"{before}{config_files.find(name)}{colon}{argument}"
            except ConfigError as e:
                raise ConfigError(f"--config={e}") from None
    return out


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had too little memory. A collective that another process left raises `JaxRuntimeError` too."""
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(
        re.search("RESOURCE_EXHAUSTED|Out of memory", str(error))
    )
