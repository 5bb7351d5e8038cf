"""The errors that a user can cause; a command prints each in one line and exits with status 2."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable

MAX_LISTED = 5  # texts that one message lists
MAX_LENGTH = 200  # characters of each


class UserError(ValueError):
    """Something outside the library is wrong; the message says what is wrong and what would be right."""

    def __str__(self) -> str:
        return escaped(re.sub(r"\s*\n\s*", " ", super().__str__()))  # a message of another library may have many lines


class ConfigError(UserError):
    """A configuration that cannot be run."""


class DataError(UserError):
    """Data that cannot be found or read."""

    def __str__(self) -> str:
        return escaped(ValueError.__str__(self))  # a line break is part of a name


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or used with this configuration."""


class NonFiniteError(UserError):
    """The loss, a gradient or a feature is NaN or infinite."""


def escaped(text: str) -> str:
    r"""Escapes what a terminal would not print, for messages with a name or path in them.

    Names of files may hold line breaks, a terminal's escape codes, marks that turn the direction of writing, and bytes
    that are not text. Everything that prints such a name uses this function.

    >>> escaped("a\nb\x1b[31m\u202e\udcff"), escaped("Käse 猫.png")
    ('a\\nb\\x1b[31m\\u202e\\udcff', 'Käse 猫.png')
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def open_closed_streams() -> None:
    """Opens the null device in place of standard streams that the shell closed (`>&-`).

    Such a stream is None in Python, and the next file that is opened gets its number: what a library writes to stderr
    would go into that file.
    """
    for name in ("stdin", "stdout", "stderr"):  # in the order of their numbers, of which the lowest free one is taken
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115


def import_jax() -> None:
    """Imports JAX; ends the command with one line and status 2 if it does not take a variable of the environment.

    Every command calls it before it imports what imports JAX.
    """
    try:
        import jax  # noqa: F401
    except ValueError as e:  # such as of JAX_NUM_CPU_DEVICES=two
        print_error(f"{e}; correct the environment variable of that name, or unset it")
        sys.exit(2)
    devices = os.environ.get("JAX_NUM_CPU_DEVICES", "1")
    if int(devices) < 1:  # JAX would find no device, and blame JAX_PLATFORMS
        print_error(f"JAX_NUM_CPU_DEVICES={devices}: must be at least 1; correct it, or unset it")
        sys.exit(2)


def end_output() -> None:
    """Writes what stdout still holds.

    Raises:
      OSError: stdout is closed, its disk is full or its reader is gone.
    """
    if getattr(sys.stdout, "name", "") == os.devnull:  # it was closed, see `open_closed_streams`
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    sys.stdout.flush()


def print_error(message: str) -> None:
    """Prints a message of one line to stderr, and what stdout still holds, though nobody may read them any more.

    Without a reader, or on a full disk, Python would write the rest at its exit, fail again, and end with another
    status; so what cannot be written is dropped.
    """
    for stream, text in ((sys.stderr, f"error: {message}\n"), (sys.stdout, "")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def in_markdown(text: str) -> str:
    r"""Escapes a name for a line or a table's cell of Markdown: what a terminal would not print, and what is markup.

    Underscores stay: within a word they are not markup, and most keys and names have some.

    >>> print(in_markdown("a_b|<img src=x>\n**c**"))
    a_b\|\<img src=x>\\n\*\*c\*\*
    """
    return re.sub(r"([\\`*<\[|])", r"\\\1", escaped(text))


def some(texts: list[str], separator: str) -> str:
    """Joins the first MAX_LISTED texts, each cut to MAX_LENGTH characters, and says how many more there are.

    >>> some(list("abcdefg"), ", ")
    'a, b, c, d, e, and 2 more'
    """
    more = [f"and {len(texts) - MAX_LISTED} more"] if len(texts) > MAX_LISTED else []
    first = [text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}..." for text in texts[:MAX_LISTED]]
    return separator.join(first + more)


ALIKE, SAME_LAST_PART = 0.6, 0.25  # the least likeness of names, as of difflib; and what an equal last part adds to it


def did_you_mean(wrong: str, known: Iterable[str], otherwise: str = "", most: int = 1) -> str:
    """The end of a message about an unknown name: the names that it resembles, or `otherwise`, which may be empty.

    A name in another group, or without its group, resembles it most.

    >>> did_you_mean("encoder.lamm", ["encoder.lam", "seed"]), did_you_mean("x", ["seed"], "write seed")
    ('; did you mean encoder.lam?', '; write seed')
    >>> did_you_mean("lr", ["seed", "optimizer.lr"]), did_you_mean("encoder.lamb", ["twins.lamb", "encoder.lam"])
    ('; did you mean optimizer.lr?', '; did you mean encoder.lam?')
    """
    last = wrong.rpartition(".")[2]
    near = {}
    for name in known:
        alike, same = difflib.SequenceMatcher(None, wrong, name).ratio(), name.rpartition(".")[2] == last
        if alike >= ALIKE or same:
            near[name] = alike + SAME_LAST_PART * same
    found = sorted(near, key=lambda name: -near[name])[:most]
    text = f"did you mean {' or '.join(found)}?" if found else otherwise
    return f"; {text}" if text else ""
