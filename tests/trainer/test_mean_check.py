"""A loss that is not the mean over samples is found on the first micro-batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import TensorDataset

from elastic_batch import Trainer
from elastic_batch.errors import MisusedTrainer
from elastic_batch.schedule import StepsSchedule
from elastic_batch.trainer.mean_check import MeanCheck

_MODEL = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 4, generator=generator), torch.tensor([0, 1, 2, 2, 2, 1, 2, 2])


def _check(loss: Callable[[Any], Tensor]) -> None:
    check = MeanCheck(_MODEL, _batch(), 8)
    for part in check.parts():
        assert not _MODEL[1].training
        check.record(loss(part))
    check.verify()
    assert _MODEL[1].training


def test_a_mean_over_samples_passes_though_norms_and_dropout_couple_them() -> None:
    _check(lambda batch: F.cross_entropy(_MODEL(batch[0]), batch[1]))


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda batch: F.cross_entropy(_MODEL(batch[0]), batch[1], ignore_index=2), id="ignore_index"),
        pytest.param(
            lambda batch: F.cross_entropy(_MODEL(batch[0]), batch[1], weight=torch.tensor([9.0, 1.0, 0.1])),
            id="class weights",
        ),
        pytest.param(
            lambda batch: F.cross_entropy(_MODEL(batch[0]) @ _MODEL(batch[0]).T, torch.arange(len(batch[0]))),
            id="negatives from the batch",
        ),
        pytest.param(lambda batch: F.cross_entropy(_MODEL(batch[0]), batch[1], reduction="sum"), id="a sum"),
    ],
)
def test_other_losses_are_refused(loss: Callable[[Any], Tensor]) -> None:
    with pytest.raises(MisusedTrainer, match=r"not a mean over samples.*in a job file.*takes: 'model, batch'"):
        _check(loss)


def _noisy(batch: Any) -> Tensor:
    return F.cross_entropy(_MODEL(batch[0] + torch.randn_like(batch[0])), batch[1])


def _scaled(batch: Any) -> Tensor:
    return F.cross_entropy(_MODEL(batch[0] * random.uniform(0.5, 2.0)), batch[1])


def _mixed(batch: Any) -> Tensor:
    share, order = np.random.beta(1.0, 1.0), np.random.permutation(len(batch[0]))
    return F.cross_entropy(_MODEL(share * batch[0] + (1 - share) * batch[0][order]), batch[1])


@pytest.mark.parametrize("loss", [_noisy, _scaled, _mixed])
def test_a_loss_that_draws_by_itself_cannot_be_compared_and_is_left_alone(
    loss: Callable[[Any], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        _check(loss)
    assert "it draws random numbers" in caplog.text


def test_slight_class_weights_are_found_in_an_untrained_classifier() -> None:
    torch.manual_seed(0)
    head = nn.Linear(32, 10, bias=False)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), head)
    with torch.no_grad():
        head.weight.mul_(0.01)  # every loss is within a few thousandths of log 10
    images, labels = torch.randn(64, 20), torch.arange(64) % 10
    weights = torch.ones(10)
    weights[:3] = 2.0
    check = MeanCheck(model, (images, labels), 64)
    for images, labels in check.parts():
        check.record(F.cross_entropy(model(images), labels, weight=weights))
    with pytest.raises(MisusedTrainer, match="not a mean over samples"):
        check.verify()


def test_what_has_no_such_gradient_is_left_to_the_backward() -> None:
    check = MeanCheck(_MODEL, _batch(), 8)
    for _ in check.parts():
        check.record(torch.tensor(1.0))
    check.verify()


@pytest.mark.parametrize(
    "batch",
    [
        {"edges": torch.zeros(3, 2), "nodes": torch.zeros(8)},
        (torch.zeros(8, 4), "a word for all"),
        (torch.zeros(8, 4), ["one", "more"]),
        [torch.zeros(8, 4)] * 8,
    ],
)
def test_batches_that_cannot_be_halved_are_left_alone(batch: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        assert list(MeanCheck(_MODEL, batch, 8).parts()) == []
    assert "not compared with those of halves" in caplog.text


def test_a_single_sample_is_left_alone() -> None:
    assert list(MeanCheck(_MODEL, (torch.zeros(1, 4),), 1).parts()) == []


def test_nested_batches_are_halved_along_the_samples() -> None:
    parts = list(MeanCheck(_MODEL, {"a": [torch.arange(5)], "name": list("stuvw")}, 5).parts())
    assert [part["a"][0].tolist() for part in parts] == [[0, 1, 2, 3, 4], [0, 1], [2, 3, 4]]
    assert ["".join(part["name"]) for part in parts] == ["stuvw", "st", "uvw"]


def test_what_is_done_to_a_part_is_not_done_to_the_batch() -> None:
    batch = {"x": torch.ones(4), "y": torch.ones(4)}
    for part in MeanCheck(_MODEL, batch, 4).parts():
        part.pop("y").zero_()
    assert torch.equal(batch["y"], torch.ones(4))


def test_every_part_finds_the_buffers_as_they_were() -> None:
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 1))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    check = MeanCheck(model, _batch()[0], 8)
    for inputs in check.parts():
        model[0].train()  # where it iterates once more
        check.record(model(inputs).square().mean())
    check.verify()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_the_check_runs_under_the_trainer_s_autocast() -> None:
    model = nn.Linear(4, 1)
    data = TensorDataset(torch.randn(32, 4, dtype=torch.bfloat16), torch.randn(32, 1))
    schedule = StepsSchedule.of(global_batch_size=8, max_duration="1ep", points="0:8")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Trainer(model, optimizer, data, schedule, micro_batch_size=8, precision="bf16") as trainer:
        for update in trainer.updates():
            for x, y in update:
                update.backward(F.mse_loss(model(x).float(), y))
            update.step()
        assert trainer.num_updates == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_a_wrong_mean_is_told_from_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    inputs, targets = torch.randn(9, 20).to(dtype), torch.arange(9)

    def check(weight: Tensor | None) -> None:
        check = MeanCheck(model, (inputs, targets), 9)
        with torch.autocast("cpu", dtype):
            for x, y in check.parts():
                check.record(F.cross_entropy(model(x), y, weight=weight))
        check.verify()

    check(None)
    with pytest.raises(MisusedTrainer, match="not a mean over samples"):
        check(torch.tensor([3.0] * 3 + [1.0] * 7))


def test_the_gradients_of_fp16_do_not_vanish() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 1))
    check = MeanCheck(model, torch.randn(6, 20, generator=torch.Generator().manual_seed(0)), 6)
    with torch.autocast("cpu", torch.float16):
        for x in check.parts():
            check.record((1e-4 * model(x)).mean())
    check.verify()


class AnswersOtherwise(nn.Module):
    """Like a model with auxiliary outputs in training, whose inner parts couple samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Any:
        scores = self.inner(x)
        return (scores, scores) if self.training else scores


