"""Which jobs may go on from a checkpoint."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from elastic_batch.checkpoint import check_fingerprint
from elastic_batch.errors import InvalidSetting, JobDiffers

SAVED: dict[str, Any] = {
    "seed": 1,
    "schedule": {"strategy": "grow-batch", "milestones": ["60ep", "120ep"], "factor": 5},
    "clip": math.inf,
    "end": 1000,
}


def check(current: dict[str, Any], position: int = 500) -> None:
    check_fingerprint(json.loads(json.dumps(SAVED)) | {"clip": None}, current, where="runs/a", position=position)


def test_the_same_settings_agree_after_a_journey_through_json() -> None:
    check({**SAVED, "schedule": {**SAVED["schedule"], "milestones": ("60ep", "120ep")}})


def test_every_difference_is_named_with_both_values() -> None:
    with pytest.raises(JobDiffers) as refused:
        check(
            {"seed": 2, "schedule": {"strategy": "hybrid", "milestones": ["60ep", "120ep"]}, "clip": None, "mixup": 0.2}
        )
    assert refused.value.differences == {
        "seed": (1, 2),
        "schedule.strategy": ("grow-batch", "hybrid"),
        "schedule.factor": (5, "(not set)"),
        "mixup": ("(not set)", 0.2),
    }
    assert "runs/a" in str(refused.value)
    assert "schedule.strategy: 'grow-batch' there, 'hybrid' now" in str(refused.value)


@pytest.mark.parametrize("end", [500, 999, 1000, 5000])
def test_the_length_may_change_as_long_as_it_does_not_end_before_the_position(end: int) -> None:
    check(SAVED | {"end": end})


def test_a_length_that_ends_before_the_position_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="must not end before the position of runs/a, 500 samples"):
        check(SAVED | {"end": 499})
