"""Sums of gradients, alone and with others: exact, and errors for what would spoil them."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.branching import Branching, inputs
from torch import nn

from elastic_batch.engines import SoloEngine
from elastic_batch.errors import MisusedTrainer
from elastic_batch.gradients import GradientSums


@pytest.mark.parametrize("alone", [False, True])
def test_sums_over_passes_equal_plain_accumulation(alone: bool) -> None:
    model = Branching()
    gradients = GradientSums(model.parameters(), bucket_bytes=200)
    sums = gradients.begin(alone=alone)
    for seed in range(3):
        with sums.accepting():
            model(inputs(seed), 0, 1, 2).backward()
    sums.flush(SoloEngine())
    sums.wait()
    sums.finish(0.5, sums.seen)
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    gradients.close()
    torch.stack([model(inputs(seed), 0, 1, 2) for seed in range(3)]).sum().mul(0.5).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


def test_a_parameter_without_gradient_keeps_none() -> None:
    model = Branching()
    sums = GradientSums(model.parameters()).begin(alone=False)
    with sums.accepting():
        model(inputs(0), 1).backward()
    assert sums.seen == (False, False, True, True, False, False)
    sums.flush(SoloEngine())
    sums.wait()
    sums.finish(1.0, sums.seen)
    assert [parameter.grad is None for parameter in model.parameters()] == [True, True, False, False, True, True]


@pytest.mark.parametrize("alone", [False, True])
def test_half_precision_parameters_accumulate_in_float32(alone: bool) -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    sums = GradientSums([parameter]).begin(alone=alone)
    for value in (256.0, 1.0, 1.0):
        with sums.accepting():
            (parameter * torch.tensor([value], dtype=torch.bfloat16)).sum().backward()
    [norm] = sums.norms()
    # In bfloat16 itself 256 + 1 would stay 256.
    assert float(norm) == 258.0
    assert norm.dtype == torch.float32
    sums.finish(0.5, (True,))
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.bfloat16
    assert float(parameter.grad) == 129.0


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("alone_before", [False, True])
def test_beginning_again_forgets_everything(alone_before: bool, alone: bool) -> None:
    model = Branching()
    gradients = GradientSums(model.parameters())
    sums = gradients.begin(alone=alone_before)
    with sums.accepting():
        model(inputs(0), 0, 1, 2).backward()
    sums = gradients.begin(alone=alone)
    assert not any(sums.seen)
    assert all(float(norm) == 0 for norm in sums.norms())
    with sums.accepting():
        model(inputs(1), 0).backward()
    found = model.get_parameter("layers.0.weight").grad
    assert found is not None
    [expected] = torch.autograd.grad(model(inputs(1), 0), [model.get_parameter("layers.0.weight")])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_gradients_become_dense(dtype: torch.dtype, alone: bool) -> None:
    table = nn.Embedding(6, 2, sparse=True, dtype=dtype)
    sums = GradientSums(table.parameters()).begin(alone=alone)
    for rows in ([1, 2], [2, 5]):
        with sums.accepting():
            table(torch.tensor(rows)).sum().backward()
    sums.finish(0.5, sums.seen)
    assert table.weight.grad is not None
    assert table.weight.grad[:, 0].tolist() == [0, 0.5, 1, 0, 0, 0.5]


@pytest.mark.parametrize("alone", [False, True])
def test_gradients_that_were_replaced_are_refused(alone: bool) -> None:
    model = Branching()
    sums = GradientSums(model.parameters()).begin(alone=alone)
    with sums.accepting():
        model(inputs(0), 0).backward()
    model.zero_grad()
    with pytest.raises(MisusedTrainer, match=r"remove model.zero_grad\(\)"), sums.accepting():
        model(inputs(0), 0).backward()


@pytest.mark.parametrize("alone", [False, True])
def test_gradients_that_are_cleared_after_the_last_pass_are_noticed(alone: bool) -> None:
    model = Branching()
    sums = GradientSums(model.parameters()).begin(alone=alone)
    with sums.accepting():
        model(inputs(0), 0).backward()
    sums.check()
    model.zero_grad()
    with pytest.raises(MisusedTrainer, match=r"model.zero_grad\(\)"):
        sums.check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_parameter_may_be_frozen_for_a_while_whoever_comes_and_goes(dtype: torch.dtype) -> None:
    model = Branching().to(dtype)
    frozen = model.get_parameter("layers.0.weight")
    gradients = GradientSums(model.parameters())
    for alone, is_trained in itertools.product([True, False, True, False], [True, False, True]):
        frozen.requires_grad_(is_trained)
        sums = gradients.begin(alone=alone)
        assert frozen.requires_grad == is_trained
        with sums.accepting():
            model(inputs(0).to(dtype), 0).backward()
        sums.check()
        sums.flush(SoloEngine())
        sums.wait()
        assert sums.seen == (is_trained, True, False, False, False, False)
        sums.finish(1.0, sums.seen)
        assert (frozen.grad is not None) == is_trained
