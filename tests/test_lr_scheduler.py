"""torch's schedulers, converted: the same noise scale, nothing of the user's touched, mistakes named."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from elastic_batch.errors import InvalidSetting, UnknownName
from elastic_batch.lr_scheduler import from_lr_scheduler
from elastic_batch.schedule import Schedule, ScheduleContext, plan, walk

torch.set_num_threads(1)

N, B0, EPOCHS = 1200, 40, 30
STEPS = {"epoch": EPOCHS, "update": EPOCHS * N // B0}
JOB: dict[str, Any] = {"max_duration": f"{EPOCHS}ep", "global_batch_size": B0}
Make = Callable[[Optimizer, int], LRScheduler]


def _sgd(*rates: float, **options: Any) -> SGD:
    groups = [{"params": [Parameter(torch.zeros(3))], "lr": rate} for rate in rates or (0.1,)]
    return SGD(groups, **{"momentum": 0.9, **options})


def _context(optimizer: Optimizer, **fields: Any) -> ScheduleContext:
    group = optimizer.param_groups[0]
    rate = float(group.get("initial_lr", group["lr"]))
    values = {"num_samples": N, "micro_batch_size": 10, "learning_rate": rate, "momentum": group.get("momentum", 0.0)}
    return ScheduleContext(**{**values, **fields})


def _warm_cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=steps // 6)
    return SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, steps - steps // 6)], [steps // 6])


def _chained(optimizer: Optimizer, steps: int) -> Any:
    return ChainedScheduler([ConstantLR(optimizer, 0.2, steps // 5), ExponentialLR(optimizer, 0.1 ** (1 / steps))])


MAKERS: dict[str, Make] = {
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
    "cosine to a minimum": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps, eta_min=0.01),
    "multi-step": lambda optimizer, steps: MultiStepLR(optimizer, [steps // 3, steps // 2], 0.2),
    "step": lambda optimizer, steps: StepLR(optimizer, steps // 4, 0.3),
    "exponential": lambda optimizer, steps: ExponentialLR(optimizer, 0.01 ** (1 / steps)),
    "polynomial": lambda optimizer, steps: PolynomialLR(optimizer, steps, 2.0),
    "lambda with a warm-up from 0": lambda optimizer, steps: LambdaLR(
        optimizer, lambda step: min(step / (steps // 10), 0.99**step)
    ),
    "multiplicative": lambda optimizer, steps: MultiplicativeLR(optimizer, lambda step: 0.995),
    "linear warm-up, then cosine": _warm_cosine,
    "warm restarts": lambda optimizer, steps: CosineAnnealingWarmRestarts(optimizer, steps // 5),
    "chained": _chained,
    "one cycle": lambda optimizer, steps: OneCycleLR(optimizer, 0.1, total_steps=steps, cycle_momentum=False),
    "cyclic": lambda optimizer, steps: CyclicLR(optimizer, 0.01, 0.1, steps // 8, cycle_momentum=False),
}


def _rates(make: Make, steps: int) -> list[float]:
    """Learning rates as a training script would meet them."""
    optimizer = _sgd()
    scheduler = make(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def _build(make: Make, per: Any, **fields: Any) -> Schedule:
    optimizer = _sgd()
    spec = from_lr_scheduler(make(optimizer, STEPS[per]), per=per, **JOB, **fields)
    return spec.build(_context(optimizer))


@pytest.mark.parametrize("growth_only", [False, True])
@pytest.mark.parametrize("per", ["epoch", "update"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_noise_scale_is_the_schedulers_at_the_original_batch(name: str, per: Any, growth_only: bool) -> None:
    rates = _rates(MAKERS[name], STEPS[per])
    schedule = _build(MAKERS[name], per, growth_only=growth_only)
    period = N if per == "epoch" else B0
    last = B0
    for run in walk(schedule):
        original = rates[run.position // period]
        wanted = original / (1 - 0.9) * N / B0
        assert math.isclose(schedule.noise_scale(run.values), wanted, rel_tol=1e-11)
        assert run.values.learning_rate <= max(rates)
        assert not growth_only or run.values.global_batch_size >= last
        last = run.values.global_batch_size


@pytest.mark.parametrize("name", MAKERS)
def test_the_exact_noise_scale_is_kept_too(name: str) -> None:
    rates = _rates(MAKERS[name], EPOCHS)
    schedule = _build(MAKERS[name], "epoch", noise_form="exact")
    for run in walk(schedule):
        wanted = rates[run.position // N] / (1 - 0.9) * (N / B0 - 1)
        assert math.isclose(schedule.noise_scale(run.values), wanted, rel_tol=1e-11)


def test_a_multi_step_scheduler_becomes_four_phases() -> None:
    optimizer = _sgd()
    scheduler = MultiStepLR(optimizer, [60, 120, 160], 0.2)
    spec = from_lr_scheduler(
        scheduler, per="epoch", max_duration="200ep", global_batch_size=128, max_global_batch_size=5120
    )
    schedule = spec.build(_context(optimizer, num_samples=50_000, micro_batch_size=128))
    planned = plan(schedule)
    assert [row.global_batch_size for row in planned.rows] == [128, 640, 3200, 5120]
    assert [row.learning_rate for row in planned.rows] == pytest.approx([0.1, 0.1, 0.1, 0.032])
    assert abs(planned.updates - 29_141) <= 2
    assert schedule.rule == "convert MultiStepLR per epoch, linear noise scale, cap 5120"


@pytest.mark.parametrize("name", MAKERS)
def test_neither_scheduler_nor_optimizer_nor_parameters_are_touched(name: str) -> None:
    optimizer = _sgd()
    scheduler = MAKERS[name](optimizer, EPOCHS)
    before = copy.deepcopy((optimizer.state_dict(), _without_functions(scheduler.state_dict())))
    spec = from_lr_scheduler(scheduler, per="epoch", **JOB)
    schedule = spec.build(_context(optimizer))
    assert (optimizer.state_dict(), _without_functions(scheduler.state_dict())) == before
    optimizer.step()
    scheduler.step()
    assert spec.build(_context(optimizer)) == schedule, "the scheduler was copied when it was given"


def _without_functions(state: dict[str, Any]) -> str:
    return repr({key: value for key, value in state.items() if not callable(value) and "_fn" not in key})


def test_the_schedule_can_be_pickled_although_the_scheduler_holds_a_lambda() -> None:
    schedule = _build(MAKERS["lambda with a warm-up from 0"], "update")
    copied = pickle.loads(pickle.dumps(schedule))
    assert copied == schedule
    assert copied.at(9_876) == schedule.at(9_876)


def test_one_specification_serves_training_sets_of_any_size() -> None:
    optimizer = _sgd()
    spec = from_lr_scheduler(LambdaLR(optimizer, lambda step: 0.999**step), per="update", **JOB)
    for num_samples in (1000, 3000):
        schedule = spec.build(_context(optimizer, num_samples=num_samples))
        assert schedule.end == EPOCHS * num_samples
        rate = schedule.at(schedule.end - 10)
        drop = 0.999 ** ((schedule.end - 10) // B0)
        assert rate.learning_rate * B0 / rate.global_batch_size == pytest.approx(0.1 * drop)


def test_groups_with_a_common_factor_are_accepted() -> None:
    optimizer = _sgd(0.1, 0.01)
    schedule = from_lr_scheduler(CosineAnnealingLR(optimizer, EPOCHS), per="epoch", **JOB).build(_context(optimizer))
    assert schedule.at(0).learning_rate == 0.1


def test_groups_of_different_shapes_are_refused() -> None:
    optimizer = _sgd(0.1, 0.01)
    spec = from_lr_scheduler(CosineAnnealingLR(optimizer, EPOCHS, eta_min=0.001), per="epoch", **JOB)
    with pytest.raises(InvalidSetting, match=r"group 1 at .* where group 0 is at .*same shape.*eta_min"):
        spec.build(_context(optimizer))


def test_adam_takes_the_rule_by_name() -> None:
    optimizer = Adam([Parameter(torch.zeros(3))], lr=1e-3)
    scheduler = MultiStepLR(optimizer, [10], 0.25)
    spec = from_lr_scheduler(scheduler, per="epoch", rule="sqrt", max_global_batch_size=400, **JOB)
    values = spec.build(_context(optimizer, momentum=0.0, adaptive_optimizer=True)).at(15 * N)
    assert values.global_batch_size == 160
    assert values.learning_rate == pytest.approx(5e-4)
    assert values.momentum == 0.0


def test_a_learning_rate_may_be_a_tensor() -> None:
    optimizer = Adam([Parameter(torch.zeros(3))], lr=torch.tensor(0.5), capturable=True)
    schedule = from_lr_scheduler(ExponentialLR(optimizer, 0.5), per="epoch", **JOB).build(_context(optimizer))
    assert schedule.at(N).learning_rate == 0.5
    assert schedule.at(N).global_batch_size == 80
    assert float(optimizer.param_groups[0]["lr"]) == 0.5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda optimizer: ReduceLROnPlateau(optimizer),
            "must not depend on a metric.*milestones of grow-batch.*decisions of adaptive",
        ),
        (lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=30), "OneCycleLR'.*momentum.*cycle_momentum=False"),
        (lambda optimizer: CyclicLR(optimizer, 0.01, 0.1), "must not change the momentum.*strategy steps"),
        (
            lambda optimizer: ChainedScheduler([ConstantLR(optimizer), CyclicLR(optimizer, 0.01, 0.1)]),
            "CyclicLR'.*must not change the momentum",
        ),
        (lambda optimizer: "cosine", r"must be a torch.optim.lr_scheduler.*from_function"),
        (lambda optimizer: None, r"must be a torch.optim.lr_scheduler"),
    ],
)
def test_schedulers_that_cannot_be_converted_name_the_alternative(make: Callable[[Optimizer], Any], words: str) -> None:
    with pytest.raises(InvalidSetting, match=words):
        from_lr_scheduler(make(_sgd()), per="epoch", **JOB)


class _MomentumDriver(LRScheduler):
    """A user's scheduler that changes the momentum without saying so."""

    def get_lr(self) -> list[float | torch.Tensor]:
        for group in self.optimizer.param_groups:
            group["momentum"] = 0.9 - 0.01 * self.last_epoch
        return [group["lr"] for group in self.optimizer.param_groups]


