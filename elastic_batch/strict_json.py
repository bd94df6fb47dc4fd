"""JSON that every reader accepts: no NaN, no Infinity, numbers of numpy and torch as plain ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Write a value as JSON; numbers that are not finite become null, which JSON has no other word for.

    Args:
        value: Dicts, lists, tuples, strings, numbers, booleans, None, and anything with an `item()` that gives one of
            these (a number of numpy, a tensor with one element). Other objects are written as their `str()`.
        indent: Spaces of one level; None writes a single line.

    >>> to_json({"loss": float("nan"), "update": 3, "metrics": (0.5, float("inf"))})
    '{"loss": null, "update": 3, "metrics": [0.5, null]}'
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        return _plain(value.item())
    return str(value)
