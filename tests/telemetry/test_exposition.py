"""Metrics over HTTP and in a text file."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge

from elastic_batch.errors import InvalidSetting
from elastic_batch.telemetry import MetricsFile, serve


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("elastic_batch_epoch", "Position in epochs", registry=registry).set(1.5)
    return registry


def test_metrics_are_served_on_loopback_until_closed(registry: CollectorRegistry) -> None:
    with serve(registry, 0) as server:
        assert server.url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(server.url, timeout=5) as answer:
            assert "elastic_batch_epoch 1.5" in answer.read().decode()
    serve(registry, server.port).close()


@pytest.mark.parametrize("port", [-1, 70000])
def test_a_port_that_does_not_exist_is_refused(registry: CollectorRegistry, port: int) -> None:
    with pytest.raises(InvalidSetting, match=r"metrics_port = .*must be a free port on 127\.0\.0\.1"):
        serve(registry, port)


def test_a_port_that_is_taken_is_refused(registry: CollectorRegistry) -> None:
    with serve(registry, 0) as server, pytest.raises(InvalidSetting, match="Choose another, or 0 for any"):
        serve(registry, server.port)


def test_a_text_file_is_written_no_more_often_than_asked_and_whole(registry: CollectorRegistry, tmp_path: Path) -> None:
    now = 0.0
    path = tmp_path / "elastic_batch.prom"
    file = MetricsFile(registry, path, interval_seconds=10, clock=lambda: now)
    file.maybe_write()
    assert "elastic_batch_epoch 1.5" in path.read_text()
    path.unlink()
    now = 9.0
    file.maybe_write()
    assert not path.exists()
    now = 10.0
    file.maybe_write()
    assert [entry.name for entry in tmp_path.iterdir()] == ["elastic_batch.prom"]


def test_a_text_file_that_the_collector_would_pass_over_is_refused(registry: CollectorRegistry, tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"must end with \.prom"):
        MetricsFile(registry, tmp_path / "metrics.txt")


def test_a_text_file_that_cannot_be_written_is_told_once_a_minute(
    registry: CollectorRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Asked twice in a writing that fails: for the next writing, and for the next complaint.
    times = iter([0.0, 0.0, 0.0, 30.0, 30.0, 59.0, 59.0, 61.0, 61.0, 61.0])
    file = MetricsFile(registry, tmp_path / "nowhere" / "m.prom", clock=lambda: next(times))
    for _ in range(4):
        file.write()
    assert caplog.text.count("cannot write metrics") == 2
