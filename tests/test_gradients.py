"""Sums of gradients: exact, one order of reductions, and errors for what would spoil them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from elastic_batch.engines import Handle, SoloEngine
from elastic_batch.errors import MisusedTrainer, WorldBroken
from elastic_batch.gradients import GradientSums


class RecordingEngine(SoloEngine):
    """Notes which tensors are reduced, in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.reduced: list[int] = []

    def all_reduce(self, tensor: Tensor) -> Handle:
        self.reduced.append(tensor.data_ptr())
        return super().all_reduce(tensor)


class Branching(nn.Module):
    """Three layers, of which a forward may leave out any."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(3))

    def forward(self, inputs: Tensor, *used: int) -> Tensor:
        for index in used:
            inputs = self.layers[index](inputs)
        loss: Tensor = inputs.square().sum()
        return loss


def _inputs(seed: int) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("alone", [False, True])
def test_sums_over_passes_equal_plain_accumulation(alone: bool) -> None:
    model = Branching()
    sums = GradientSums(model.parameters(), bucket_bytes=200)
    sums.begin(alone=alone)
    for seed in range(3):
        with sums.accepting():
            model(_inputs(seed), 0, 1, 2).backward()
    sums.flush(SoloEngine())
    sums.wait()
    sums.finish(0.5, sums.seen)
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    sums.close()
    torch.stack([model(_inputs(seed), 0, 1, 2) for seed in range(3)]).sum().mul(0.5).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


@pytest.mark.parametrize("used", [(0, 1, 2), (2,), (0,), (1, 0), ()])
def test_buckets_are_reduced_in_the_same_order_whatever_was_used(used: tuple[int, ...]) -> None:
    model = Branching()
    sums = GradientSums(model.parameters(), bucket_bytes=100)
    orders = []
    for reduced_layers in ((0, 1, 2), used):
        engine = RecordingEngine()
        sums.begin(alone=False)
        if reduced_layers:
            with sums.accepting(reduce_with=engine):
                model(_inputs(0), *reduced_layers).backward()
        sums.flush(engine)
        sums.wait()
        orders.append(engine.reduced)
    assert orders[0] == orders[1]
    assert len(orders[0]) > 1


def test_full_buckets_are_reduced_while_backward_goes_on() -> None:
    model = Branching()
    sums = GradientSums(model.parameters(), bucket_bytes=100)
    engine = RecordingEngine()
    reduced_when_first_layer_got_its_gradient: list[int] = []
    model.get_parameter("layers.0.weight").register_hook(
        lambda gradient: reduced_when_first_layer_got_its_gradient.append(len(engine.reduced))
    )
    sums.begin(alone=False)
    with sums.accepting(reduce_with=engine):
        model(_inputs(0), 0, 1, 2).backward()
    assert reduced_when_first_layer_got_its_gradient[0] >= 1


def test_a_parameter_without_gradient_keeps_none() -> None:
    model = Branching()
    sums = GradientSums(model.parameters())
    sums.begin(alone=False)
    with sums.accepting():
        model(_inputs(0), 1).backward()
    assert sums.seen == (False, False, True, True, False, False)
    sums.flush(SoloEngine())
    sums.wait()
    sums.finish(1.0, sums.seen)
    assert [parameter.grad is None for parameter in model.parameters()] == [True, True, False, False, True, True]


@pytest.mark.parametrize("alone", [False, True])
def test_half_precision_parameters_accumulate_in_float32(alone: bool) -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    sums = GradientSums([parameter])
    sums.begin(alone=alone)
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


def test_gradients_of_channels_last_weights_keep_their_layout() -> None:
    layer = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    sums = GradientSums(layer.parameters())
    sums.begin(alone=False)
    assert layer.weight.grad is not None
    assert layer.weight.grad.stride() == layer.weight.stride()


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("alone_before", [False, True])
def test_beginning_again_forgets_everything(alone_before: bool, alone: bool) -> None:
    model = Branching()
    sums = GradientSums(model.parameters())
    sums.begin(alone=alone_before)
    with sums.accepting():
        model(_inputs(0), 0, 1, 2).backward()
    sums.begin(alone=alone)
    assert not any(sums.seen)
    assert all(float(norm) == 0 for norm in sums.norms())
    with sums.accepting():
        model(_inputs(1), 0).backward()
    found = model.get_parameter("layers.0.weight").grad
    assert found is not None
    [expected] = torch.autograd.grad(model(_inputs(1), 0), [model.get_parameter("layers.0.weight")])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_a_worker_alone_keeps_the_tensors_that_backward_hands_over() -> None:
    model = Branching()
    sums = GradientSums(model.parameters())
    sums.begin(alone=True)
    handed: list[int] = []
    weight = model.get_parameter("layers.2.weight")
    weight.register_hook(lambda gradient: handed.append(gradient.data_ptr()))
    with sums.accepting():
        model(_inputs(0), 2).backward()
    assert weight.grad is not None
    assert handed == [weight.grad.data_ptr()]


def test_gradients_that_share_memory_are_told_apart() -> None:
    one, other = (nn.Parameter(torch.ones(2, 3, dtype=torch.float64)) for _ in range(2))
    sums = GradientSums([one, other])
    sums.begin(alone=True)
    for _ in range(2):
        with sums.accepting():
            # Adding hands one gradient to both, and each view makes an alias of it.
            (one.view(-1) + other.view(-1)).square().sum().backward()
    sums.finish(0.5, sums.seen)
    for parameter in (one, other):
        assert parameter.grad is not None
        assert parameter.grad.unique().tolist() == [4]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_gradients_become_dense(dtype: torch.dtype, alone: bool) -> None:
    table = nn.Embedding(6, 2, sparse=True, dtype=dtype)
    sums = GradientSums(table.parameters())
    sums.begin(alone=alone)
    for rows in ([1, 2], [2, 5]):
        with sums.accepting():
            table(torch.tensor(rows)).sum().backward()
    sums.finish(0.5, sums.seen)
    assert table.weight.grad is not None
    assert table.weight.grad[:, 0].tolist() == [0, 0.5, 1, 0, 0, 0.5]


def test_a_direct_backward_is_refused() -> None:
    model = Branching()
    sums = GradientSums(model.parameters())
    sums.begin(alone=False)
    with pytest.raises(MisusedTrainer, match=r"call update.backward\(loss\)"):
        model(_inputs(0), 0).backward()


@pytest.mark.parametrize("alone", [False, True])
def test_gradients_that_were_replaced_are_refused(alone: bool) -> None:
    model = Branching()
    sums = GradientSums(model.parameters())
    sums.begin(alone=alone)
    with sums.accepting():
        model(_inputs(0), 0).backward()
    model.zero_grad()
    with pytest.raises(MisusedTrainer, match=r"remove model.zero_grad\(\)"), sums.accepting():
        model(_inputs(0), 0).backward()


def test_every_handle_is_waited_for_when_one_fails() -> None:
    waited: list[int] = []

    class Failing(SoloEngine):
        def all_reduce(self, tensor: Tensor) -> Handle:
            number = len(launched)
            launched.append(number)

            class Handle:
                def wait(self) -> None:
                    waited.append(number)
                    if number == 0:
                        raise WorldBroken("gone", 0)

            return Handle()

    launched: list[int] = []
    model = Branching()
    sums = GradientSums(model.parameters(), bucket_bytes=100)
    sums.begin(alone=False)
    sums.flush(Failing())
    with pytest.raises(WorldBroken, match="gone"):
        sums.wait()
    assert waited == launched
    assert len(waited) > 1


def test_a_failed_wait_is_freed_without_the_garbage_collector() -> None:
    class Failing(SoloEngine):
        def all_reduce(self, tensor: Tensor) -> Handle:
            return self

        def wait(self) -> None:
            raise WorldBroken("gone", 0)

    sums = GradientSums(Branching().parameters())
    sums.begin(alone=False)
    sums.flush(Failing())
    gc.disable()
    try:
        try:
            sums.wait()
        except WorldBroken as error:
            kept = weakref.ref(error)
        assert kept() is None
    finally:
        gc.enable()