def test_a_users_scheduler_that_changes_the_momentum_is_found_out() -> None:
    optimizer = _sgd()
    spec = from_lr_scheduler(_MomentumDriver(optimizer), per="epoch", **JOB)
    with pytest.raises(InvalidSetting, match="must not change the momentum"):
        spec.build(_context(optimizer))


def test_a_scheduler_that_was_stepped_is_refused() -> None:
    optimizer = _sgd()
    scheduler = StepLR(optimizer, 10)
    optimizer.step()
    scheduler.step()
    with pytest.raises(InvalidSetting, match=r"StepLR after 1 steps.*Make it anew"):
        from_lr_scheduler(scheduler, per="epoch", **JOB)


def test_a_scheduler_that_ends_before_the_job_is_refused() -> None:
    optimizer = _sgd()
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=EPOCHS, cycle_momentum=False)
    spec = from_lr_scheduler(scheduler, per="update", **JOB)
    with pytest.raises(InvalidSetting, match=r"must allow 900 steps, one per update.*per and max_duration"):
        spec.build(_context(optimizer))


class _Uncopyable(StepLR):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("holds a lock")


def test_a_scheduler_that_cannot_be_copied_is_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"cannot be copied \(holds a lock\).*from_function"):
        from_lr_scheduler(_Uncopyable(_sgd(), 10), per="epoch", **JOB)