def test_a_model_that_answers_otherwise_in_evaluation_mode_answers_as_in_training() -> None:
    model = AnswersOtherwise()
    check = MeanCheck(model, _batch(), 8)
    num_parts = 0
    for inputs, targets in check.parts():
        scores, auxiliary = model(inputs)
        check.record(F.cross_entropy(scores, targets) + F.cross_entropy(auxiliary, targets))
        num_parts += 1
    check.verify()
    assert num_parts == 3


def test_functional_dropout_is_found_and_switched_off_with_the_whole_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.inner(x), 0.5, self.training)

    model = Net()
    check = MeanCheck(model, _batch(), 8)
    modes = []
    for inputs, targets in check.parts():
        modes.append(model.training)
        check.record(F.cross_entropy(model(inputs), targets))
    check.verify()
    assert modes == [True] * 3 + [False] * 3
    assert model.training


def test_sparse_gradients_are_compared_too() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    check = MeanCheck(model, torch.tensor([0, 1, 2, 2]), 4)
    for part in check.parts():
        check.record(model(part).square().sum())
    with pytest.raises(MisusedTrainer, match="not a mean over samples"):
        check.verify()


def test_only_the_use_of_cudnn_changes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: bool) -> None:
        raise RuntimeError("mix of the legacy and new APIs to set the TF32 behaviour")

    monkeypatch.setattr(torch.backends.cudnn, "flags", refuse)
    enabled = torch.backends.cudnn.enabled
    for _ in MeanCheck(_MODEL, _batch(), 8).parts():
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled == enabled


@pytest.mark.parametrize("loop", ["own", "the trainer's"])
def test_a_model_that_takes_whole_micro_batches_only_is_told_why_it_got_half_a_one(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(4, 1)
    data = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
    schedule = StepsSchedule.of(global_batch_size=8, max_duration="1ep", points="0:8")

    def loss_fn(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0].view(8, 4)), batch[1])

    def train(**options: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Trainer(model, optimizer, data, schedule, micro_batch_size=8, loss_fn=loss_fn, **options) as trainer:
            if loop == "the trainer's":
                list(trainer)
                return
            for update in trainer.updates():
                for batch in update:
                    update.backward(loss_fn(model, batch))
                update.step()

    with nullcontext() if loop == "the trainer's" else pytest.raises(RuntimeError, match="invalid for input of size"):
        train()
    assert caplog.text.count("check_loss=False") == 1
    caplog.clear()
    train(check_loss=False)
    assert not caplog.text


def test_a_wrong_loss_is_not_taken_for_a_model_of_whole_micro_batches(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 3)
    data = TensorDataset(*(tensor.repeat_interleave(4, 0) for tensor in _batch()))
    schedule = StepsSchedule.of(global_batch_size=8, max_duration="1ep", points="0:8")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = torch.tensor([1.0, 5.0, 0.1])
    with Trainer(model, optimizer, data, schedule, micro_batch_size=8) as trainer:
        update = next(trainer.updates())
        for x, y in update:
            update.backward(F.cross_entropy(model(x), y, weight=weight))
        assert isinstance(update.error, MisusedTrainer)
    assert "half a micro-batch" not in caplog.text
