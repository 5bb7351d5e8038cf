"""The errors that a user can cause; `main` prints each in one line and exits with status 2."""

MAX_LISTED = 5  # texts that one message lists


class UserError(ValueError):
    """Something outside the library is wrong; the message says what is wrong and what would be right."""


class ConfigError(UserError):
    """A configuration that cannot be run."""


class DataError(UserError):
    """Data that cannot be found or read."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or used with this configuration."""


class NonFiniteError(UserError):
    """The loss, a gradient or a feature is NaN or infinite."""


def some(texts: list[str], separator: str) -> str:
    """Joins the first MAX_LISTED texts and says how many more there are.

    >>> some(list("abcdefg"), ", ")
    'a, b, c, d, e, and 2 more'
    """
    more = [f"and {len(texts) - MAX_LISTED} more"] if len(texts) > MAX_LISTED else []
    return separator.join(texts[:MAX_LISTED] + more)
