"""The width of a pass: the fastest that fits, and 1 where a wider one gains little."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from elastic_batch.errors import CannotFuse
from elastic_batch.trainer.passes import choose_width

_CPU = torch.device("cpu")


class Machine:
    """Runs passes in no time at all, on a clock that says how long they would take."""

    def __init__(self, seconds: Callable[[int], float], limit: int = 10**6, error: Exception | None = None) -> None:
        self.now = 0.0
        self.tried: list[int] = []
        self._seconds, self._limit, self._error = seconds, limit, error

    def run_pass(self, width: int) -> None:
        self.tried.append(width)
        if width > self._limit and self._error is not None:
            raise self._error
        self.now += self._seconds(width)

    def choose(self, widest: int) -> int:
        return choose_width(self.run_pass, widest, _CPU, clock=lambda: self.now)


def test_the_fastest_width_for_each_micro_batch_is_taken() -> None:
    assert Machine(lambda width: 1.0 + 0.1 * width + (width > 8) * width).choose(64) == 8


def test_a_small_gain_is_not_worth_the_memory() -> None:
    assert Machine(lambda width: 0.01 + width).choose(16) == 1


def test_no_pass_is_wider_than_the_largest_share() -> None:
    machine = Machine(lambda width: 1.0)
    assert machine.choose(6) == 4
    assert max(machine.tried) == 4


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), MemoryError(), CannotFuse(0, [1, 2], "their shapes differ")]
)
def test_the_search_ends_where_a_pass_does_not_fit(error: Exception) -> None:
    machine = Machine(lambda width: 1.0, limit=4, error=error)
    assert machine.choose(64) == 4
    assert max(machine.tried) == 8


def test_other_errors_are_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Machine(lambda width: 1.0, 1, RuntimeError("shapes cannot be multiplied")).choose(4)
