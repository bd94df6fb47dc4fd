"""Faults happen where and when a plan says, and only there."""

from __future__ import annotations

import time

import pytest

from elastic_batch import failpoints
from elastic_batch.errors import InvalidSetting, UnknownName
from elastic_batch.failpoints import Fault


def test_a_fault_happens_at_its_place_at_its_count() -> None:
    failpoints.plan("form.start:2=slow,0.2")
    started = time.monotonic()
    failpoints.reach("form.start")
    failpoints.reach("form.done")
    failpoints.reach("form.done")
    assert time.monotonic() - started < 0.1
    failpoints.reach("form.start")
    assert time.monotonic() - started > 0.19
    failpoints.reach("form.start")
    assert time.monotonic() - started < 0.35
    failpoints.plan("")


def test_a_partition_goes_to_whoever_holds_the_connection() -> None:
    asked: list[float] = []
    failpoints.on_partition(asked.append)
    failpoints.plan("commit.start:1=partition,3")
    failpoints.reach("commit.start")
    failpoints.plan("")
    assert asked == [3.0]


@pytest.mark.parametrize("text", ["form.start", "form.start=kill", "form.start:x=kill", "form.start:1=kill,soon"])
def test_a_plan_that_cannot_be_read_says_what_it_should_look_like(text: str) -> None:
    with pytest.raises(InvalidSetting, match="PLACE:COUNT=ACTION"):
        Fault.parse(text)


def test_unknown_places_and_faults_name_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"form\.start"):
        Fault.parse("form.strat:1=kill")
    with pytest.raises(UnknownName, match="kill"):
        Fault.parse("form.start:1=kil")
