"""Running statistics of whole models: sums over updates and workers, merged on commit only."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elastic_batch.errors import InvalidSetting
from elastic_batch.ghost import GhostBatchNorm1d, GhostBatchNorm2d, RunningStatistics, convert_batch_norm


def build(ghost_batch_size: int = 2) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 5),
        nn.BatchNorm1d(5, momentum=None),
    ]
    model = nn.Sequential(*layers).double()
    convert_batch_norm(model, ghost_batch_size)
    return model


def images(num_samples: int, seed: int = 0) -> Tensor:
    return torch.randn(num_samples, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def num_tracked(model: nn.Module, name: str = "1") -> int:
    return int(model.get_buffer(f"{name}.num_batches_tracked"))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


def expected_of(model: nn.Sequential, x: Tensor, ghost_batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number of ghosts, mean over ghosts of mean and of unbiased variance, of the convolution's output."""
    ghosts = model[0](x).detach().split(ghost_batch_size)
    means = torch.stack([ghost.mean((0, 2, 3)) for ghost in ghosts])
    variances = torch.stack([ghost.var((0, 2, 3)) for ghost in ghosts])
    return torch.tensor(float(len(ghosts))), means.sum(0), variances.sum(0)


@pytest.mark.parametrize("ghost_batch_size", [2, 4], ids=["several ghosts", "one ghost"])
def test_sums_are_laid_out_norm_by_norm_as_count_means_variances(ghost_batch_size: int) -> None:
    model = build(ghost_batch_size)
    statistics = RunningStatistics(model)
    assert statistics.numel == 1 + 2 * 4 + 1 + 2 * 5
    statistics.begin()
    model(images(4, seed=1))
    model(images(4, seed=2))
    sums = statistics.sums()
    assert sums.dtype == torch.float64
    count, means, variances = expected_of(model, torch.cat((images(4, seed=1), images(4, seed=2))), ghost_batch_size)
    torch.testing.assert_close(sums[0], count.double())
    torch.testing.assert_close(sums[1:5], means)
    torch.testing.assert_close(sums[5:9], variances)
    assert sums[9] == count


@pytest.mark.parametrize("ghost_batch_size", [2, 4])
def test_commit_keeps_what_the_horizon_in_samples_says(ghost_batch_size: int) -> None:
    model = build(ghost_batch_size)
    statistics = RunningStatistics(model)
    mean, variance = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    total = 0
    for update in range(3):
        statistics.begin()
        x = images(8, seed=update)
        for part in x.split(4):
            model(part)
        statistics.commit(statistics.sums())
        count, means, variances = expected_of(model, x, ghost_batch_size)
        keep = (1 - 0.1) ** (8 / ghost_batch_size)
        mean = keep * mean + (1 - keep) * means / count
        variance = keep * variance + (1 - keep) * variances / count
        total += int(count)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    assert num_tracked(model, "1") == num_tracked(model, "5") == total


def test_momentum_none_is_the_mean_over_all_ghosts_ever_seen() -> None:
    norm = GhostBatchNorm1d(3, 2, momentum=None, dtype=torch.float64)
    statistics = RunningStatistics(norm)
    batches = [torch.randn(size, 3, dtype=torch.float64) for size in (4, 8, 2)]
    for batch in batches:
        statistics.begin()
        norm(batch)
        statistics.commit(statistics.sums())
    ghosts = torch.cat(batches).split(2)
    torch.testing.assert_close(norm.running_mean, torch.stack([ghost.mean(0) for ghost in ghosts]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([ghost.var(0) for ghost in ghosts]).mean(0))


@pytest.mark.parametrize("momentum", [0.5, None])
def test_a_momentum_that_is_changed_counts_from_the_next_update_on(momentum: float | None) -> None:
    alone, watched = (GhostBatchNorm1d(3, 2, dtype=torch.float64) for _ in range(2))
    statistics = RunningStatistics(watched)
    alone.momentum = watched.momentum = momentum
    x = torch.randn(4, 3, dtype=torch.float64)
    alone(x)
    statistics.begin()
    watched(x)
    statistics.commit(statistics.sums())
    assert_equal(buffers(watched), buffers(alone))


def test_an_update_in_one_pass_equals_one_forward_of_a_norm_alone() -> None:
    alone, watched = build(), build()
    statistics = RunningStatistics(watched)
    for update in range(3):
        statistics.begin()
        watched(images(8, update))
        statistics.commit(statistics.sums())
        alone(images(8, update))
    assert_equal(buffers(watched), buffers(alone))


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 5), max_size=4, unique=True), width=st.integers(1, 3))
def test_any_division_among_workers_and_passes_gives_the_same_statistics(cuts: list[int], width: int) -> None:
    """Six micro-batches of 2 samples, cut among up to five workers, each in passes of up to `width`."""
    micro_batches = images(12).split(2)
    reference, *workers = (build() for _ in range(len(cuts) + 2))
    statistics = RunningStatistics(reference)
    statistics.begin()
    for micro_batch in micro_batches:
        reference(micro_batch)
    statistics.commit(statistics.sums())

    bounds = [0, *sorted(cuts), 6]
    all_statistics = [RunningStatistics(worker) for worker in workers]
    for worker, own, start, stop in zip(workers, all_statistics, bounds[:-1], bounds[1:], strict=True):
        own.begin()
        for first in range(start, stop, width):
            worker(torch.cat(micro_batches[first : min(first + width, stop)]))
    total = torch.stack([own.sums() for own in all_statistics]).sum(0)
    for own in all_statistics:
        own.commit(total)
    assert_equal(buffers(workers[0]), buffers(reference))
    for worker in workers[1:]:
        assert_equal(buffers(worker), buffers(workers[0]), tolerance=0)


