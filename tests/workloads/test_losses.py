"""Losses, and what a test set is judged by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_batch.errors import InvalidSetting
from elastic_batch.job import LossSettings
from elastic_batch.workloads.losses import Judge, build_loss

INPUTS, LABELS = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
MODEL = nn.Linear(4, 3)


def settings(**fields: object) -> LossSettings:
    return LossSettings.model_validate(fields)


def summed(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """A user's own loss: sum and weight."""
    return model(batch[0]).square().sum(), 3


def test_cross_entropy_is_the_default_and_may_be_smoothed() -> None:
    loss = build_loss(settings())(MODEL, (INPUTS, LABELS))
    assert torch.equal(loss, F.cross_entropy(MODEL(INPUTS), LABELS))
    loss = build_loss(settings(label_smoothing=0.1))(MODEL, (INPUTS, LABELS))
    assert torch.equal(loss, F.cross_entropy(MODEL(INPUTS), LABELS, label_smoothing=0.1))


def test_mean_squared_error_is_known() -> None:
    targets = torch.randn(6, 3)
    assert torch.equal(build_loss(settings(name="mse"))(MODEL, (INPUTS, targets)), F.mse_loss(MODEL(INPUTS), targets))


def test_a_users_loss_takes_outputs_and_targets() -> None:
    loss = build_loss(settings(target="torch.nn:MultiMarginLoss", args={"margin": 0.5}))
    assert torch.equal(loss(MODEL, (INPUTS, LABELS)), F.multi_margin_loss(MODEL(INPUTS), LABELS, margin=0.5))


def test_a_target_that_gives_no_function_is_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"loss\.target = .*must give a function, the loss; it gave Fraction"):
        build_loss(settings(target="fractions:Fraction"))


def test_a_judge_sums_loss_and_right_answers() -> None:
    metrics = Judge(build_loss(settings()))(MODEL, (INPUTS, LABELS))
    outputs = MODEL(INPUTS)
    assert metrics["accuracy"] == ((outputs.argmax(1) == LABELS).sum(), 6.0)
    assert metrics["loss"][0].item() == pytest.approx(F.cross_entropy(outputs, LABELS, reduction="sum").item())
    assert metrics["loss"][1] == 6.0


def test_a_judge_applies_its_transform_first() -> None:
    metrics = Judge(build_loss(settings()), lambda batch: (batch[0] * 0, batch[1]))(MODEL, (INPUTS, LABELS))
    same = Judge(build_loss(settings()))(MODEL, (INPUTS * 0, LABELS))
    assert torch.equal(metrics["loss"][0], same["loss"][0])


def test_without_class_labels_there_is_no_accuracy() -> None:
    assert Judge(build_loss(settings(name="mse")))(MODEL, (INPUTS, torch.randn(6, 3))).keys() == {"loss"}


def test_a_loss_that_takes_model_and_batch_is_judged_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_batch.workloads.losses.call_target", lambda *_: summed)
    loss = build_loss(settings(target="mine:make", takes="model, batch"))
    assert loss is summed
    metrics = Judge(loss)(MODEL, (INPUTS, LABELS))
    assert metrics == {"loss": (summed(MODEL, (INPUTS, LABELS))[0], 3.0)}


@pytest.mark.parametrize("batch", [{"x": INPUTS}, [INPUTS], ({"x": INPUTS}, LABELS)])
def test_a_mean_is_weighted_by_the_samples_of_any_batch(batch: Any) -> None:
    def mean(model: nn.Module, _: Any) -> Tensor:
        return torch.tensor(2.0)

    assert Judge(mean)(MODEL, batch)["loss"] == (torch.tensor(12.0), 6.0)


@pytest.mark.parametrize(
    ("batch", "given"), [(INPUTS, "Tensor"), ({"x": INPUTS}, "dict"), ((INPUTS, LABELS, LABELS), "3 parts")]
)
def test_the_built_in_losses_take_pairs(batch: Any, given: str) -> None:
    loss = build_loss(settings())
    for judge in (loss, Judge(loss)):
        with pytest.raises(InvalidSetting, match=f"data = 'samples of {given}': must be pairs of input and target"):
            judge(MODEL, batch)
