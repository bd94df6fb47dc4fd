"""A pass of several micro-batches is compared with them one by one before it counts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from elastic_batch import Trainer
from elastic_batch.schedule import StepsSchedule

NUM_SAMPLES, MICRO, STEPS, WIDTH = 48, 4, 12, 6


class TimeFirst(nn.Module):
    """Dropout on [T, N, H]: its first axis is time, and 12 steps are divisible by 2 or 3 micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.drop, self.out = nn.GRU(WIDTH, 5), nn.Dropout(0.5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.drop(self.recurrent(x.transpose(0, 1))[0]).mean(0))


class DroppedWeight(nn.Module):
    """DropConnect: one mask for all samples of a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.out = nn.Linear(WIDTH, 12), nn.Dropout(0.5), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.linear(x.mean(1), self.drop(self.inner.weight)).tanh())


class TwoViews(nn.Module):
    """Normalizes two views of each sample as one batch, the second behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        both = self.norm(self.inner(torch.cat([x.mean(1), x.amax(1)])))
        return self.out(both.tanh()).unflatten(0, (2, -1)).mean(0)


class Plain(nn.Module):
    """Keeps samples apart."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.drop = nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.drop(self.norm(self.inner(x.mean(1))).tanh()))


class Counting(Plain):
    """Counts forward passes in a buffer, which weighs on the result."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        self.get_buffer("count").add_(1)
        return super().forward(x) * (1 + 0.1 * self.get_buffer("count"))


def trained(
    kind: type[nn.Module],
    width: int,
    change: Callable[[nn.Module], None] | None = None,
    *,
    weight: Callable[[int], float] | None = None,
) -> dict[str, Tensor]:
    """The model's state after three updates of three micro-batches."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(NUM_SAMPLES, STEPS, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (NUM_SAMPLES,), generator=generator)
    torch.manual_seed(2)
    model = kind().double()
    if change is not None:
        change(model)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, float]:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss if weight is None else (loss * len(batch[0]), weight(len(batch[0])))

    schedule = StepsSchedule.of(strategy="steps", points=f"0:{3 * MICRO}", max_duration=f"{9 * MICRO}sp")
    with Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
        TensorDataset(inputs, targets),
        schedule,
        loss_fn=loss_fn,
        micro_batch_size=MICRO,
        ghost_batch_size=MICRO,
        micro_batches_per_pass=width,
    ) as trainer:
        assert len(list(trainer)) == 3
    return model.state_dict()


def clamp(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


def jitter(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient + 1e-6 * torch.randn_like(gradient))


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        pytest.param(TimeFirst, None, "away from the sum of theirs", id="dropout along time"),
        pytest.param(DroppedWeight, None, "away from the sum of theirs", id="dropout of a weight"),
        pytest.param(TwoViews, None, "away from the sum of theirs", id="ghosts across views"),
        pytest.param(Plain, clamp, "away from the sum of theirs", id="clamped gradients"),
        pytest.param(Plain, jitter, "the backward pass drew random numbers", id="gradients with noise"),
        pytest.param(Counting, None, "changed the buffer count", id="a counting buffer"),
    ],
)
def test_a_pass_that_is_not_its_micro_batches_is_parted_and_changes_nothing(
    kind: type[nn.Module],
    change: Callable[[nn.Module], None] | None,
    reason: str,
    width: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    single = trained(kind, 1, change)
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        wide = trained(kind, width, change)
    [line] = caplog.messages
    assert "passes have one micro-batch from here on" in line
    assert reason in line
    for name, tensor in single.items():
        torch.testing.assert_close(wide[name], tensor, rtol=1e-10, atol=1e-12)


def test_a_pass_that_is_its_micro_batches_stays_wide(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        wide = trained(Plain, 3)
    assert not caplog.messages
    for name, tensor in trained(Plain, 1).items():
        torch.testing.assert_close(wide[name], tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("weight", "is_parted"), [(float, False), (lambda count: 1.0, True)])
def test_weights_must_add_up(weight: Callable[[int], float], is_parted: bool, caplog: pytest.LogCaptureFixture) -> None:
    single = trained(Plain, 1, weight=weight)
    with caplog.at_level(logging.WARNING):
        wide = trained(Plain, 3, weight=weight)
    assert any("weight of 3 micro-batches in one pass is 1, by themselves 3" in line for line in caplog.messages) is (
        is_parted
    )
    for name, tensor in single.items():
        torch.testing.assert_close(wide[name], tensor, rtol=1e-10, atol=1e-12)
