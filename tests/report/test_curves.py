"""Curves: thinned, averaged, joined over seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_batch.report.curves import binned, evaluated, stairs
from elastic_batch.report.runs import Group, Run


def run(losses: list[float], evaluations: dict[float, float] | None = None) -> Run:
    numbers = np.arange(1.0, len(losses) + 1)
    updates = {"update": numbers, "epoch": numbers / 10, "loss": np.array(losses), "phase": np.zeros(len(losses))}
    evaluations = evaluations or {}
    columns: dict[str, Any] = {
        "epoch": np.array(list(evaluations)),
        "update": 10 * np.array(list(evaluations)),
        "accuracy": np.array(list(evaluations.values())),
    }
    return Run("name", "hybrid", 1, updates, columns, None)


@settings(deadline=None)
@given(losses=st.lists(st.floats(0.1, 10), min_size=1, max_size=400))
def test_bins_keep_the_mean_and_lie_between_the_extremes(losses: list[float]) -> None:
    curve = binned(Group("a", [run(losses)]), "loss")
    assert 1 <= len(curve.mean) <= min(160, len(losses))
    assert (curve.mean >= min(losses) - 1e-9).all()
    assert (curve.mean <= max(losses) + 1e-9).all()
    assert np.array_equal(curve.low, curve.high)
    assert (np.diff(curve.updates) > 0).all()
    if len(losses) <= 160:
        assert np.isclose(np.sort(curve.mean).sum(), np.sum(losses)) or len(curve.mean) < len(losses)


def test_seeds_are_joined_to_a_mean_and_its_range() -> None:
    curve = binned(Group("a", [run([1.0, 2.0]), run([3.0, 6.0]), run([2.0, float("nan")])]), "loss")
    assert (curve.mean.tolist(), curve.low.tolist(), curve.high.tolist()) == ([2.0, 4.0], [1.0, 2.0], [3.0, 6.0])
    assert np.allclose(curve.updates, [1.0, 2.0])


def test_runs_of_unequal_length_are_drawn_as_far_as_all_have_come() -> None:
    losses = list(np.arange(20.0, 0.0, -1.0))
    curve = binned(Group("a", [run(losses), run(losses[:10])]), "loss")
    assert curve.epochs[-1] == 1.0
    assert curve.mean.tolist() == curve.low.tolist() == curve.high.tolist() == losses[:10]


def test_evaluations_are_joined_where_every_seed_has_one() -> None:
    group = Group("a", [run([1.0] * 30, {1.0: 0.5, 2.0: 0.7}), run([1.0] * 30, {0.5: 0.1, 2.0: 0.9, 3.0: 0.9})])
    curve = evaluated(group, "accuracy")
    assert (curve.epochs.tolist(), curve.updates.tolist()) == ([2.0], [20.0])
    assert np.allclose([curve.mean[0], curve.low[0], curve.high[0]], [0.8, 0.7, 0.9])


def test_a_metric_that_a_group_lacks_has_no_points() -> None:
    assert evaluated(Group("a", [run([1.0], {1.0: 0.5})]), "perplexity").mean.size == 0
    assert evaluated(Group("a", [run([1.0])]), "accuracy").mean.size == 0


def test_stairs_have_a_point_at_each_change_and_at_the_end() -> None:
    epochs, values = stairs(np.array([0.0, 1.0, 2.0, 3.0, 4.0]), np.array([5.0, 5.0, 7.0, 7.0]))
    assert (epochs.tolist(), values.tolist()) == ([0, 2, 4], [5, 7, 7])
