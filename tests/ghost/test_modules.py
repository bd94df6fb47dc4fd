"""The modules: interchangeable with torch's, ghosts in training only, clear errors."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from elastic_batch.errors import InvalidSetting
from elastic_batch.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d, GhostNorm

KINDS: list[tuple[type[GhostNorm], type[_BatchNorm], tuple[int, ...]]] = [
    (GhostBatchNorm1d, nn.BatchNorm1d, (8, 3)),
    (GhostBatchNorm1d, nn.BatchNorm1d, (8, 3, 5)),
    (GhostBatchNorm2d, nn.BatchNorm2d, (8, 3, 4, 4)),
    (GhostBatchNorm3d, nn.BatchNorm3d, (8, 3, 2, 3, 4)),
]


def trained(norm: _BatchNorm, shape: tuple[int, ...]) -> _BatchNorm:
    with torch.no_grad():
        norm.weight.uniform_()
        norm.bias.uniform_()
    norm(torch.randn(shape) * 2 + 1)
    return norm


@pytest.mark.parametrize(("ghost_kind", "plain_kind", "shape"), KINDS)
def test_states_load_strictly_both_ways(
    ghost_kind: type[GhostNorm], plain_kind: type[_BatchNorm], shape: tuple[int, ...]
) -> None:
    ghost, plain = ghost_kind(3, 4), plain_kind(3)
    plain.load_state_dict(trained(ghost, shape).state_dict())
    assert list(plain.state_dict()) == list(ghost.state_dict())
    another = ghost_kind(3, 4)
    another.load_state_dict(plain.state_dict())
    for name, value in ghost.state_dict().items():
        torch.testing.assert_close(another.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(("ghost_kind", "plain_kind", "shape"), KINDS)
def test_evaluation_is_that_of_torch_to_the_bit(
    ghost_kind: type[GhostNorm], plain_kind: type[_BatchNorm], shape: tuple[int, ...]
) -> None:
    ghost, plain = ghost_kind(3, 4), plain_kind(3)
    plain.load_state_dict(trained(ghost, shape).state_dict())
    x = torch.randn(7, *shape[1:])  # which no ghost size divides
    assert torch.equal(ghost.eval()(x), plain.eval()(x))


def test_evaluation_without_running_statistics_uses_the_whole_batch() -> None:
    x = torch.randn(6, 3, 2, 2)
    ghost = GhostBatchNorm2d(3, 4, track_running_stats=False).eval()
    assert torch.equal(ghost(x), nn.BatchNorm2d(3, track_running_stats=False).eval()(x))


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize(("ghost_kind", "plain_kind", "shape"), KINDS)
def test_one_ghost_is_plain_batch_norm_to_the_bit(
    ghost_kind: type[GhostNorm], plain_kind: type[_BatchNorm], shape: tuple[int, ...], momentum: float | None
) -> None:
    ghost, plain = ghost_kind(3, shape[0], momentum=momentum), plain_kind(3, momentum=momentum)
    for _ in range(3):
        x = torch.randn(shape)
        assert torch.equal(ghost(x), plain(x))
    for name, value in plain.state_dict().items():
        assert torch.equal(ghost.state_dict()[name], value), name


@pytest.mark.parametrize(("ghost_kind", "plain_kind", "shape"), KINDS)
def test_ghosts_are_contiguous_runs_of_samples(
    ghost_kind: type[GhostNorm], plain_kind: type[_BatchNorm], shape: tuple[int, ...]
) -> None:
    ghost, plain = ghost_kind(3, 2, dtype=torch.float64), plain_kind(3, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(ghost(x), torch.cat([plain(part) for part in x.split(2)]))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_merge_the_mean_over_the_ghosts_with_their_horizon(momentum: float | None) -> None:
    norm = GhostBatchNorm2d(3, 2, momentum=momentum, dtype=torch.float64)
    mean, variance, seen = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), 0
    for _ in range(2):
        x = torch.randn(8, 3, 4, 4, dtype=torch.float64) + 1
        norm(x)
        keep = seen / (seen + 4) if momentum is None else (1 - momentum) ** 4
        ghosts = x.unflatten(0, (4, 2))
        mean = keep * mean + (1 - keep) * ghosts.mean((1, 3, 4)).mean(0)
        variance = keep * variance + (1 - keep) * ghosts.var((1, 3, 4)).mean(0)
        seen += 4
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == seen


@pytest.mark.parametrize("settings", [{"affine": False}, {"track_running_stats": False}, {"eps": 0.1}])
def test_the_settings_of_torch_mean_the_same(settings: dict[str, Any]) -> None:
    ghost, plain = GhostBatchNorm2d(3, 2, **settings), nn.BatchNorm2d(3, **settings)
    x = torch.randn(4, 3, 4, 4)
    torch.testing.assert_close(ghost(x), torch.cat([plain(part) for part in x.split(2)]))
    assert list(ghost.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("ghost_batch_size", [2, 4])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(ghost_batch_size: int, use_reentrant: bool) -> None:
    norm = GhostBatchNorm2d(3, ghost_batch_size)
    twin = copy.deepcopy(norm)
    x = torch.randn(4, 3, 4, 4, requires_grad=True)
    (twin(x) ** 3).sum().backward()
    of_input, x.grad = x.grad, None
    output: Tensor = checkpoint(norm, x, use_reentrant=use_reentrant)
    (output**3).sum().backward()
    torch.testing.assert_close(x.grad, of_input)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("ghost_batch_size", [2, 4])
def test_autocast_keeps_parameters_and_statistics_in_float32(ghost_batch_size: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), GhostBatchNorm2d(5, ghost_batch_size))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.randn(4, 3, 6, 6))
    output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert model.state_dict()["1.running_mean"].dtype == torch.float32


def test_copies_and_pickles_are_equal_and_independent() -> None:
    norm = GhostBatchNorm2d(3, 2)
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    x = torch.randn(4, 3, 2, 2)
    for twin in (copy.deepcopy(norm), torch.load(file, weights_only=False)):
        assert twin.ghost_batch_size == 2
        assert torch.equal(twin(x), norm(x))


def test_repr_names_the_ghost_batch_size() -> None:
    assert "ghost_batch_size=16" in repr(GhostBatchNorm1d(3, 16))


def test_a_batch_that_is_not_a_whole_number_of_ghosts_is_refused_with_both_numbers() -> None:
    with pytest.raises(InvalidSetting, match=r"ghost_batch_size = 4: must divide the batch, which has 6 samples"):
        GhostBatchNorm2d(3, 4)(torch.randn(6, 3, 2, 2))


@pytest.mark.parametrize(("norm", "shape"), [(GhostBatchNorm1d(3, 1), (4, 3)), (GhostBatchNorm2d(3, 1), (1, 3, 1, 1))])
def test_one_value_per_channel_is_refused(norm: GhostNorm, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidSetting, match=re.escape(f"more than one value per channel; an input of shape {shape}")):
        norm(torch.randn(shape))


@pytest.mark.parametrize("size", [0, -1, 2.0])
def test_a_ghost_batch_size_is_a_positive_number_of_samples(size: int) -> None:
    with pytest.raises(InvalidSetting, match="must be a number of samples, at least 1"):
        GhostBatchNorm1d(3, size)


def test_inputs_of_the_wrong_dimension_are_refused_as_by_torch() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        GhostBatchNorm2d(3, 2)(torch.randn(4, 3))
