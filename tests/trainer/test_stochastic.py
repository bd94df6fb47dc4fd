"""Several micro-batches in one pass give what they give one by one, or the reason why not is named."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from elastic_batch.errors import MisusedTrainer
from elastic_batch.ghost import RunningStatistics, convert_batch_norm
from elastic_batch.randomness import GeneratorState, seeded
from elastic_batch.trainer.fusing import obstacle_to_fusing
from elastic_batch.trainer.stochastic import PassRandomness

MICRO_BATCH = 4


class DropPath(nn.Module):
    """As model packages have it, each its own copy."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(x.size(0), *[1] * (x.dim() - 1)).bernoulli_(1 - self.drop_prob)


class Residual(nn.Module):
    """Convolutions with dropout of several kinds, one of them used twice, under stochastic depth."""

    def __init__(self, checkpointed: bool = False, **checkpoint_options: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout2d(0.3)
        self.path = DropPath(0.4)
        self.checkpoint_options = {"use_reentrant": False} | checkpoint_options if checkpointed else None

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpoint_options is None:
            return self.branch(x) + x
        branch: Tensor = checkpoint(self.branch, x, **self.checkpoint_options)
        return branch + x

    def branch(self, x: Tensor) -> Tensor:
        return self.path(self.drop(self.conv(self.drop(self.norm(x).relu()))))  # type: ignore[no-any-return]


def model(*extra: nn.Module, checkpointed: bool = False, **checkpoint_options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [
        nn.Conv2d(3, 4, 3),
        Residual(checkpointed, **checkpoint_options),
        nn.AlphaDropout(0.2),
        Residual(checkpointed, **checkpoint_options),
        nn.Flatten(),
        nn.Linear(36, 6),
        nn.Dropout(0.5, inplace=True),
        nn.Tanh(),
        nn.Linear(6, 6),
        *extra,
        nn.Linear(6, 3),
    ]
    built = nn.Sequential(*layers).double()
    convert_batch_norm(built, 2)
    return built


def images(num_micro_batches: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(num_micro_batches * MICRO_BATCH, 3, 5, 5, dtype=torch.float64, generator=generator)


def run(net: nn.Module, width: int, num_micro_batches: int = 12) -> tuple[Tensor, list[Tensor], Tensor]:
    """Outputs, gradients and sums of the norms over micro-batches 0, 1, ..., `width` at a time."""
    randomness, statistics = PassRandomness(net), RunningStatistics(net)
    statistics.begin()
    net.zero_grad()
    outputs = []
    for first in range(0, num_micro_batches, width):
        batch = images(num_micro_batches)[first * MICRO_BATCH : (first + width) * MICRO_BATCH]
        with randomness.over([1000 + number for number in range(first, first + width)]) as draws:
            output = net(batch)
            assert draws.stray() is None
            (output**2).sum().backward()
            assert draws.stray() is None
        outputs.append(output.detach())
    return torch.cat(outputs), [parameter.grad for parameter in net.parameters()], statistics.sums()  # type: ignore[misc]


def assert_equal_to_width_one(make: Callable[[], nn.Module], width: int) -> None:
    output, gradients, sums = run(make(), 1)
    wide_output, wide_gradients, wide_sums = run(make(), width)
    torch.testing.assert_close(wide_output, output, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(wide_sums, sums, rtol=1e-10, atol=1e-10)
    for wide, single in zip(wide_gradients, gradients, strict=True):
        torch.testing.assert_close(wide, single, rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def _restored_generators() -> Iterator[None]:
    state = GeneratorState()
    yield
    state.restore()


@pytest.mark.parametrize("width", [2, 3, 4])
def test_any_width_gives_the_outputs_and_gradients_of_single_micro_batches(width: int) -> None:
    assert_equal_to_width_one(model, width)


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_repeats_the_same_draws(width: int, use_reentrant: bool) -> None:
    assert_equal_to_width_one(lambda: model(checkpointed=True, use_reentrant=use_reentrant), width)
    output, gradients, _ = run(model(checkpointed=True, use_reentrant=use_reentrant), width)
    plain_output, plain_gradients, _ = run(model(), width)
    torch.testing.assert_close(output, plain_output)
    torch.testing.assert_close(gradients, plain_gradients)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_of_torchvision_draws_for_each_micro_batch(mode: str) -> None:
    ops = pytest.importorskip("torchvision.ops")
    assert_equal_to_width_one(lambda: model(ops.StochasticDepth(0.5, mode)), 3)


def test_drop_path_of_timm_draws_for_each_micro_batch() -> None:
    layers = pytest.importorskip("timm.layers")
    assert_equal_to_width_one(lambda: model(layers.DropPath(0.5)), 3)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout])
@pytest.mark.parametrize("inplace", [False, True])
def test_every_kind_of_dropout_draws_for_each_micro_batch(kind: Callable[..., nn.Module], inplace: bool) -> None:
    assert_equal_to_width_one(lambda: model(kind(0.5, inplace=inplace)), 2)


def test_dropout_in_place_changes_its_input_in_a_wide_pass_too() -> None:
    net = nn.Dropout(0.5, inplace=True)
    x = torch.ones(8, 3)
    with PassRandomness(net).over([1, 2]):
        output = net(x)
    assert output is x
    assert not x.all()


def test_one_micro_batch_draws_from_the_global_generators_under_its_seed() -> None:
    net = model()
    with PassRandomness(net).over([5]) as draws:
        output = net(images(1))
        assert draws.stray() is None
    with seeded(5):
        assert torch.equal(net(images(1)), output)


@pytest.mark.parametrize("seeds", [[3], [3, 4]])
def test_generators_and_modules_are_as_before_afterwards(seeds: list[int]) -> None:
    net = model()
    state = [dict(vars(module)) for module in net.modules()]
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    with PassRandomness(net).over(seeds):
        net(images(len(seeds)))
    drawn = (float(torch.rand(())), random.random(), np.random.random_sample())
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    assert drawn == (float(torch.rand(())), random.random(), np.random.random_sample())
    assert [vars(module).keys() for module in net.modules()] == [before.keys() for before in state]
    assert not any("forward" in vars(module) for module in net.modules())


class Straying(nn.Module):
    """Draws in a way that nobody can split among micro-batches."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.draw(x)


def drawing_from_python(x: Tensor) -> Tensor:
    return x * random.random()


def drawing_from_numpy(x: Tensor) -> Tensor:
    return x * np.random.random_sample()


def reseeding(x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return x


@pytest.mark.parametrize("draw", [F.dropout, torch.rand_like, reseeding], ids=["dropout", "rand", "manual_seed"])
@pytest.mark.parametrize("before_dropout", [False, True])
def test_a_draw_outside_dropout_modules_is_noticed_and_its_module_named(
    draw: Callable[[Tensor], Tensor], before_dropout: bool
) -> None:
    last = [nn.Dropout(0.5)] if before_dropout else []
    net = model(nn.Sequential(Straying(draw), *last))
    with PassRandomness(net).over([1, 2]) as draws:
        net(images(2))
        assert (draws.stray() or "").startswith("9.0 (Straying) drew random numbers")


def test_a_stray_draw_is_noticed_in_every_pass_not_only_the_first() -> None:
    net = model(Straying(lambda x: F.dropout(x, 0.5, training=is_straying)), nn.Dropout(0.5))
    randomness = PassRandomness(net)
    for is_straying in (False, True, False):
        with randomness.over([1, 2]) as draws:
            net(images(2))
            assert (draws.stray() is not None) == is_straying


@pytest.mark.parametrize("draw", [drawing_from_python, drawing_from_numpy])
def test_draws_of_python_and_numpy_are_noticed(draw: Callable[[Tensor], Tensor]) -> None:
    net = model(Straying(draw))
    with PassRandomness(net).over([1, 2]) as draws:
        net(images(2))
        assert (draws.stray() or "").startswith("the model or the loss function drew random numbers")


def test_a_draw_of_the_loss_function_is_noticed() -> None:
    net = model()
    with PassRandomness(net).over([1, 2]) as draws:
        F.dropout(net(images(2))).sum()
        assert "the model or the loss function drew" in (draws.stray() or "")


def test_asking_twice_gives_the_same_answer() -> None:
    net = model()
    with PassRandomness(net).over([1, 2]) as draws:
        net(images(2))
        assert draws.stray() is None
        assert draws.stray() is None


def test_dropout_on_something_else_than_micro_batches_is_named() -> None:
    net = nn.Sequential(nn.Flatten(0), nn.Dropout(0.5)).double()
    with PassRandomness(net).over([1, 2]) as draws:
        net(images(2)[:, 0, 0, :1][:7])
        assert "1, whose input of shape (7,) is not 2 micro-batches, drew" in (draws.stray() or "")


class Counting(nn.Module):
    """Keeps state that depends on how often it is called."""

    calls: Tensor

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


@pytest.mark.parametrize("persistent", [True, False], ids=["state", "cache"])
def test_a_forward_that_changes_the_models_state_is_named(persistent: bool) -> None:
    net = model(Counting(persistent))
    with PassRandomness(net).over([1, 2]) as draws:
        net(images(2))
        assert draws.stray() == ("the forward pass changed the buffer 9.calls" if persistent else None)


def test_checkpointing_that_does_not_keep_the_random_state_is_refused() -> None:
    net = model(checkpointed=True, preserve_rng_state=False)
    with PassRandomness(net).over([1, 2]):
        output = net(images(2))
        with pytest.raises(MisusedTrainer, match="preserve_rng_state=True"):
            output.sum().backward()


def test_modules_that_do_not_draw_are_not_touched() -> None:
    net = nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.5).eval(), nn.Linear(3, 3))
    with PassRandomness(net).over([1, 2]):
        assert not any("forward" in vars(module) for module in net.modules())


def fusable() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))


def ghost_model(ghost_batch_size: int) -> nn.Sequential:
    net = fusable()
    convert_batch_norm(net, ghost_batch_size)
    return net


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (ghost_model(4), None),
        (ghost_model(2), None),
        (
            ghost_model(3),
            "1 (GhostBatchNorm1d) has ghost batches of 3 samples, which do not divide the micro-batch of 4",
        ),
        (fusable(), "1 (BatchNorm1d) takes its statistics over the whole batch"),
        (fusable().eval(), None),
        (nn.BatchNorm1d(3, track_running_stats=False).eval(), "the model (BatchNorm1d) takes its statistics"),
        (nn.SyncBatchNorm(3), "the model (SyncBatchNorm) takes its statistics over all workers"),
        (nn.InstanceNorm1d(3), None),
        (nn.InstanceNorm1d(3, track_running_stats=True), "the model (InstanceNorm1d) updates its running statistics"),
        (nn.MultiheadAttention(4, 2), None),
        (nn.MultiheadAttention(4, 2, dropout=0.1), "the model (MultiheadAttention) has dropout inside"),
        (nn.Sequential(nn.LSTM(3, 3, num_layers=2, dropout=0.1)), "0 (LSTM) has dropout inside"),
        (nn.LSTM(3, 3, num_layers=2, dropout=0.1).eval(), None),
    ],
    ids=lambda value: None if isinstance(value, nn.Module) else str(value)[:40],
)
def test_what_forbids_fusing_is_told_before_training(net: nn.Module, reason: str | None) -> None:
    found = obstacle_to_fusing(net, 4)
    assert (found is None) == (reason is None)
    assert (found or "").startswith(reason or "")


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "Module.compile"])
def test_dropout_in_a_compiled_model_forbids_fusing(in_place: bool) -> None:
    with_dropout, without = ghost_model(2), nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0))
    if in_place:
        with_dropout.compile(backend="eager")
        without.compile(backend="eager")
        assert "is compiled, with dropout" in (obstacle_to_fusing(with_dropout, 4) or "")
        assert obstacle_to_fusing(without, 4) is None
    else:
        compiled, harmless = torch.compile(nn.ModuleList([with_dropout, without])), torch.compile(without)
        assert isinstance(compiled, nn.Module)
        assert isinstance(harmless, nn.Module)
        assert "is compiled, with dropout" in (obstacle_to_fusing(compiled, 4) or "")
        assert obstacle_to_fusing(harmless, 4) is None


def test_compiled_code_that_draws_is_noticed_at_run_time() -> None:
    net = model()
    compiled = torch.compile(lambda x: net(x).sum(), backend="aot_eager")
    randomness = PassRandomness(net)
    with randomness.over([1, 2]) as draws:
        compiled(images(2))
        assert "drew random numbers" in (draws.stray() or "")
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [2, 3])
def test_any_width_on_cuda_gives_what_single_micro_batches_give(width: int) -> None:
    device = torch.device("cuda")
    net = model().to(device)
    randomness = PassRandomness(net)
    outputs = {}
    for passes in (1, width):
        parts = []
        for first in range(0, 2 * width, passes):
            batch = images(2 * width)[first * MICRO_BATCH : (first + passes) * MICRO_BATCH].to(device)
            with randomness.over(list(range(first, first + passes)), device) as draws:
                parts.append(net(batch).detach())
                assert draws.stray() is None
        outputs[passes] = torch.cat(parts)
    torch.testing.assert_close(outputs[width], outputs[1])
