"""What a worker says it is at."""

from __future__ import annotations

import time

import pytest

from elastic_batch.engines import Standing


def test_announced_work_has_less_and_less_time_and_what_surrounds_it_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    standing = Standing()
    assert standing.busy_seconds == 0
    with standing.busy(100):
        now += 30
        assert standing.busy_seconds == 70
        with standing.busy(10):
            assert standing.busy_seconds == 70
        with standing.busy(80):
            assert standing.busy_seconds == 80
        assert standing.busy_seconds == 70
        now += 100
        assert standing.busy_seconds == 0
    assert standing.busy_seconds == 0
