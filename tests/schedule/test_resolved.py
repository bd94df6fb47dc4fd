"""A resolved schedule as such: positions, pickling, equality, what does not enter it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule import ConvertSchedule, Schedule, ScheduleContext, walk


def _build(**fields: Any) -> Schedule:
    spec = ConvertSchedule.of(**{"global_batch_size": 64, "max_duration": "10ep", "shape": "cosine", **fields})
    return spec.build(ScheduleContext(num_samples=10_000, micro_batch_size=16, learning_rate=0.1, momentum=0.9))


@pytest.mark.parametrize("position", [-1, 100_000, 10**9])
def test_a_position_outside_of_the_job_is_an_error(position: int) -> None:
    with pytest.raises(ValueError, match="outside of the job, which has 100000 samples"):
        _build().at(position)


def test_it_survives_pickling() -> None:
    schedule = _build(warmup="1ep")
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert [copy.at(p) for p in range(0, 100_000, 999)] == [schedule.at(p) for p in range(0, 100_000, 999)]


def test_a_walk_may_begin_at_any_update() -> None:
    schedule = _build()
    runs = list(walk(schedule))
    middle = runs[len(runs) // 2]
    assert list(walk(schedule, middle.position)) == runs[len(runs) // 2 :]
    assert list(walk(schedule, schedule.end)) == []


def test_the_updates_of_an_equal_batch_are_counted_without_walking() -> None:
    schedule = _build()
    position = 0
    batches = [run.values.global_batch_size for run in walk(schedule)]
    assert all(run.num_updates == 1 for run in walk(schedule)), "the learning rate changes with every update"
    index = 0
    while position < schedule.end:
        count = schedule.updates_of_equal_batch(position)
        assert set(batches[index : index + count]) == {batches[index]}
        assert index + count == len(batches) or batches[index + count] != batches[index]
        position += count * batches[index]
        index += count
    assert index == len(batches)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_samples", 0),
        ("micro_batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("tokens_per_sample", 0),
    ],
)
def test_a_context_out_of_range_is_refused(field: str, value: Any) -> None:
    fields = {"num_samples": 100, "micro_batch_size": 10, "learning_rate": 0.1, field: value}
    with pytest.raises(InvalidSetting, match=f"^{field} = "):
        ScheduleContext(**fields)
