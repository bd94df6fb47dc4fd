"""Under torch.compile: one graph for each width, the same results, recomputations not counted."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elastic_batch.ghost import RunningStatistics, convert_batch_norm
from elastic_batch.ghost.functional import composed, ghost_batch_norm


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5)
    )
    convert_batch_norm(model, 4)
    return model.double()


def images(num_samples: int) -> Tensor:
    return torch.randn(num_samples, 3, 5, 5, dtype=torch.float64)


def test_two_widths_are_two_graphs_and_equal_eager_training() -> None:
    model = build()
    twin = copy.deepcopy(model)
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=counting)
    statistics, expected = RunningStatistics(model), RunningStatistics(twin)
    for num_samples in (4, 4, 12, 12, 4, 12):
        x = images(num_samples)
        for own, function in ((statistics, compiled), (expected, twin)):
            own.begin()
            own.samples_per_pass = num_samples
            function(x).square().sum().backward()
            own.commit(own.sums())
        torch.testing.assert_close(statistics.sums(), expected.sums())
    assert graphs == 2
    for found, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, msg=name)


def test_the_form_for_compilers_of_other_devices_takes_any_number_of_ghosts() -> None:
    compiled = torch.compile(lambda x: composed(x, None, None, 4, 1e-5), fullgraph=True, backend="aot_eager")
    for num_samples in (4, 12, 20):
        x = images(num_samples)
        for found, expected in zip(compiled(x), ghost_batch_norm(x, None, None, 4, 1e-5), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("compile_outside", [False, True], ids=["checkpoint of compiled", "compiled checkpoint"])
@pytest.mark.parametrize("watched", [False, True], ids=["alone", "watched"])
def test_recomputations_of_compiled_code_add_nothing(compile_outside: bool, watched: bool) -> None:
    model = build()
    statistics = RunningStatistics(model) if watched else None
    if statistics is not None:
        statistics.begin()

    def whole(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)  # type: ignore[no-any-return]  # torch's own

    if compile_outside:
        function = torch.compile(whole, backend="aot_eager", fullgraph=True)
    else:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

        def function(x: Tensor) -> Tensor:
            return checkpoint(compiled, x, use_reentrant=False)  # type: ignore[no-any-return]

    function(images(8).requires_grad_()).square().sum().backward()
    counted = model.get_buffer("1.num_batches_tracked") if statistics is None else statistics.sums()[0]
    assert int(counted) == 2
