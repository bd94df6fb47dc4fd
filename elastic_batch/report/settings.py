"""What a run was trained with: the settings in its directory that alter the trajectory, to tell runs apart by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from elastic_batch.job import TRAJECTORY

Settings = Mapping[str, str]
"""Dotted name -> value as text; what is null or empty is left out."""

FIRST_VALUES = ("global_batch_size", "learning_rate", "momentum")
"""Of the first update: what a script's run directory has instead of optimizer and schedule."""
_OF_SCRIPTS = ("block_size", "tokens_per_sample", "adaptive_optimizer", "trajectory")
_CHOSEN = {*TRAJECTORY, *_OF_SCRIPTS, *FIRST_VALUES} - {"seed"}
_PATHS = {"data.root", "data.download"}


def settings_of(job: Mapping[str, Any]) -> Settings:
    """Everything in a run directory's job that alters the trajectory, except the seed.

    Args:
        job: Of a job file, or the options of a script's trainer.

    >>> settings_of({"name": "a", "seed": 3, "optimizer": {"learning_rate": 0.1, "momentum": None}, "num_workers": 2})
    {'optimizer.learning_rate': '0.1'}
    """
    chosen = {name: value for name, value in job.items() if name in _CHOSEN}
    if chosen.get("ghost_batch_size") is None:
        chosen["ghost_batch_size"] = chosen.get("micro_batch_size")
    return {name: text for name, text in _flat(chosen) if name not in _PATHS}


def task_of(settings: Settings) -> Settings:
    """Those of the settings that say what is trained on what."""
    return {name: value for name, value in settings.items() if name.startswith(("data.", "model."))}


def tell_apart(settings: Settings, others: Sequence[Settings]) -> str:
    """Those of the settings that are not the same in all others, as `name value, name value`.

    >>> tell_apart({"a": "1", "b": "2"}, [{"a": "1"}, {"a": "1", "b": "3"}])
    'b 2'
    """
    telling = (name for name, value in settings.items() if any(other.get(name) != value for other in others))
    return ", ".join(f"{name} {settings[name]}" for name in telling)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        if value:
            yield name, "/".join(map(str, value))
    elif value is not None:
        yield name, str(value).lower() if isinstance(value, bool) else str(value)
