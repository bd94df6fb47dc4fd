"""What comes before a batch that is the first of its kind."""

from __future__ import annotations

import torch
from torch import nn

from elastic_batch.ghost import RunningStatistics
from elastic_batch.trainer.first_batches import FirstBatches
from elastic_batch.trainer.steering import SteeredOptimizer

_BATCH = torch.arange(32, dtype=torch.float32).view(8, 4) / 32
_SEEDS = [11, 12]


def _first_batches(*, check_loss: bool = True) -> tuple[FirstBatches, nn.Module]:
    model = nn.Linear(4, 3)
    optimizer = SteeredOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    return FirstBatches(model, optimizer, RunningStatistics(model), check_loss=check_loss), model


def test_the_first_batch_comes_in_halves_and_the_first_wide_one_by_its_micro_batches() -> None:
    first, model = _first_batches()
    seen: list[tuple[int, list[int]]] = []
    for part, seeds in first.parts(_BATCH, _SEEDS, 4):
        assert first.is_comparing
        seen.append((len(part), seeds))
        first.record(model(part).square().mean(), None, None)
    assert seen == [(8, []), (4, []), (4, []), (8, _SEEDS), (4, [11]), (4, [12])]
    assert not first.is_comparing
    assert first.obstacle is None
    assert list(first.parts(_BATCH, _SEEDS, 4)) == []


def test_the_first_wide_batch_may_come_later() -> None:
    first, _ = _first_batches(check_loss=False)
    assert list(first.parts(_BATCH[:4], [11], 4)) == []
    assert [seeds for _, seeds in first.parts(_BATCH, _SEEDS, 4)] == [_SEEDS, [11], [12]]


def test_a_wide_batch_that_mixes_samples_is_an_obstacle() -> None:
    first, model = _first_batches(check_loss=False)

    for part, _ in first.parts(_BATCH, _SEEDS, 4):
        first.record(model(part - part.mean(0)).square().mean(), None, None)
    assert first.obstacle is not None
    assert "away from the sum of theirs" in first.obstacle


def test_a_batch_that_cannot_be_cut_is_an_obstacle() -> None:
    first, _ = _first_batches(check_loss=False)
    assert list(first.parts({"x": _BATCH, "table": torch.ones(5)}, _SEEDS, 4)) == []
    assert first.obstacle is not None
    assert first.obstacle.startswith("they cannot be compared with a wider one, because ")


def test_what_an_earlier_loop_left_unanswered_is_not_asked_for_in_the_next() -> None:
    first, _ = _first_batches()
    left = first.parts(_BATCH, _SEEDS, 4)
    next(left)
    assert first.is_comparing
    assert [seeds for _, seeds in first.parts(_BATCH, _SEEDS, 4)] == [_SEEDS, [11], [12]]
    assert not first.is_comparing
    left.close()
