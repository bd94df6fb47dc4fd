"""Elastic data-parallel training that grows the batch instead of decaying the learning rate.

Public names are imported when first used, so that planning a schedule never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from elastic_batch.version import VERSION

if TYPE_CHECKING:
    from elastic_batch.ghost import convert_batch_norm
    from elastic_batch.lr_scheduler import from_lr_scheduler
    from elastic_batch.trainer import EMA, Trainer, Update, accuracy

__version__ = VERSION

_HOME = {
    "EMA": "trainer",
    "Trainer": "trainer",
    "Update": "trainer",
    "accuracy": "trainer",
    "convert_batch_norm": "ghost",
    "from_lr_scheduler": "lr_scheduler",
}

__all__ = ["EMA", "Trainer", "Update", "__version__", "accuracy", "convert_batch_norm", "from_lr_scheduler"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
