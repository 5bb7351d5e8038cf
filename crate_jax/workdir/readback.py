"""What a run has written about itself, read back: a crash, a full disk or an editor may have damaged it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

LARGEST = 3.5e38  # no number of a run is larger: they come from float32


def parse(text: str) -> dict[str, Any] | None:
    """The object of a JSON text; None if the text is anything else.

    >>> parse('{"a": [1]}'), parse("[1]"), parse('{"a": ')
    ({'a': [1]}, None, None)
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def is_number(value: Any) -> bool:
    """Returns whether a value is a number of a run, or the null that stands for NaN.

    >>> [is_number(x) for x in (3, 0.5, None, True, "3", float("inf"), 10**400)]
    [True, True, True, False, False, False, False]
    """
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        return False
    return value is None or abs(value) < LARGEST


def is_share(value: Any) -> bool:
    """Returns whether a value is a share in 0..1, or null."""
    return is_number(value) and (value is None or 0 <= value <= 1)


def is_count(value: Any) -> bool:
    """Returns whether a value is a positive whole number, or null."""
    return is_number(value) and (value is None or isinstance(value, int) and value > 0)


def wrong(record: Mapping[str, Any], checks: Mapping[str, Callable[[Any], bool]]) -> list[str]:
    """The keys whose values in a record do not pass their checks; a key that is missing has the value None.

    >>> wrong({"steps": "4", "top1": 0.5}, {"steps": is_count, "loss": is_number, "top1": is_share})
    ['steps']
    """
    return [key for key, check in checks.items() if not check(record.get(key))]


def scalars(line: str) -> dict[str, Any] | None:
    r"""A line of metrics.jsonl, ``{"step": 100, "loss": 0.41}``; None if it is cut short or has other values.

    >>> scalars('{"step": 100, "loss": null}\n'), scalars('{"step": 100, "lo'), scalars('{"loss": 0.41}\n')
    ({'step': 100, 'loss': None}, None, None)
    """
    record = parse(line) if line.endswith("\n") else None
    if record is None or type(record.get("step")) is not int or not all(map(is_number, record.values())):
        return None
    return record
