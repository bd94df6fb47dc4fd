"""What this machine has for workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_batch.errors import InvalidSetting
from elastic_batch.scaling.machine import (
    WorkerRange,
    num_cores,
    require_gpu_each,
    shared_settings,
    visible_gpus,
    worker_settings,
)


@pytest.mark.parametrize("text", ["", "a", "1:", ":2", "-1", "1:2:3", "1.5"])
def test_what_is_no_range_of_workers_is_refused(text: str) -> None:
    with pytest.raises(InvalidSetting, match=r"--workers = .*must be MIN:MAX or N, as in 1:4"):
        WorkerRange.parse(text)


@pytest.mark.parametrize(
    ("text", "rule"), [("0", "must be at least 1"), ("0:2", "must be at least 1"), ("3:2", "with MIN not above MAX")]
)
def test_what_is_wrong_with_a_range_of_workers_is_said(text: str, rule: str) -> None:
    with pytest.raises(InvalidSetting, match=f"--workers = '{text}': .*{rule}$"):
        WorkerRange.parse(text)


def test_gpus_are_those_that_the_user_chose() -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, MIG-a"}) == ["2", "MIG-a"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []


def test_without_a_choice_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({}) == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-a)'\necho '  MIG 1g: b'\necho 'GPU 1: A (UUID: GPU-c)'\n")
    tool.chmod(0o755)
    assert visible_gpus({}) == ["0", "1"]


def test_workers_do_not_share_a_gpu() -> None:
    require_gpu_each(2, ["0", "1"], "--workers")
    require_gpu_each(8, [], "--workers")
    with pytest.raises(InvalidSetting, match="--workers = 3: must be at most 2, the number of GPUs"):
        require_gpu_each(3, ["0", "1"], "--workers")


def test_each_worker_sees_its_own_gpu() -> None:
    assert worker_settings(1, ["0", "3"]) == {"CUDA_VISIBLE_DEVICES": "3"}
    assert worker_settings(1, []) == {}


def test_cores_are_divided_unless_the_user_did_that() -> None:
    assert shared_settings({}, 1) == {"OMP_NUM_THREADS": str(num_cores())}
    assert shared_settings({}, 10_000) == {"OMP_NUM_THREADS": "1"}
    assert shared_settings({"OMP_NUM_THREADS": "3"}, 1) == {}
