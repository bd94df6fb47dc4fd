"""What Prometheus reads of an elastic run, across restarts and repeated updates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from elastic_batch.coordinator.metrics import WorldMetrics
from elastic_batch.coordinator.rescale import Rescale
from elastic_batch.coordinator.state import MembershipConfig, State, Worker
from elastic_batch.rundir import Commit, RunDirectory, open_run_ledger


def _record(update: int, **fields: Any) -> dict[str, Any]:
    return {
        "update": update,
        "position": 8 * update,
        "global_batch_size": 8,
        "num_micro_batches": 2,
        "world_size": 2,
        "seconds": 0.1,
        **fields,
    }


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def _value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"elastic_batch_{name}", {"run": "r", **labels})


def test_updates_between_two_reports_are_counted(registry: CollectorRegistry) -> None:
    metrics = WorldMetrics(registry, run="r")
    for update in (3, 10):
        metrics.take(_record(update, loss=0.5), 0)
    assert _value(registry, "updates_total") == 10
    assert _value(registry, "samples_total") == 80
    assert _value(registry, "position_samples") == 80
    assert _value(registry, "loss") == 0.5


def test_updates_that_are_done_again_are_counted_as_repeated(registry: CollectorRegistry) -> None:
    metrics = WorldMetrics(registry, run="r")
    for update in (10, 8, 9):
        metrics.take(_record(update), 0)
    assert _value(registry, "updates_total") == 12
    assert _value(registry, "repeated_updates_total") == 3
    metrics.happened({"kind": "repeated", "updates": 1})
    assert _value(registry, "repeated_updates_total") == 4


def test_samples_that_no_line_of_the_ledger_commits_show(registry: CollectorRegistry, tmp_path: Path) -> None:
    metrics = WorldMetrics(registry, run="r", ledger=open_run_ledger(tmp_path))
    found = _value(registry, "lost_samples")
    assert found is not None
    assert math.isnan(found)
    with RunDirectory.create(tmp_path, {}) as run:
        run.commit(Commit(1, 0, 8, generation=1))
        run.flush()
        metrics.take(_record(4), 0)
        assert _value(registry, "lost_samples") == 0
        run.commit(Commit(4, 24, 32, generation=2))
    assert _value(registry, "lost_samples") == 16


def test_updates_that_were_skipped_between_two_reports_are_counted(registry: CollectorRegistry) -> None:
    metrics = WorldMetrics(registry, run="r")
    metrics.take(_record(5), 3)
    metrics.take(_record(9), 1)
    assert _value(registry, "skipped_updates_total") == 4


def test_checkpoints_and_evaluations_outlive_the_coordinator(registry: CollectorRegistry) -> None:
    first = WorldMetrics(CollectorRegistry(), run="r")
    for result in ("failed", "saved", "saved"):
        found = {"seconds": 0.1, "num_bytes": 20, "position": 64, "created_seconds": 990.0} if result == "saved" else {}
        first.happened({"kind": "checkpoint", "result": result, **found})
    second = WorldMetrics(registry, run="r")
    second.resume(first.totals, {})
    second.happened({"kind": "checkpoint", "result": "superseded"})
    second.happened({"kind": "evaluation", "metrics": {"accuracy": 0.5}})
    counts = [_value(registry, "checkpoints_total", result=result) for result in ("saved", "failed", "superseded")]
    assert counts == [2, 1, 1]
    assert _value(registry, "checkpoint_bytes") == 20
    assert _value(registry, "checkpoint_position_samples") == 64
    assert _value(registry, "evaluation", metric="accuracy") == 0.5


@pytest.mark.parametrize("record", [{}, {"kind": "nonsense"}, {"kind": "checkpoint"}, {"kind": "checkpoint found"}])
def test_a_report_that_is_not_as_it_should_be_is_refused(registry: CollectorRegistry, record: dict[str, str]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        WorldMetrics(registry, run="r").happened(record)


def test_a_restart_resets_no_counter(registry: CollectorRegistry) -> None:
    first = WorldMetrics(CollectorRegistry(), run="r")
    first.take(_record(5), 0)
    first.rescaled("loss", {"detect": 0.1})
    second = WorldMetrics(registry, run="r")
    second.resume(first.totals, _record(5))
    second.take(_record(7), 0)
    assert _value(registry, "updates_total") == 7
    assert _value(registry, "rescales_total", cause="loss") == 1
    assert _value(registry, "rescales_total", cause="join") == 0


def test_workers_are_counted_by_state(registry: CollectorRegistry) -> None:
    metrics = WorldMetrics(registry, run="r")
    workers = {name: Worker(name, name, ready=name == "b") for name in "abc"}
    state = State(workers=workers, generation=4, num_micro_batches=2)
    text = metrics.read(0.0, state, MembershipConfig(max_workers=8, spares=1)).decode()
    assert 'elastic_batch_workers{run="r",state="joining"} 2.0' in text
    assert 'elastic_batch_workers{run="r",state="standby"} 1.0' in text
    assert 'elastic_batch_workers{run="r",state="active"} 0.0' in text
    assert 'elastic_batch_desired_workers{run="r"} 3.0' in text
    assert 'elastic_batch_generation{run="r"} 4.0' in text


def test_a_rescale_is_told_apart_into_its_steps() -> None:
    rescale = Rescale()
    rescale.noticed(1.0)
    rescale.noticed(1.5)
    rescale.decided(2.0, "loss")
    rescale.forms(5.0, "retry")
    rescale.synced(0.25)
    rescale.synced(0.5)
    assert rescale.is_forming
    assert rescale.trains(9.0) == ("loss", {"detect": 1.0, "agree": 3.0, "form": 3.5, "sync": 0.5})
    assert not rescale.is_under_way
    rescale.forms(10.0, "join")
    assert rescale.trains(11.0) == ("join", {"detect": 0.0, "agree": 0.0, "form": 1.0, "sync": 0.0})


def test_a_world_that_fails_to_form_counts_once_with_its_first_cause() -> None:
    rescale = Rescale()
    rescale.forms(1.0, "join")
    rescale.decided(2.0, "loss")
    rescale.forms(3.0, "retry")
    assert rescale.trains(4.0) == ("loss", {"detect": 0.0, "agree": 2.0, "form": 1.0, "sync": 0.0})
