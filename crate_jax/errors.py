"""The errors a user can cause; `main` prints each as one line and exits with status 2."""

SHOWN = 5  # texts that one message lists


class UserError(ValueError):
    """Something outside the library is wrong: the message says what, and what would be right."""


class ConfigError(UserError):
    """A configuration that cannot be run."""


class DataError(UserError):
    """Data that cannot be found or read."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or used with this configuration."""


class NonFiniteError(UserError):
    """The loss became NaN or infinite."""


def some(texts: list[str], separator: str) -> str:
    """Joins the first SHOWN texts and says how many more there are.

    >>> some(list("abcdefg"), ", ")
    'a, b, c, d, e, and 2 more'
    """
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return separator.join(texts[:SHOWN] + more)
