"""A resolved schedule as such: positions, pickling, equality, what does not enter it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule import ConvertSchedule, Schedule, ScheduleContext, from_function, walk


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


@pytest.mark.parametrize(
    "shape",
    [
        {"name": "step", "every": "3ep", "gamma": 0.5},
        {"name": "cosine-restarts", "period": "3ep"},
        {"name": "exponential", "gamma": 0.8},
    ],
    ids=lambda shape: str(shape["name"]),
)
def test_a_longer_job_is_the_same_up_to_where_the_shorter_one_was(shape: dict[str, Any]) -> None:
    shorter, longer = _build(shape=shape, max_duration="8ep"), _build(shape=shape, max_duration="20ep")
    for position in (0, 1, 29_999, 30_001, 80_000):
        assert shorter.digest(position) == longer.digest(position)


def test_of_a_table_only_what_was_reached_counts() -> None:
    def build(epochs: int) -> Schedule:
        spec = from_function(
            lambda epoch: 1 / (1 + epoch), per="epoch", max_duration=f"{epochs}ep", global_batch_size=64
        )
        return spec.build(ScheduleContext(num_samples=10_000, micro_batch_size=16, learning_rate=0.1, momentum=0.9))

    assert build(8).digest(80_000) == build(12).digest(80_000)
    assert build(8).digest(50_001) != build(8).digest(50_000)


def test_whatever_alters_the_past_alters_the_digest() -> None:
    base = _build(shape="cosine")
    assert base.digest(50_000) != _build(shape="cosine", max_duration="11ep").digest(50_000)
    assert base.digest(50_000) != _build(shape="cosine", global_batch_size=128).digest(50_000)
    late, later = (
        _build(shape={"name": "multi-step", "milestones": ["2ep", at], "gamma": 0.2}) for at in ("6ep", "7ep")
    )
    assert late.digest(60_000) == later.digest(60_000)
    assert late.digest(60_001) != later.digest(60_001)