def test_another_optimizer_than_the_schedulers_is_found_out() -> None:
    spec = from_lr_scheduler(StepLR(_sgd(0.1), 10), per="epoch", **JOB)
    with pytest.raises(InvalidSetting, match=r"learning_rate = 0.3: is not the learning rate of the scheduler's"):
        spec.build(_context(_sgd(0.3)))


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"per": "step"}, UnknownName, "must be one of epoch, update"),
        ({"rule": "squareroot"}, UnknownName, "Did you mean 'sqrt'"),
        ({"max_duration": "30"}, InvalidSetting, "max_duration = '30': must be a number with a unit"),
        ({"global_batch_size": 0}, InvalidSetting, "global_batch_size = 0"),
    ],
)
def test_a_wrong_argument_is_refused(fields: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {"per": "epoch", **JOB, **fields}
    with pytest.raises(error, match=words):
        from_lr_scheduler(StepLR(_sgd(), 10), **arguments)


@pytest.mark.parametrize("warm", [True, False])
def test_the_rates_before_the_peak_are_the_schedulers_own(warm: bool) -> None:
    make = MAKERS["linear warm-up, then cosine" if warm else "cosine"]
    rates, schedule = _rates(make, EPOCHS), _build(make, "epoch")
    for epoch in range(EPOCHS // 6 + 1 if warm else 1):
        values = schedule.at(epoch * N)
        assert (values.global_batch_size, values.learning_rate) == (B0, rates[epoch])
