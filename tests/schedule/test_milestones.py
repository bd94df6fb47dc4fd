"""decay-lr, grow-batch and hybrid: the paper's schedules, their counts of updates, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule import MilestoneSchedule, Schedule, ScheduleContext, plan, walk

CIFAR: dict[str, Any] = {"num_samples": 50_000, "micro_batch_size": 128, "learning_rate": 0.1, "momentum": 0.9}
CIFAR_JOB: dict[str, Any] = {
    "strategy": "grow-batch",
    "global_batch_size": 128,
    "max_duration": "200ep",
    "milestones": ("60ep", "120ep", "160ep"),
    "factor": 5,
    "max_global_batch_size": 5120,
}
IMAGENET: dict[str, Any] = {"num_samples": 1_281_167, "micro_batch_size": 64, "learning_rate": 3.0, "momentum": 0.9}
IMAGENET_JOB: dict[str, Any] = {
    "strategy": "grow-batch",
    "global_batch_size": 8192,
    "max_duration": "90ep",
    "milestones": ("30ep", "60ep", "80ep"),
    "factor": 10,
    "max_global_batch_size": 65_536,
}


def _cifar(context: dict[str, Any] | None = None, **fields: Any) -> Schedule:
    return MilestoneSchedule(**{**CIFAR_JOB, **fields}).build(ScheduleContext(**{**CIFAR, **(context or {})}))


def _imagenet(**fields: Any) -> Schedule:
    return MilestoneSchedule(**{**IMAGENET_JOB, **fields}).build(ScheduleContext(**IMAGENET))


def _phases(schedule: Schedule) -> list[tuple[int, float]]:
    return [(row.global_batch_size, row.learning_rate) for row in plan(schedule).rows]


@pytest.mark.parametrize(
    ("fields", "phases"),
    [
        ({"strategy": "decay-lr"}, [(128, 0.1), (128, 0.02), (128, 0.004), (128, 0.0008)]),
        ({"strategy": "hybrid"}, [(128, 0.1), (640, 0.1), (640, 0.02), (640, 0.004)]),
        ({}, [(128, 0.1), (640, 0.1), (3200, 0.1), (5120, 0.032)]),
        ({"max_global_batch_size": 16_000}, [(128, 0.1), (640, 0.1), (3200, 0.1), (16_000, 0.1)]),
        ({"raised": {"learning_rate": 0.5}}, [(640, 0.5), (3200, 0.5), (5120, 0.16), (5120, 0.032)]),
        (
            {"raised": {"learning_rate": 0.5, "momentum": 0.98}},
            [(3200, 0.5), (5120, 0.16), (5120, 0.032), (5120, 0.0064)],
        ),
    ],
)
def test_the_phases_on_cifar10_are_the_papers(fields: dict[str, Any], phases: list[tuple[int, float]]) -> None:
    assert _phases(_cifar(**fields)) == phases


@pytest.mark.parametrize(
    ("fields", "updates"),
    [
        ({"strategy": "decay-lr"}, 78_125),
        ({"strategy": "hybrid"}, 34_375),
        ({"max_global_batch_size": 16_000}, 28_875),
        ({}, 29_141),
        ({"raised": {"learning_rate": 0.5}}, 6_406),
        ({"raised": {"learning_rate": 0.5, "momentum": 0.98}}, 2_305),
    ],
)
def test_the_updates_on_cifar10_are_the_papers(fields: dict[str, Any], updates: int) -> None:
    assert abs(plan(_cifar(**fields)).updates - updates) <= 2


@pytest.mark.parametrize(
    ("fields", "updates"),
    [
        ({"strategy": "decay-lr"}, 14_075),
        ({"max_global_batch_size": 81_920}, 5_630),
        ({}, 5_865),
        ({"raised": {"momentum": 0.95}}, 3_519),
        ({"raised": {"momentum": 0.975}}, 2_346),
    ],
)
def test_the_updates_on_imagenet_are_the_papers(fields: dict[str, Any], updates: int) -> None:
    assert abs(plan(_imagenet(**fields)).updates - updates) <= 2


def test_a_raised_start_may_be_written_as_initial_values_instead() -> None:
    explicit = _cifar({"learning_rate": 0.5, "momentum": 0.98}, global_batch_size=3200)
    raised = _cifar(raised={"learning_rate": 0.5, "momentum": 0.98})
    assert _phases(explicit) == _phases(raised)
    assert raised.at(0).momentum == 0.98
    assert raised.base_learning_rate == 0.1, "parameter groups keep their ratio to the optimizer's own"


@pytest.mark.parametrize("form", ["linear", "exact"])
@pytest.mark.parametrize("strategy", ["decay-lr", "grow-batch", "hybrid"])
def test_every_strategy_anneals_the_same_noise_scale(strategy: str, form: str) -> None:
    reference = _cifar(strategy="decay-lr", noise_form=form)
    schedule = _cifar(strategy=strategy, noise_form=form, max_global_batch_size=4999)
    for run in walk(schedule):
        wanted = reference.noise_scale(reference.at(run.position))
        assert schedule.noise_scale(run.values) == pytest.approx(wanted, rel=1e-12)
        assert run.values.learning_rate <= 0.1


def test_the_batch_that_is_wanted_is_rounded_down_to_the_grid_and_the_rest_divides_the_rate() -> None:
    schedule = _cifar(milestones=("60ep",), factor=2.7)
    assert _phases(schedule) == [(128, 0.1), (256, pytest.approx(0.1 * 2 / 2.7))]


def test_the_default_cap_is_a_tenth_of_the_data_on_the_grid() -> None:
    assert _cifar(max_global_batch_size=None).max_global_batch_size == 4992
    digits = {"num_samples": 1437, "micro_batch_size": 32}
    assert _cifar(digits, global_batch_size=32, max_global_batch_size=None).max_global_batch_size == 128
    assert _cifar(digits, global_batch_size=32, max_global_batch_size=143).max_global_batch_size == 128


def test_the_baseline_needs_no_cap() -> None:
    uncapped: dict[str, Any] = {"strategy": "decay-lr", "max_global_batch_size": None}
    assert _cifar(**uncapped, global_batch_size=12_800).max_global_batch_size == 12_800
    assert _cifar(**uncapped, raised={"learning_rate": 10}).global_batch_size == 12_800


def test_each_milestone_may_have_its_own_factor() -> None:
    assert [batch for batch, _ in _phases(_cifar(factor=(2, 5, 3)))] == [128, 256, 1280, 3840]


def test_hybrid_grows_as_often_as_asked() -> None:
    assert _phases(_cifar(strategy="hybrid", num_growths=2)) == [(128, 0.1), (640, 0.1), (3200, 0.1), (3200, 0.02)]


def test_a_warm_up_is_a_phase_of_its_own_before_the_first_milestone() -> None:
    schedule = _cifar(warmup={"duration": "5ep", "start_factor": 0.2})
    assert schedule.at(0).learning_rate == pytest.approx(0.02)
    assert schedule.at(125_000).learning_rate == pytest.approx(0.06)
    assert schedule.at(125_000).until == 125_001
    assert [row.phase for row in plan(schedule).rows] == [0, 1, 2, 3, 4]
    assert _phases(schedule)[1:] == _phases(_cifar())


def test_adam_is_computed_with_a_momentum_of_zero() -> None:
    schedule = _cifar({"adaptive_optimizer": True})
    assert schedule.at(0).momentum == 0.0
    assert _phases(schedule) == _phases(_cifar())


def test_the_square_root_rule_divides_the_rate_by_the_root_of_what_the_batch_grows_by() -> None:
    schedule = _cifar({"adaptive_optimizer": True}, rule="sqrt", factor=4, max_global_batch_size=6000)
    half = pytest.approx(0.05)
    assert _phases(schedule)[:3] == [(128, 0.1), (512, half), (2048, pytest.approx(0.025))]
    # At the cap, of the last factor of 4 the batch takes 5888 / 2048; lr ~ sqrt(B) / 64 of the start.
    batch, learning_rate = _phases(schedule)[3]
    assert batch == 5888
    assert learning_rate == pytest.approx(0.1 / 64 * (5888 / 128) ** 0.5)


def test_the_rule_is_told_in_words() -> None:
    assert _cifar().rule == "grow-batch, factor 5, linear noise scale, cap 5120"
    assert _cifar(strategy="decay-lr").rule == "decay-lr, factor 5, linear noise scale"
    assert "at 1 of 3 milestones" in _cifar(strategy="hybrid", factor=(5, 2, 2)).rule


def test_milestones_may_be_parts_of_the_whole() -> None:
    assert _phases(_cifar(milestones=("0.3dur", "0.6dur", "0.8dur"))) == _phases(_cifar())


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        (
            {"global_batch_size": 100},
            "schedule.global_batch_size",
            "multiple of micro_batch_size = 128.*nearest are 128",
        ),
        ({"global_batch_size": 300}, "schedule.global_batch_size", "nearest are 256 and 384"),
        (
            {"global_batch_size": 51_200, "max_global_batch_size": None},
            "schedule.global_batch_size",
            "below the training",
        ),
        ({"max_global_batch_size": 64}, "schedule.max_global_batch_size", "not be below the first batch"),
        ({"max_global_batch_size": 50_000}, "schedule.max_global_batch_size", "below the training set's 50000"),
        (
            {"global_batch_size": 6400, "max_global_batch_size": None},
            "schedule.max_global_batch_size",
            "= 5000: must not be below the first batch, 6400. Null means a tenth",
        ),
        ({"milestones": ("60ep", "50ep"), "factor": 5}, r"schedule.milestones\[1\]", "must be later than.*60ep"),
        ({"milestones": ("60ep", "60ep"), "factor": 5}, r"schedule.milestones\[1\]", "must be later than.*60ep"),
        ({"milestones": ("60ep", "200ep")}, r"schedule.milestones\[1\]", r"past the end.*200ep.*'0.5dur'"),
        ({"milestones": ("0ep",)}, r"schedule.milestones\[0\]", "must be above 0"),
        ({"warmup": "60ep"}, r"schedule.milestones\[0\]", "later than.*warm-up must end before"),
        ({"warmup": "200ep"}, "schedule.warmup", "must be shorter than the job"),
        ({"max_duration": "0ep"}, "schedule.max_duration", "must be above 0"),
        ({"max_duration": "1e30ep"}, "schedule.max_duration", r"must be at most 2\*\*62 samples"),
        ({"max_duration": "1dur"}, "schedule.max_duration", "part of itself"),
        ({"strategy": "hybrid", "num_growths": 4}, "schedule.num_growths", "number of milestones, 3"),
        ({"rule": "sqrt"}, "schedule.rule", "must be linear, because SGD.*sqrt is for Adam"),
        ({"raised": {"learning_rate": 0.05}}, "schedule.raised", "must raise lr"),
        ({"raised": {"learning_rate": 10}}, "schedule.max_global_batch_size", "below the first batch, 12800.*raised"),
        ({"raised": {"learning_rate": 100}}, "schedule.raised", "below the training set's 50000 samples. Raise less"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_fields_name_and_a_remedy(
    fields: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(InvalidSetting, match=f"^{field} .*{words}"):
        _cifar(**fields)


def test_adam_has_no_momentum_to_raise() -> None:
    with pytest.raises(InvalidSetting, match=r"raised.momentum = 0.98: only SGD"):
        _cifar({"adaptive_optimizer": True}, raised={"momentum": 0.98})


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"factor": 1}, "factor", "must be above 1"),
        ({"factor": 0.2}, "factor", "5 for a learning rate that would be multiplied by 0.2"),
        ({"factor": (5, 5)}, "factor", "one for each of the 3 milestones"),
        ({"factor": (5, 5, float("inf"))}, "factor", "must be above 1"),
        ({"factor": 1, "milestones": ()}, "factor", "must be above 1"),
        ({"raised": {}}, "learning_rate", "raised needs"),
        ({"rule": "sqrt", "noise_form": "exact"}, "noise_form", "sqrt rule"),
        ({"rule": "sqrt", "raised": {"learning_rate": 1}}, "raised", "only the linear rule"),
        ({"rule": "squareroot"}, "rule", "Did you mean 'sqrt'"),
        ({"strategy": "grow-bath"}, "strategy", "Did you mean 'grow-batch'"),
        ({"noise_form": "exakt"}, "noise_form", "Did you mean 'exact'"),
        ({"max_duration": "200"}, "max_duration", "number with a unit"),
        ({"num_growths": 0}, "num_growths", "greater than 0"),
    ],
)
def test_a_wrong_field_is_refused_before_anything_is_built(fields: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidSetting, match=words) as caught:
        MilestoneSchedule.of(**{**CIFAR_JOB, **fields})
    assert caught.value.field == field
