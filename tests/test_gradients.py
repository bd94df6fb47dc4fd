"""Gradient buckets: exact sums, one order of reductions, and errors for what would spoil them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from elastic_batch.engines import Handle, SoloEngine
from elastic_batch.errors import MisusedTrainer, WorldBroken
from elastic_batch.gradients import GradientBuckets


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


def test_sums_over_passes_equal_plain_accumulation() -> None:
    model = Branching()
    buckets = GradientBuckets(model.parameters(), bucket_bytes=200)
    buckets.begin()
    for seed in range(3):
        with buckets.accepting():
            model(_inputs(seed), 0, 1, 2).backward()
    buckets.flush(SoloEngine())
    buckets.wait()
    buckets.finish(0.5, buckets.seen)
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    buckets.close()
    torch.stack([model(_inputs(seed), 0, 1, 2) for seed in range(3)]).sum().mul(0.5).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


@pytest.mark.parametrize("used", [(0, 1, 2), (2,), (0,), (1, 0), ()])
def test_buckets_are_reduced_in_the_same_order_whatever_was_used(used: tuple[int, ...]) -> None:
    model = Branching()
    buckets = GradientBuckets(model.parameters(), bucket_bytes=100)
    orders = []
    for reduced_layers in ((0, 1, 2), used):
        engine = RecordingEngine()
        buckets.begin()
        if reduced_layers:
            with buckets.accepting(reduce_with=engine):
                model(_inputs(0), *reduced_layers).backward()
        buckets.flush(engine)
        buckets.wait()
        orders.append(engine.reduced)
    assert orders[0] == orders[1]
    assert len(orders[0]) > 1


def test_full_buckets_are_reduced_while_backward_goes_on() -> None:
    model = Branching()
    buckets = GradientBuckets(model.parameters(), bucket_bytes=100)
    engine = RecordingEngine()
    reduced_when_first_layer_got_its_gradient: list[int] = []
    model.get_parameter("layers.0.weight").register_hook(
        lambda gradient: reduced_when_first_layer_got_its_gradient.append(len(engine.reduced))
    )
    buckets.begin()
    with buckets.accepting(reduce_with=engine):
        model(_inputs(0), 0, 1, 2).backward()
    assert reduced_when_first_layer_got_its_gradient[0] >= 1


def test_a_parameter_without_gradient_keeps_none() -> None:
    model = Branching()
    buckets = GradientBuckets(model.parameters())
    buckets.begin()
    with buckets.accepting():
        model(_inputs(0), 1).backward()
    assert buckets.seen == (False, False, True, True, False, False)
    buckets.flush(SoloEngine())
    buckets.wait()
    buckets.finish(1.0, buckets.seen)
    assert [parameter.grad is None for parameter in model.parameters()] == [True, True, False, False, True, True]


def test_half_precision_parameters_accumulate_in_float32() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    buckets = GradientBuckets([parameter])
    buckets.begin()
    for value in (256.0, 1.0, 1.0):
        with buckets.accepting():
            (parameter * torch.tensor([value], dtype=torch.bfloat16)).sum().backward()
    [norm] = buckets.norms()
    # In bfloat16 itself 256 + 1 would stay 256.
    assert float(norm) == 258.0
    assert norm.dtype == torch.float32
    buckets.finish(0.5, (True,))
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.bfloat16
    assert float(parameter.grad) == 129.0


def test_gradients_of_channels_last_weights_keep_their_layout() -> None:
    layer = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    buckets = GradientBuckets(layer.parameters())
    buckets.begin()
    assert layer.weight.grad is not None
    assert layer.weight.grad.stride() == layer.weight.stride()


def test_beginning_again_forgets_everything() -> None:
    model = Branching()
    buckets = GradientBuckets(model.parameters())
    buckets.begin()
    with buckets.accepting():
        model(_inputs(0), 0).backward()
    buckets.begin()
    assert not any(buckets.seen)
    assert all(float(norm) == 0 for norm in buckets.norms())


def test_a_direct_backward_is_refused() -> None:
    model = Branching()
    buckets = GradientBuckets(model.parameters())
    buckets.begin()
    with pytest.raises(MisusedTrainer, match=r"call update.backward\(loss\)"):
        model(_inputs(0), 0).backward()


def test_gradients_that_were_replaced_are_refused() -> None:
    model = Branching()
    buckets = GradientBuckets(model.parameters())
    buckets.begin()
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    with pytest.raises(MisusedTrainer, match=r"remove optimizer.zero_grad\(\)"), buckets.accepting():
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
    buckets = GradientBuckets(model.parameters(), bucket_bytes=100)
    buckets.begin()
    buckets.flush(Failing())
    with pytest.raises(WorldBroken, match="gone"):
        buckets.wait()
    assert waited == launched
    assert len(waited) > 1


def test_a_failed_wait_is_freed_without_the_garbage_collector() -> None:
    class Failing(SoloEngine):
        def all_reduce(self, tensor: Tensor) -> Handle:
            return self

        def wait(self) -> None:
            raise WorldBroken("gone", 0)

    buckets = GradientBuckets(Branching().parameters())
    buckets.begin()
    buckets.flush(Failing())
    gc.disable()
    try:
        try:
            buckets.wait()
        except WorldBroken as error:
            kept = weakref.ref(error)
        assert kept() is None
    finally:
        gc.enable()
