"""The built-in losses, and what a test set is judged by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_batch.errors import InvalidSetting
from elastic_batch.job import LossSettings
from elastic_batch.workloads.targets import call_target

LossFunction = Callable[[nn.Module, Any], Any]
"""(model, batch) -> the mean over the batch's samples, or (sum, weight)."""


def build_loss(settings: LossSettings) -> LossFunction:
    """Make the function that the trainer minimises.

    Raises:
        InvalidSetting: The target cannot be had, refuses its arguments, or gives no function.
    """
    if settings.target is not None:
        function = call_target("loss.target", settings.target, settings.args)
        if not callable(function):
            rule = f"must give a function, the loss; it gave {type(function).__name__}"
            raise InvalidSetting("loss.target", settings.target, rule)
        return cast(LossFunction, function) if settings.takes == "model, batch" else OutputLoss(function)
    if settings.name == "mse":
        return OutputLoss(F.mse_loss)
    return OutputLoss(nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing))


class OutputLoss:
    """A loss of (outputs, targets) as a loss of (model, (inputs, targets))."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.function = function

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        inputs, targets = _pair(batch)
        return self.function(model(inputs), targets)


class Judge:
    """Measures a model on a batch of the test set: the loss, and the accuracy where targets are class labels.

    Args:
        loss: What training minimises.
        transform: Applied to the batch first; None: the data set gives what the model takes.
    """

    def __init__(self, loss: LossFunction, transform: Callable[[Any], Any] | None = None) -> None:
        self.loss = loss
        self.transform = transform

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, tuple[Tensor, float]]:
        """Return name -> (sum over the samples, number of samples)."""
        batch = self.transform(batch) if self.transform else batch
        if not isinstance(self.loss, OutputLoss):
            return {"loss": _as_sum(self.loss(model, batch), batch)}
        inputs, targets = _pair(batch)
        outputs = model(inputs)
        metrics = {"loss": _as_sum(self.loss.function(outputs, targets), batch)}
        if _are_labels(outputs, targets):
            metrics["accuracy"] = ((outputs.argmax(1) == targets).sum(), float(len(targets)))
        return metrics


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    given = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
    raise InvalidSetting(
        "data",
        f"samples of {given}",
        "must be pairs of input and target for this loss",
        'Give a loss of your own that takes them as they are: loss.target, with loss.takes: "model, batch"',
    )


def _as_sum(loss: Any, batch: Any) -> tuple[Tensor, float]:
    if isinstance(loss, tuple):
        return loss[0], float(loss[1])
    count = float(_num_samples(batch))
    return loss * count, count


def _num_samples(batch: Any) -> int:
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch)


def _are_labels(outputs: Any, targets: Any) -> bool:
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.ndim == 2
        and targets.ndim == 1
        and not torch.is_floating_point(targets)
    )
