"""Prometheus metrics of a run."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from elastic_batch.telemetry import Metrics

RECORD: dict[str, Any] = {
    "kind": "update", "update": 3, "position": 160, "epoch": 0.5, "phase": 1, "global_batch_size": 96,
    "num_micro_batches": 3, "learning_rate": 0.1, "momentum": 0.9, "noise_scale": 12.5, "measured_noise_scale": None,
    "gradient_square": 2.0, "gradient_variance": 3.0, "loss": 1.25, "weight": 96.0, "gradient_norm": 0.5,
    "seconds": 0.02, "samples_per_second": 4800.0, "world_size": 2, "generation": 4, "time": 1.7e9,
}  # fmt: skip


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"elastic_batch_{name}", {"run": "digits", **labels})


def test_an_update_sets_the_gauges_and_counts(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry, run="digits")
    metrics.resume(64)
    metrics.update(RECORD)
    gauges = {
        "position_samples": 160, "epoch": 0.5, "phase": 1, "global_batch_samples": 96, "micro_batches": 3,
        "learning_rate": 0.1, "momentum": 0.9, "noise_scale": 12.5, "gradient_square": 2, "gradient_variance": 3,
        "loss": 1.25, "gradient_norm": 0.5, "samples_per_second": 4800, "generation": 4, "accumulation_steps": 2,
    }  # fmt: skip
    assert {name: value(registry, name) for name in gauges} == gauges
    assert math.isnan(value(registry, "measured_noise_scale") or 0)
    assert value(registry, "updates_total") == 1
    assert value(registry, "samples_total") == 96
    assert value(registry, "skipped_updates_total") == 0
    assert value(registry, "update_seconds_sum") == 0.02
    assert value(registry, "update_seconds_bucket", le="0.03") == 1
    assert value(registry, "workers", state="active") == 2
    assert value(registry, "workers", state="spare") == 0


def test_gauges_are_absent_until_their_value_is_known(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry, run="digits")
    assert value(registry, "loss") is None
    metrics.resume(0)
    assert value(registry, "loss") is None
    assert value(registry, "updates_total") == 0


def test_workers_beyond_the_micro_batches_are_spares(registry: CollectorRegistry) -> None:
    Metrics(registry, run="digits").update(RECORD | {"world_size": 5})
    assert value(registry, "workers", state="active") == 3
    assert value(registry, "workers", state="spare") == 2
    assert value(registry, "accumulation_steps") == 1


def test_skipped_and_repeated_updates_are_counted(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry, run="digits")
    metrics.resume(64)
    metrics.update(RECORD | {"skipped": True})
    metrics.repeated()
    metrics.update(RECORD)
    assert value(registry, "skipped_updates_total") == 1
    assert value(registry, "repeated_updates_total") == 2
    assert value(registry, "updates_total") == 2
    assert value(registry, "samples_total") == 96 + 96


def test_steps_of_an_update_are_kept_apart(registry: CollectorRegistry) -> None:
    Metrics(registry, run="digits").update(RECORD | {"step_seconds": {"compute": 0.015, "reduce": 0.005}})
    assert value(registry, "update_step_seconds_sum", step="compute") == 0.015
    assert value(registry, "update_step_seconds_count", step="reduce") == 1
    assert value(registry, "update_seconds_count") == 1


def test_evaluations_are_gauges_by_metric(registry: CollectorRegistry) -> None:
    Metrics(registry, run="digits").evaluation({"kind": "evaluation", "metrics": {"accuracy": 0.97, "loss": None}})
    assert value(registry, "evaluation", metric="accuracy") == 0.97
    assert math.isnan(value(registry, "evaluation", metric="loss") or 0)


def test_checkpoints_have_seconds_bytes_and_an_age_that_grows(registry: CollectorRegistry) -> None:
    now = 1000.0
    metrics = Metrics(registry, run="digits", clock=lambda: now)
    assert value(registry, "checkpoints_total", result="saved") == 0
    metrics.checkpoint_found(num_bytes=10, position=32, created_seconds=400.0)
    assert value(registry, "checkpoint_age_seconds") == 600
    assert value(registry, "checkpoints_total", result="saved") == 0
    metrics.checkpoint_saved(seconds=0.5, num_bytes=20, position=64, created_seconds=990.0)
    metrics.happened({"kind": "checkpoint blocked", "seconds": 0.002})
    for result in ("failed", "superseded"):
        metrics.happened({"kind": "checkpoint", "result": result})
    now = 1010.0
    assert value(registry, "checkpoint_age_seconds") == 20
    assert value(registry, "checkpoint_bytes") == 20
    assert value(registry, "checkpoint_position_samples") == 64
    assert value(registry, "checkpoint_seconds_sum") == 0.5
    assert value(registry, "checkpoint_blocked_seconds_sum") == 0.002
    assert [value(registry, "checkpoints_total", result=result) for result in ("saved", "failed", "superseded")] == [
        1,
        1,
        1,
    ]


def test_lost_samples_are_read_from_the_ledger_when_asked_for(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry, run="digits")
    metrics.watch_ledger(lambda position: position - 100)
    metrics.update(RECORD)
    assert value(registry, "lost_samples") == 60


def test_names_have_the_prefix_the_run_and_no_unbounded_label(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry, run="digits")
    metrics.update(RECORD)
    text = generate_latest(registry).decode()
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.match(r'elastic_batch_\w+\{[^}]*run="digits"', line) for line in samples)
    assert {name for line in samples for name in re.findall(r'(\w+)="', line)} <= {
        "run", "state", "metric", "step", "result", "le", "version", "torch", "python",
    }  # fmt: skip
    assert "elastic_batch_build_info{" in text


def test_every_metric_is_in_the_documentation(registry: CollectorRegistry) -> None:
    Metrics(registry, run="digits")
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    families = list(registry.collect())
    counters = {family.name + "_total" for family in families if family.type == "counter"}
    names = counters | {family.name for family in families if family.type in {"gauge", "histogram"}}
    missing = {name for name in names if f"`{name}`" not in page and f"`{name}{{" not in page}
    assert not missing
