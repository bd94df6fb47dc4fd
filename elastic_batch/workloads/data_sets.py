"""What a job trains on and is judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

BatchTransform = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSets:
    """What a job trains on and is judged by.

    Args:
        training: A map-style data set.
        evaluation: The test set; None: no evaluation.
        training_transform: Applied to each collated batch on its device, with random augmentation.
        evaluation_transform: The same without anything random.
    """

    training: Dataset[Any]
    evaluation: Dataset[Any] | None = None
    training_transform: BatchTransform | None = None
    evaluation_transform: BatchTransform | None = None
