"""The sums of a worker that is alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.branching import Branching, inputs
from torch import Tensor, nn

from elastic_batch.errors import MisusedTrainer
from elastic_batch.gradients import GradientSums


def test_a_worker_alone_keeps_the_tensors_that_backward_hands_over() -> None:
    model = Branching()
    sums = GradientSums(model.parameters()).begin(alone=True)
    handed: list[int] = []
    weight = model.get_parameter("layers.2.weight")
    weight.register_hook(lambda gradient: handed.append(gradient.data_ptr()))
    with sums.accepting():
        model(inputs(0), 2).backward()
    assert weight.grad is not None
    assert handed == [weight.grad.data_ptr()]


def test_gradients_that_share_memory_are_told_apart() -> None:
    one, other = (nn.Parameter(torch.ones(2, 3, dtype=torch.float64)) for _ in range(2))
    sums = GradientSums([one, other]).begin(alone=True)
    for _ in range(2):
        with sums.accepting():
            # Adding hands one gradient to both, and each view makes an alias of it.
            (one.view(-1) + other.view(-1)).square().sum().backward()
    sums.finish(0.5, sums.seen)
    for parameter in (one, other):
        assert parameter.grad is not None
        assert parameter.grad.unique().tolist() == [4]


def _backward(model: Branching) -> None:
    model(inputs(0), 0).backward()


def _clip(model: Branching) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def _replace(model: Branching) -> None:
    for parameter in model.parameters():
        parameter.grad = None if parameter.grad is None else parameter.grad.clone()


@pytest.mark.parametrize("change", [_backward, _clip, _replace, nn.Module.zero_grad])
def test_gradients_that_others_changed_between_two_passes_are_refused(change: Callable[[Branching], object]) -> None:
    model = Branching()
    gradients = GradientSums(model.parameters())
    sums = gradients.begin(alone=True)
    with sums.accepting():
        model(inputs(0), 0, 1).backward()
    change(model)
    with pytest.raises(MisusedTrainer, match="grad was changed during an update"):
        sums.check()
    with pytest.raises(MisusedTrainer, match="grad was changed during an update"), sums.accepting():
        pass
    gradients.begin(alone=True).check()


def test_a_direct_backward_before_the_first_pass_is_refused() -> None:
    model = Branching()
    sums = GradientSums(model.parameters()).begin(alone=True)
    model(inputs(0), 0).backward()
    with pytest.raises(MisusedTrainer, match=r"not loss.backward\(\)"), sums.accepting():
        pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reached", [False, True])
def test_a_gradient_that_others_gave_a_parameter_which_no_pass_had_reached_is_refused(
    reached: bool, dtype: torch.dtype
) -> None:
    model = Branching().to(dtype)
    sums = GradientSums(model.parameters()).begin(alone=True)
    with sums.accepting():
        model(inputs(0).to(dtype), 0).backward()
    late = model.get_parameter("layers.2.weight")
    late.grad = torch.ones_like(late)
    with pytest.raises(MisusedTrainer, match="grad was changed during an update"), sums.accepting():
        model(inputs(1).to(dtype), 2 if reached else 0).backward()


def test_parameters_may_be_reached_by_later_passes_only() -> None:
    model = Branching()
    sums = GradientSums(model.parameters()).begin(alone=True)
    for seed, used in enumerate(((0,), (1, 2), (0, 2))):
        with sums.accepting():
            model(inputs(seed), *used).backward()
        sums.check()
    sums.finish(1.0, sums.seen)
    found = [parameter.grad for parameter in model.parameters()]
    losses = [model(inputs(seed), *used) for seed, used in enumerate(((0,), (1, 2), (0, 2)))]
    for one, other in zip(found, torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters())), strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


def test_users_hooks_may_change_gradients_during_the_backward() -> None:
    def add_one(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.add_(1)

    model = Branching()
    weight = model.get_parameter("layers.0.weight")
    [plain] = torch.autograd.grad(model(inputs(0), 0) + model(inputs(1), 0), [weight])
    weight.register_hook(lambda gradient: 2 * gradient)
    weight.register_post_accumulate_grad_hook(add_one)
    sums = GradientSums(model.parameters()).begin(alone=True)
    for seed in range(2):
        with sums.accepting():
            model(inputs(seed), 0).backward()
    sums.check()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 2 * plain + 2, rtol=1e-13, atol=0)


def test_no_hook_stays_on_the_parameters_of_a_worker_that_is_alone_again() -> None:
    model = Branching()
    gradients = GradientSums(model.parameters())
    for alone, num_hooks in ((True, 0), (False, 1), (True, 0), (False, 1)):
        gradients.begin(alone=alone)
        for parameter in model.parameters():
            assert len(parameter._post_accumulate_grad_hooks or ()) == num_hooks
    gradients.close()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_direct_backward_of_narrow_parameters_is_refused() -> None:
    model = Branching().to(torch.bfloat16)
    GradientSums(model.parameters()).begin(alone=True)
    with pytest.raises(MisusedTrainer, match=r"not loss.backward\(\)"):
        model(inputs(0).to(torch.bfloat16), 0).backward()


def test_narrow_gradients_do_not_all_live_until_the_end_of_a_backward() -> None:
    model = Branching().to(torch.bfloat16)
    sums = GradientSums(model.parameters()).begin(alone=True)
    last_layer = model.get_parameter("layers.2.weight")
    left: list[Tensor | None] = []
    model.get_parameter("layers.0.weight").register_hook(lambda gradient: left.append(last_layer.grad))
    with sums.accepting():
        model(inputs(0).to(torch.bfloat16), 0, 1, 2).backward()
    assert left == [None]
    assert all(sums.seen)


def test_norms_make_up_the_whole_gradient_s_whatever_the_shapes() -> None:
    shapes = [(3,), (2, 3), (), (5,), (4, 1, 2), (0,), (2**14 + 1,)]
    parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    parameters.append(nn.Parameter(torch.randn(7)))
    sums = GradientSums(parameters).begin(alone=True)
    with sums.accepting():
        torch.stack([(parameter.double() ** 3).sum() for parameter in parameters]).sum().backward()
    whole = torch.cat([3 * parameter.detach().double().flatten() ** 2 for parameter in parameters])
    found = math.hypot(*(float(norm) for norm in sums.norms()))
    assert found == pytest.approx(float(whole.norm()), rel=1e-6)


def test_a_gradient_that_was_replaced_when_all_had_theirs_is_noticed_in_the_end() -> None:
    model = Branching()
    sums = GradientSums(model.parameters()).begin(alone=True)
    for seed in range(2):
        with sums.accepting():
            model(inputs(seed), 0, 1, 2).backward()
        if seed == 0:
            sums.check()
            model.zero_grad()
    with pytest.raises(MisusedTrainer, match=r"remove model.zero_grad\(\)"):
        sums.check()