def test_float32_buffers_are_merged_in_float64_and_equal_to_the_bit_on_all_workers() -> None:
    models = [build().float() for _ in range(2)]
    for model in models:
        statistics = RunningStatistics(model)
        sums = torch.rand(statistics.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 7
        for _ in range(5):
            statistics.commit(sums)
    assert_equal(buffers(models[0]), buffers(models[1]), tolerance=0)
    assert models[0][1].running_mean.dtype == torch.float32


def test_nothing_changes_before_commit_and_begin_forgets() -> None:
    model = build()
    statistics = RunningStatistics(model)
    before = buffers(model)
    statistics.begin()
    model(images(4, seed=1))
    assert_equal(buffers(model), before, tolerance=0)
    statistics.begin()
    assert not statistics.sums().any()
    model(images(4, seed=2))
    again = statistics.sums()
    statistics.begin()
    model(images(4, seed=2))
    assert torch.equal(statistics.sums(), again)
    assert torch.equal(statistics.sums(), again)  # asking does not change it


@pytest.mark.parametrize("ghost_batch_size", [2, 4])
def test_an_update_that_was_not_finite_leaves_no_trace(ghost_batch_size: int) -> None:
    model = build(ghost_batch_size)
    statistics = RunningStatistics(model)
    statistics.begin()
    model(torch.full((4, 3, 5, 5), torch.nan, dtype=torch.float64))
    assert statistics.sums().isnan().any()
    statistics.begin()
    model(images(4))
    assert statistics.sums().isfinite().all()


def test_a_norm_in_evaluation_mode_is_left_alone() -> None:
    model = build()
    statistics = RunningStatistics(model)
    model[1].eval()
    before = buffers(model[1])
    statistics.begin()
    model(images(4))
    sums = statistics.sums()
    statistics.commit(sums)
    assert not sums[:9].any()
    assert sums[9] == 2
    assert_equal(buffers(model[1]), before, tolerance=0)


@pytest.mark.parametrize("ghost_batch_size", [2, 4])
def test_a_norm_that_runs_twice_counts_twice(ghost_batch_size: int) -> None:
    norm = GhostBatchNorm2d(3, ghost_batch_size, dtype=torch.float64)
    statistics = RunningStatistics(nn.Sequential(norm, nn.ReLU(), norm))
    first, second = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64, requires_grad=True).unbind()
    statistics.begin()
    (norm(first).square().sum() + norm(second).square().sum()).backward()  # the first graph survives the second use
    sums = statistics.sums()
    assert sums[0] == 2 * 4 / ghost_batch_size
    ghosts = (*first.detach().split(ghost_batch_size), *second.detach().split(ghost_batch_size))
    torch.testing.assert_close(sums[1:4], torch.stack([ghost.mean((0, 2, 3)) for ghost in ghosts]).sum(0))


