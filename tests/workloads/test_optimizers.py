"""From the job's `optimizer` to torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from elastic_batch.errors import InvalidSetting
from elastic_batch.job import OptimizerSettings
from elastic_batch.workloads.optimizers import build_optimizer

MODEL = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))


def build(**fields: Any) -> torch.optim.Optimizer:
    settings: OptimizerSettings = TypeAdapter(OptimizerSettings).validate_python({"learning_rate": 0.1, **fields})
    return build_optimizer(settings, MODEL)


def test_sgd_gets_all_its_settings() -> None:
    optimizer = build(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4)
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert [group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")] == [0.1, 0.9, True, 5e-4]
    assert len(group["params"]) == 6


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_and_adamw_get_all_their_settings(name: str, kind: type[torch.optim.Optimizer]) -> None:
    optimizer = build(name=name, betas=[0.8, 0.99], eps=1e-6, weight_decay=0.01)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert [group[name] for name in ("lr", "betas", "eps", "weight_decay")] == [0.1, (0.8, 0.99), 1e-6, 0.01]


def test_norms_and_biases_are_spared_from_weight_decay_when_asked() -> None:
    matrices, vectors = build(name="sgd", weight_decay=1e-4, decay_norms_and_biases=False).param_groups
    assert (matrices["weight_decay"], len(matrices["params"])) == (1e-4, 2)
    assert (vectors["weight_decay"], len(vectors["params"])) == (0.0, 4)


def test_parameters_that_do_not_train_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    settings: OptimizerSettings = TypeAdapter(OptimizerSettings).validate_python({"learning_rate": 0.1})
    assert build_optimizer(settings, model).param_groups[0]["params"] == [model.weight]


def test_a_users_optimizer_gets_parameters_learning_rate_and_arguments() -> None:
    optimizer = build(target="torch.optim:RMSprop", args={"alpha": 0.9}, adaptive=True)
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["alpha"]) == (0.1, 0.9)
    with pytest.raises(InvalidSetting, match=r"optimizer\.args.*RMSprop refuses them"):
        build(target="torch.optim:RMSprop", args={"alfa": 0.9})


def fixed_rate(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """A user's own that does not do as it is told."""
    return torch.optim.SGD(parameters, lr=0.5)


def test_a_users_optimizer_has_the_planned_learning_rate() -> None:
    with pytest.raises(InvalidSetting, match=r"optimizer\.learning_rate = 0\.1: must be what .* has, 0\.5"):
        build(target=f"{__name__}:fixed_rate")
