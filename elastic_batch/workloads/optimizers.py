"""From the `optimizer` section of a job to a torch optimizer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from elastic_batch.errors import InvalidSetting
from elastic_batch.job import AdamSettings, AdamWSettings, OptimizerSettings, SGDSettings, TargetOptimizerSettings
from elastic_batch.workloads.targets import call_target


def build_optimizer(settings: OptimizerSettings, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of a model's parameters.

    Raises:
        InvalidSetting: The target cannot be had, or refuses its arguments.
    """
    if isinstance(settings, TargetOptimizerSettings):
        optimizer = call_target(
            "optimizer.target", settings.target, settings.args, model.parameters(), lr=settings.learning_rate
        )
        _require_rate(settings, optimizer)
        return cast(torch.optim.Optimizer, optimizer)
    groups = _parameter_groups(model, settings)
    if isinstance(settings, SGDSettings):
        return torch.optim.SGD(
            groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=settings.nesterov
        )
    kind = torch.optim.AdamW if isinstance(settings, AdamWSettings) else torch.optim.Adam
    return kind(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)


def _require_rate(settings: TargetOptimizerSettings, optimizer: Any) -> None:
    """See that what was planned is what is trained; the trainer refuses what is no optimizer."""
    if isinstance(optimizer, torch.optim.Optimizer):
        rate, wanted = float(optimizer.param_groups[0]["lr"]), settings.learning_rate
        if rate != wanted:
            rule = f"must be what the optimizer's first parameter group has, {rate:g}: it is what the schedule scales"
            raise InvalidSetting("optimizer.learning_rate", wanted, rule)


def _parameter_groups(model: nn.Module, settings: SGDSettings | AdamSettings | AdamWSettings) -> list[dict[str, Any]]:
    """Put vectors (biases, scales of norms) into a group of their own where weight decay shall spare them."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.decay_norms_and_biases:
        return [{"params": parameters, "weight_decay": settings.weight_decay}]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