@pytest.mark.parametrize("ghost_batch_size", [2, 4])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_forward_adds_nothing(ghost_batch_size: int, use_reentrant: bool) -> None:
    model = build(ghost_batch_size)
    statistics = RunningStatistics(model)
    statistics.begin()
    model(images(4))
    expected = statistics.sums()
    statistics.begin()
    x = images(4).requires_grad_()
    output: Tensor = checkpoint(model, x, use_reentrant=use_reentrant)
    output.square().sum().backward()
    assert torch.equal(statistics.sums(), expected)


def test_copies_and_saved_models_have_no_part_in_the_update() -> None:
    model = build()
    statistics = RunningStatistics(model)
    statistics.begin()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    before = buffers(model)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        twin(images(4))
        assert num_tracked(twin) == 2  # it looks after itself
    assert not statistics.sums().any()
    assert_equal(buffers(model), before, tolerance=0)


@pytest.mark.parametrize("drop", [False, True], ids=["closed", "dropped"])
def test_afterwards_norms_look_after_themselves_again(drop: bool) -> None:
    model = build()
    statistics: RunningStatistics | None = RunningStatistics(model)
    assert statistics is not None
    if drop:
        statistics = None
        gc.collect()
    else:
        statistics.close()
    model(images(4))
    assert num_tracked(model) == 2


def test_a_newer_view_of_the_model_is_not_disturbed_when_an_older_one_goes() -> None:
    model = build()
    older = RunningStatistics(model)
    newer = RunningStatistics(model)
    older.close()
    newer.begin()
    model(images(4))
    assert newer.sums()[0] == 2


def test_a_model_that_changes_its_type_or_its_buffers_is_followed() -> None:
    model = build()
    statistics = RunningStatistics(model)
    model.float()
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    statistics.begin()
    model(images(4).float())
    statistics.commit(statistics.sums())
    assert num_tracked(model) == 2
    assert model.get_buffer("1.running_mean").any()


def test_norms_of_several_types_are_kept_apart() -> None:
    model = nn.Sequential(GhostBatchNorm1d(3, 4, dtype=torch.float64), GhostBatchNorm1d(2, 4))
    statistics = RunningStatistics(model)
    statistics.begin()
    x = torch.randn(4, 5, dtype=torch.float64)
    model[0](x[:, :3])
    model[1](x[:, 3:].float())
    sums = statistics.sums()
    torch.testing.assert_close(sums[1:4], x[:, :3].mean(0))
    torch.testing.assert_close(sums[8:10], x[:, 3:].float().mean(0).double())


def test_norms_without_running_statistics_have_no_part() -> None:
    model = nn.Sequential(GhostBatchNorm1d(3, 2, track_running_stats=False), nn.Linear(3, 3))
    statistics = RunningStatistics(model)
    statistics.begin()
    model(torch.randn(4, 3))
    assert statistics.numel == 0
    assert statistics.sums().shape == (0,)
    statistics.commit(statistics.sums())


@pytest.mark.parametrize("model", [nn.Linear(3, 3, device="meta"), build().to("meta")], ids=["no norms", "norms"])
def test_sums_lie_where_the_model_is(model: nn.Module) -> None:
    assert RunningStatistics(model).sums().device.type == "meta"


def test_sums_of_another_model_are_refused() -> None:
    statistics = RunningStatistics(build())
    with pytest.raises(InvalidSetting, match=r"must have the shape of this model's sums\(\), \(20,\)"):
        statistics.commit(torch.zeros(3, dtype=torch.float64))


def test_rows_that_are_no_samples_are_split_as_the_samples_are() -> None:
    """Three frames per sample, flattened into the batch: 4 samples in 2 ghosts are 2 ghosts of 6 rows."""
    norm = GhostBatchNorm1d(5, 2, dtype=torch.float64)
    statistics = RunningStatistics(norm)
    statistics.begin()
    statistics.samples_per_pass = 4
    frames = torch.randn(12, 5, dtype=torch.float64)
    plain = nn.BatchNorm1d(5, dtype=torch.float64)
    torch.testing.assert_close(norm(frames), torch.cat([plain(part) for part in frames.split(6)]))
    assert statistics.sums()[0] == 2
    statistics.samples_per_pass = 2  # one ghost takes any number of rows
    torch.testing.assert_close(norm(frames[:7]), plain(frames[:7]))
    statistics.samples_per_pass = 4
    with pytest.raises(
        InvalidSetting, match="makes 2 ghosts of the batch, into which a norm's 7 rows cannot be divided"
    ):
        norm(frames[:7])
