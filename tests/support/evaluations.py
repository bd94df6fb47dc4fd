"""Evaluations of a few numbers, as a worker of a world runs them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from elastic_batch.engines import Engine
from elastic_batch.errors import MisusedTrainer
from elastic_batch.trainer.evaluation import evaluate


def evaluate_classes(engine: Engine, names: list[list[str]]) -> dict[str, float] | str:
    """Evaluate ten samples, of which measures name those of a worker's list; the error's text if there is one."""

    def measure(model: nn.Module, batch: Any) -> dict[str, tuple[float, float]]:
        return {name: (float(len(name)), 1.0) for name in names[engine.rank]}

    data = TensorDataset(torch.zeros(10))
    try:
        return evaluate(engine, nn.Linear(1, 1), data, measure, device=torch.device("cpu"), batch_size=5)
    except MisusedTrainer as error:
        return str(error)


def evaluate_to_infinity(engine: Engine) -> float:
    """Evaluate a single sample, whose value is infinite."""
    data = TensorDataset(torch.zeros(1))
    found = evaluate(
        engine, nn.Linear(1, 1), data, lambda *_: (math.inf, 1.0), device=torch.device("cpu"), batch_size=5
    )
    return float(*found.values())
