"""The invariant: the trajectory is a function of the job, never of the cluster."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import jobs
from support.jobs import IMAGES, SMOOTH_IMAGES, TOKENS, SmallJob, image_loss
from support.reference import largest_difference, train_plainly
from support.training import Plan, first_gradient, train, train_in_two_halves
from support.worlds import run_world
from torch import nn

from elastic_batch.engines import SoloEngine

_EXACT = 1e-10
"""Norm of difference over norm, in float64, after 100 updates."""


@cache
def _reference(job: SmallJob, max_grad_norm: float | None = None) -> dict[str, Any]:
    return train_plainly(job, max_grad_norm=max_grad_norm)


def _train(size: int, plan: Plan) -> list[dict[str, Any]]:
    if size == 1:
        return [train(SoloEngine(), plan)]
    return run_world(size, train, plan, timeout_seconds=100)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("job", [pytest.param(IMAGES, id="images"), pytest.param(TOKENS, id="tokens")])
def test_any_number_of_workers_gives_the_reference_s_state(job: SmallJob, size: int) -> None:
    for state in _train(size, Plan(job)):
        assert largest_difference(state, _reference(job)) < _EXACT


@pytest.mark.parametrize("owns_loop", [False, True])
def test_both_ways_in_give_the_same_state(owns_loop: bool) -> None:
    [state] = _train(1, Plan(TOKENS, owns_loop=owns_loop))
    assert largest_difference(state, _reference(TOKENS)) < _EXACT


@pytest.mark.parametrize("width", [2, 3, 4])
def test_any_pass_width_gives_the_reference_s_state(width: int) -> None:
    [state] = _train(1, Plan(IMAGES, options={"micro_batches_per_pass": width}))
    assert largest_difference(state, _reference(IMAGES)) < _EXACT


def test_fused_passes_on_several_workers_give_the_reference_s_state() -> None:
    for state in _train(3, Plan(IMAGES, options={"micro_batches_per_pass": 2})):
        assert largest_difference(state, _reference(IMAGES)) < _EXACT


def test_spare_workers_change_nothing_and_stay_in_step() -> None:
    # 4 micro-batches on 6 workers: two of them have none until the batch has grown.
    states = _train(6, Plan(IMAGES, num_updates=60, options={"spares": 2}))
    expected = train_plainly(IMAGES, 60)
    assert max(largest_difference(state, expected) for state in states) < _EXACT


def test_clipping_acts_on_the_divided_gradient() -> None:
    for state in _train(2, Plan(IMAGES, options={"max_grad_norm": 0.5})):
        assert largest_difference(state, _reference(IMAGES, 0.5)) < _EXACT


def test_data_processes_change_nothing() -> None:
    for state in _train(2, Plan(IMAGES, options={"num_workers": 2})):
        assert largest_difference(state, _reference(IMAGES)) < _EXACT


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_a_run_resumes_in_mid_epoch_on_another_number_of_workers(tmp_path: Path, before: int, after: int) -> None:
    run_dir = str(tmp_path / "run")
    plan = Plan(IMAGES)
    run_world(before, train_in_two_halves, plan, run_dir, 37, timeout_seconds=100)
    for position, state in run_world(after, train_in_two_halves, plan, run_dir, 100, timeout_seconds=100):
        assert position == 37 * jobs.FIRST_BATCH
        assert position % jobs.NUM_SAMPLES != 0
        assert largest_difference(state, _reference(IMAGES)) < _EXACT


def test_float32_stays_within_what_one_unit_in_the_last_place_does() -> None:
    job = replace(IMAGES, dtype=torch.float32)
    expected = train_plainly(job)
    sway = max(largest_difference(train_plainly(job, perturb_seed=seed), expected) for seed in range(5))
    for size in (1, 3):
        for state in _train(size, Plan(job)):
            assert largest_difference(state, expected) < 10 * sway


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "job", [pytest.param(SMOOTH_IMAGES, id="images"), pytest.param(replace(TOKENS, dtype=torch.float32), id="tokens")]
)
def test_the_first_gradient_in_half_precision_is_near_that_in_float32(job: SmallJob, precision: str) -> None:
    # Statistics over two small images, as in the other tests, would magnify the rounding of each value.
    options = {"micro_batch_size": 16, "ghost_batch_size": 16}
    exact = first_gradient(SoloEngine(), Plan(job, options=options))
    rough = first_gradient(SoloEngine(), Plan(job, options={**options, "precision": precision}))
    assert float((rough - exact).norm() / exact.norm()) < 0.02


def test_the_measured_width_changes_nothing() -> None:
    [state] = _train(1, Plan(IMAGES, options={"micro_batches_per_pass": "auto"}))
    assert largest_difference(state, _reference(IMAGES)) < _EXACT


def test_a_loss_that_draws_by_itself_runs_in_single_micro_batches() -> None:
    def noisy_loss(model: nn.Module, batch: Any) -> torch.Tensor:
        images, labels = batch
        return image_loss(model, (images + 0.1 * torch.randn_like(images), labels))

    job = replace(IMAGES, loss_fn=noisy_loss)
    expected = train_plainly(job, 20)
    for width in (4, "auto"):
        [state] = _train(1, Plan(job, 20, options={"micro_batches_per_pass": width, "check_loss": False}))
        assert largest_difference(state, expected) < _EXACT
