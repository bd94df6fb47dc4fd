"""The width of a pass: the fastest that fits, and 1 where a wider one gains little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from elastic_batch import Trainer
from elastic_batch.errors import CannotFuse
from elastic_batch.schedule import StepsSchedule
from elastic_batch.trainer.passes import choose_width, width_without_measuring
from elastic_batch.trainer.precision import Precision

_CPU = torch.device("cpu")


class Machine:
    """Runs passes in no time at all, on a clock that says how long they and their data would take."""

    def __init__(
        self,
        seconds: Callable[[int], float],
        limit: int = 10**6,
        error: Exception | None = None,
        data_seconds: float = 0.0,
    ) -> None:
        self.now = 0.0
        self.tried: list[int] = []
        self._seconds, self._limit, self._error, self._data_seconds = seconds, limit, error, data_seconds

    def prepare(self, width: int) -> Callable[[], None]:
        self.tried.append(width)
        self.now += self._data_seconds * width

        def run_pass() -> None:
            if width > self._limit and self._error is not None:
                raise self._error
            self.now += self._seconds(width)

        return run_pass

    def choose(self, widest: int) -> int:
        return choose_width(self.prepare, widest, _CPU, clock=lambda: self.now)


def test_in_fp16_passes_have_one_micro_batch_whatever_is_asked_for() -> None:
    widths = [
        width_without_measuring(4, nn.Linear(1, 1), 8, precision=precision, deterministic=False)
        for precision in get_args(Precision)
    ]
    assert dict(zip(get_args(Precision), widths, strict=True)) == {"float32": 4, "bf16": 4, "fp16": 1}


def test_the_fastest_width_for_each_micro_batch_is_taken() -> None:
    assert Machine(lambda width: 1.0 + 0.1 * width + (width > 8) * width).choose(64) == 8


def test_a_small_gain_is_not_worth_the_memory() -> None:
    assert Machine(lambda width: 0.01 + width).choose(16) == 1


def test_no_pass_is_wider_than_the_largest_share() -> None:
    machine = Machine(lambda width: 1.0)
    assert machine.choose(6) == 4
    assert max(machine.tried) == 4


def test_each_width_is_loaded_once_and_how_long_that_takes_does_not_count() -> None:
    machine = Machine(lambda width: 1.0 + 0.1 * width, data_seconds=1000.0)
    assert machine.choose(8) == 8
    assert machine.tried == [1, 2, 4, 8]


def test_the_search_ends_after_two_doublings_without_gain() -> None:
    machine = Machine(lambda width: float(width))
    assert machine.choose(1024) == 1
    assert machine.tried == [1, 2, 4]
    slow_start = Machine(lambda width: width * (1.0 if width < 4 else 0.5))
    assert slow_start.choose(1024) == 4
    assert slow_start.tried == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("full"), "out of memory with 8 micro-batches in a pass"),
        (MemoryError(), "out of memory with 8 micro-batches in a pass"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out of memory with 8 micro-batches in a pass"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), "CUDNN_STATUS_NOT_SUPPORTED"),
        (RuntimeError("input tensor must fit into 32-bit index math"), "32-bit index math"),
        (CannotFuse(0, [1, 2], "their shapes differ"), "their shapes differ"),
    ],
)
def test_the_search_ends_at_a_pass_that_cannot_be_run_and_says_why(
    error: Exception, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(lambda width: 1.0, limit=4, error=error)
    with caplog.at_level("INFO"):
        assert machine.choose(64) == 4
    assert max(machine.tried) == 8
    assert "passes of 8 micro-batches cannot be run" in caplog.text
    assert reason in caplog.text


def test_errors_of_single_micro_batches_are_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Machine(lambda width: 1.0, 0, RuntimeError("shapes cannot be multiplied")).choose(4)


class Counting(nn.Module):
    """Counts what it saw, like a codebook with averages."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        scores: Tensor = self.inner(x)
        return scores


def test_measuring_leaves_buffers_and_batches_as_they_were() -> None:
    model = Counting()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        targets = batch.pop()  # which another pass of the same width finds again
        loss: Tensor = (model(batch.pop()) - targets).square().mean()
        return loss

    schedule = StepsSchedule.of(global_batch_size=8, max_duration="16sp", points="0:8")
    with Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-6),
        TensorDataset(torch.ones(64, 1), torch.ones(64, 1)),
        schedule,
        micro_batch_size=4,
        loss_fn=loss_fn,
        micro_batches_per_pass="auto",
        check_loss=False,
    ) as trainer:
        for _ in trainer:
            pass
    assert model.seen == 16
