"""Buckets: one order of reductions, launched early, and waited for whatever happens."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support.branching import Branching, inputs
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


@pytest.mark.parametrize("used", [(0, 1, 2), (2,), (0,), (1, 0), ()])
def test_buckets_are_reduced_in_the_same_order_whatever_was_used(used: tuple[int, ...]) -> None:
    model = Branching()
    gradients = GradientSums(model.parameters(), bucket_bytes=100)
    orders = []
    for reduced_layers in ((0, 1, 2), used):
        engine = RecordingEngine()
        sums = gradients.begin(alone=False)
        if reduced_layers:
            with sums.accepting(reduce_with=engine):
                model(inputs(0), *reduced_layers).backward()
        sums.flush(engine)
        sums.wait()
        orders.append(engine.reduced)
    assert orders[0] == orders[1]
    assert len(orders[0]) > 1


def test_full_buckets_are_reduced_while_backward_goes_on() -> None:
    model = Branching()
    sums = GradientSums(model.parameters(), bucket_bytes=100).begin(alone=False)
    engine = RecordingEngine()
    reduced_when_first_layer_got_its_gradient: list[int] = []
    model.get_parameter("layers.0.weight").register_hook(
        lambda gradient: reduced_when_first_layer_got_its_gradient.append(len(engine.reduced))
    )
    with sums.accepting(reduce_with=engine):
        model(inputs(0), 0, 1, 2).backward()
    assert reduced_when_first_layer_got_its_gradient[0] >= 1


def test_gradients_of_channels_last_weights_keep_their_layout() -> None:
    layer = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    GradientSums(layer.parameters()).begin(alone=False)
    assert layer.weight.grad is not None
    assert layer.weight.grad.stride() == layer.weight.stride()


def test_a_direct_backward_is_refused() -> None:
    model = Branching()
    GradientSums(model.parameters()).begin(alone=False)
    with pytest.raises(MisusedTrainer, match=r"call update.backward\(loss\)"):
        model(inputs(0), 0).backward()


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
    sums = GradientSums(model.parameters(), bucket_bytes=100).begin(alone=False)
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

    sums = GradientSums(Branching().parameters()).begin(alone=False)
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
