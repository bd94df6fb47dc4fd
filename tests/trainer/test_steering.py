"""The steered optimizer: exact learning rates, velocity correction, and no other driver."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from elastic_batch.errors import InvalidSetting, MisusedTrainer
from elastic_batch.schedule import PhaseValues
from elastic_batch.trainer.steering import SteeredOptimizer


def _values(learning_rate: float, momentum: float = 0.9) -> PhaseValues:
    return PhaseValues(phase=0, global_batch_size=8, learning_rate=learning_rate, momentum=momentum, until=100)


def _parameter(value: float = 1.0) -> nn.Parameter:
    parameter = nn.Parameter(torch.tensor([value], dtype=torch.float64))
    parameter.grad = torch.tensor([1.0], dtype=torch.float64)
    return parameter


def test_groups_keep_the_ratio_of_their_learning_rates() -> None:
    slow, fast = _parameter(), _parameter()
    optimizer = torch.optim.SGD([{"params": [slow], "lr": 0.1}, {"params": [fast], "lr": 0.3}], lr=1.0)
    SteeredOptimizer(optimizer).step(_values(0.02, 0.0))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.06], rel=1e-15)
    assert slow.item() == pytest.approx(0.98)
    assert fast.item() == pytest.approx(0.94)


def test_one_group_gets_the_scheduled_rate_to_the_bit() -> None:
    optimizer = torch.optim.SGD([_parameter()], lr=0.7)
    SteeredOptimizer(optimizer).step(_values(0.1 / 3, 0.0))
    assert optimizer.param_groups[0]["lr"] == 0.1 / 3


def test_a_change_of_momentum_keeps_the_averaged_gradient() -> None:
    parameter = _parameter()
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    steered = SteeredOptimizer(optimizer)
    steered.require_momenta([0.9, 0.98])
    for _ in range(200):
        steered.step(_values(0.1, 0.9))
    velocity = float(optimizer.state[parameter]["momentum_buffer"])
    assert velocity == pytest.approx(10.0, rel=1e-6)
    parameter.grad = torch.zeros(1, dtype=torch.float64)
    steered.step(_values(0.1, 0.98))
    # (1 - m) v is kept: 0.1 * 10 = 0.02 * 50; one step without a gradient then multiplies by m.
    assert float(optimizer.state[parameter]["momentum_buffer"]) == pytest.approx(0.98 * velocity * 5)


def test_without_correction_the_velocity_drifts() -> None:
    parameter = _parameter()
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    steered = SteeredOptimizer(optimizer, momentum_correction=False)
    steered.require_momenta([0.9, 0.5])
    steered.step(_values(0.1, 0.9))
    parameter.grad = torch.zeros(1, dtype=torch.float64)
    steered.step(_values(0.1, 0.5))
    assert float(optimizer.state[parameter]["momentum_buffer"]) == pytest.approx(0.5)


def test_a_momentum_that_the_schedule_does_not_change_is_left_alone() -> None:
    adaptive = torch.optim.RMSprop([_parameter()], lr=0.1, momentum=0.9)
    steered = SteeredOptimizer(adaptive, is_adaptive=True)
    steered.require_momenta([0.0])
    steered.step(_values(0.1, 0.0))
    assert adaptive.param_groups[0]["momentum"] == 0.9

    groups = [{"params": [_parameter()], "momentum": momentum} for momentum in (0.9, 0.5)]
    plain = torch.optim.SGD(groups, lr=0.1)
    steered = SteeredOptimizer(plain)
    steered.require_momenta([0.9])
    steered.step(_values(0.1, 0.9))
    assert [group["momentum"] for group in plain.param_groups] == [0.9, 0.5]


def test_groups_of_different_momenta_cannot_follow_a_schedule_that_changes_it() -> None:
    groups = [{"params": [_parameter()], "momentum": momentum} for momentum in (0.9, 0.5)]
    steered = SteeredOptimizer(torch.optim.SGD(groups, lr=0.1))
    with pytest.raises(InvalidSetting, match=r"momentum 0.98.*groups have 0.5, 0.9. Give all groups the same"):
        steered.require_momenta([0.9, 0.98])


def test_the_momentum_is_right_in_whichever_phase_a_run_is_resumed() -> None:
    before = torch.optim.SGD([_parameter()], lr=0.1, momentum=0.9)
    steered = SteeredOptimizer(before)
    steered.require_momenta([0.9, 0.98, 0.9])
    steered.step(_values(0.1, 0.9))
    steered.step(_values(0.1, 0.98))
    for momentum in (0.98, 0.9):
        parameter = _parameter()
        after = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        resumed = SteeredOptimizer(after)
        resumed.require_momenta([0.9, 0.98, 0.9])
        resumed.load_state_dict(steered.state_dict())
        velocity = float(after.state[parameter]["momentum_buffer"])
        resumed.step(_values(0.1, momentum))
        assert after.param_groups[0]["momentum"] == momentum
        kept = velocity * (1 - 0.98) / (1 - momentum)
        assert float(after.state[parameter]["momentum_buffer"]) == pytest.approx(momentum * kept + 1.0)


def test_a_momentum_that_is_raised_from_the_start_is_set() -> None:
    optimizer = torch.optim.SGD([_parameter()], lr=0.1, momentum=0.9)
    steered = SteeredOptimizer(optimizer)
    steered.require_momenta([0.98])
    steered.step(_values(0.1, 0.98))
    assert optimizer.param_groups[0]["momentum"] == 0.98


def test_tensor_learning_rates_are_set_in_place() -> None:
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD([_parameter()], lr=rate, foreach=True)
    steered = SteeredOptimizer(optimizer)
    steered.step(_values(0.25, 0.0))
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.25
    steered.check()


def test_adam_has_no_momentum_and_keeps_its_betas() -> None:
    optimizer = torch.optim.Adam([_parameter()], lr=0.1)
    steered = SteeredOptimizer(optimizer)
    steered.step(_values(0.05, 0.0))
    assert steered.momentum == 0.0
    assert steered.is_adaptive
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_scheduler_beside_the_trainer_is_noticed() -> None:
    optimizer = torch.optim.SGD([_parameter()], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    steered = SteeredOptimizer(optimizer)
    steered.step(_values(0.1, 0.0))
    steered.check()
    scheduler.step()
    with pytest.raises(MisusedTrainer, match=r"remove scheduler.step\(\)"):
        steered.check()


def test_a_direct_step_is_refused_until_the_optimizer_is_let_go() -> None:
    optimizer = torch.optim.SGD([_parameter()], lr=0.1)
    steered = SteeredOptimizer(optimizer)
    with pytest.raises(MisusedTrainer, match=r"call update.step\(\)"):
        optimizer.step()
    steered.close()
    optimizer.step()


def test_a_guard_that_nobody_closed_gives_way_to_the_next() -> None:
    optimizer = torch.optim.SGD([_parameter()], lr=0.1)
    left_over = SteeredOptimizer(optimizer)
    steered = SteeredOptimizer(optimizer)
    steered.check()
    steered.step(_values(0.1, 0.0))
    with pytest.raises(MisusedTrainer, match="another trainer was made with it since"):
        left_over.check()
    left_over.close()
    for refused in (optimizer.step, optimizer.zero_grad):
        with pytest.raises(MisusedTrainer, match="was called"):
            refused()
    steered.close()
    optimizer.zero_grad()
    optimizer.step()


class _StepsWithClosure(torch.optim.Optimizer):
    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        return closure()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [torch.optim.SGD([_parameter()], lr=0.1)] * 2, "must be one optimizer"),
        (lambda: torch.optim.LBFGS([_parameter()]), "without a closure"),
        (lambda: _StepsWithClosure([_parameter()], {}), "without a closure"),
        (lambda: torch.optim.SparseAdam([_parameter()]), "must take dense gradients"),
        (lambda: torch.optim.SGD([_parameter()], lr=0.1, momentum=0.9, dampening=0.1), "dampening = 0.1: must be 0"),
        (lambda: torch.optim.SGD([nn.Parameter(torch.ones(1, dtype=torch.complex64))]), "must train real numbers"),
        (lambda: "sgd", "must be a torch.optim.Optimizer"),
    ],
)
def test_unsuitable_optimizers_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(InvalidSetting, match=message):
        SteeredOptimizer(make())


def test_every_trained_parameter_is_listed_once() -> None:
    shared, frozen = _parameter(), nn.Parameter(torch.zeros(1), requires_grad=False)
    optimizer = torch.optim.SGD([{"params": [shared, frozen]}], lr=0.1)
    assert SteeredOptimizer(optimizer).parameters == [shared]


def test_a_parameter_may_thaw_only_if_it_was_trained_at_the_start() -> None:
    trained, untrained = _parameter(), nn.Parameter(torch.zeros(1), requires_grad=False)
    steered = SteeredOptimizer(torch.optim.SGD([trained, untrained], lr=0.1))
    trained.requires_grad_(False)
    steered.check()
    trained.requires_grad_(True)
    steered.check()
    assert steered.parameters == [trained]
    untrained.requires_grad_(True)
    with pytest.raises(MisusedTrainer, match="freeze those that are to wait afterwards"):
        steered.check()


def test_parameter_groups_that_come_later_are_refused() -> None:
    optimizer = torch.optim.SGD([_parameter()], lr=0.1)
    steered = SteeredOptimizer(optimizer)
    optimizer.add_param_group({"params": [_parameter()]})
    with pytest.raises(MisusedTrainer, match="has 2 parameter groups, and had 1"):
        steered.check()


def test_what_the_noise_scale_needs_to_know_of_an_optimizer_may_be_said() -> None:
    adam, rms = torch.optim.Adam([_parameter()]), torch.optim.RMSprop([_parameter()], lr=0.1)
    assert SteeredOptimizer(adam).is_adaptive
    assert not SteeredOptimizer(rms).is_adaptive
    told = SteeredOptimizer(torch.optim.RMSprop([_parameter()]), is_adaptive=True, momentum=0.0)
    assert told.is_adaptive
    assert SteeredOptimizer(torch.optim.Adam([_parameter()]), momentum=0.9).momentum == 0.9


def test_a_schedule_that_changes_a_momentum_needs_an_optimizer_with_one() -> None:
    steered = SteeredOptimizer(torch.optim.Adam([_parameter()]), momentum=0.9, is_adaptive=False)
    steered.require_momenta([0.9])
    with pytest.raises(InvalidSetting, match=r"momentum 0.98.*Adam has no momentum to be set"):
        steered.require_momenta([0.9, 0.98])
    SteeredOptimizer(torch.optim.SGD([_parameter()], lr=0.1)).require_momenta([0.9, 0.98])
