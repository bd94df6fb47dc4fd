"""The fingerprint: the settings that a run must share with a checkpoint to go on as if never interrupted.

A fingerprint is a dict of plain values, nested as one likes. It holds what alters the trajectory and nothing else:
workers, paths, logging and intervals stay out, so they may change. The job's length, `end` (samples), may change too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from elastic_batch.errors import InvalidSetting, JobDiffers

Fingerprint = Mapping[str, Any]
END = "end"
_ABSENT = "(not set)"


def check_fingerprint(saved: Fingerprint, current: Fingerprint, *, where: str, position: int) -> None:
    """Make sure that a job may go on from a checkpoint.

    Args:
        saved: The fingerprint in the checkpoint.
        current: The job's, now. Its top-level field `end` may differ, but not lie before `position`.
        where: The checkpoint or run directory, for the message.
        position: Samples committed in the checkpoint.

    Raises:
        JobDiffers: With every difference, by dotted field name.
        InvalidSetting: The job now ends before `position`.
    """
    old, new = _flat(saved), _flat(current)
    old.pop(END, None)
    end = new.pop(END, None)
    differences = {
        name: (old.get(name, _ABSENT), new.get(name, _ABSENT))
        for name in old.keys() | new.keys()
        if old.get(name, _ABSENT) != new.get(name, _ABSENT)
    }
    if differences:
        raise JobDiffers(where, differences)
    if end is not None and end < position:
        raise InvalidSetting(
            "max_duration", f"{end}sp", f"must not end before the position of {where}, {position} samples"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted names to plain values, equal before and after a journey through JSON."""
    if isinstance(value, Mapping) and (value or not name):
        items = (_flat(item, f"{name}.{key}" if name else str(key)) for key, item in value.items())
        return {key: item for flat in items for key, item in flat.items()}
    return {name: _journeyed(value)}


def _journeyed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _journeyed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_journeyed(item) for item in value]
    # JSON has no word for these, and a NaN differs even from itself.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
