"""Run directories."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_batch.errors import RunDirectoryMissing, RunDirectoryUsed
from elastic_batch.job import parse_yaml
from elastic_batch.rundir import (
    Commit,
    RunDirectory,
    directory,
    is_used,
    read_evaluations,
    read_job,
    read_metrics,
    read_run_id,
    read_run_ledger,
    read_summary,
)

JOB = {"name": "digits", "schedule": {"strategy": "grow-batch", "milestones": ["10ep"]}, "workers": 1}


def update(number: int, loss: float) -> dict[str, Any]:
    return {"kind": "update", "update": number, "position": 32 * number, "loss": loss}


@pytest.mark.parametrize("name", ["1e3", "no", "12:30", "0x10", "null"])
def test_a_job_is_written_as_job_files_are_read(name: str, tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, {"name": name}):
        pass
    assert parse_yaml((tmp_path / "job.yaml").read_text(), "job.yaml") == read_job(tmp_path) == {"name": name}


def test_a_run_leaves_its_job_its_logs_and_its_summary(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "runs" / "a", JOB) as run:
        for number in (1, 2):
            run.commit(Commit(number, 32 * number - 32, 32 * number, generation=0))
            run.record(update(number, 1 / number))
        run.record({"kind": "evaluation", "update": 2, "metrics": {"accuracy": float("nan")}})
        run.sync()
        assert run.lost_samples(64) == 0
        assert run.lost_samples(96) == 32
        run.summarize({"updates": 2, "finished": True, "loss": float("inf")})
        assert run.checkpoints == tmp_path / "runs" / "a" / "checkpoints"
    path = tmp_path / "runs" / "a"
    assert sorted(file.name for file in path.iterdir()) == [
        "job.yaml", "ledger.jsonl", "metrics.jsonl", "run.json", "summary.json",
    ]  # fmt: skip
    assert read_job(path) == JOB
    assert [record["loss"] for record in read_metrics(path)] == [1.0, 0.5]
    assert [record["metrics"] for record in read_evaluations(path)] == [{"accuracy": None}]
    assert read_run_ledger(path).ranges == [(0, 64)]
    assert read_summary(path) == {"updates": 2, "finished": True, "loss": None}
    assert read_run_id(path) == run.run_id


def test_a_resumed_run_keeps_its_name_appends_and_repeats_its_last_updates(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, JOB) as first:
        for number in (1, 2, 3):
            first.record(update(number, 1.0))
    with RunDirectory.resume(tmp_path, {**JOB, "workers": 4}) as second:
        assert second.run_id == first.run_id
        for number in (2, 3, 4):
            second.record(update(number, 2.0))
    assert [(record["update"], record["loss"]) for record in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 2.0),
        (4, 2.0),
    ]
    assert read_job(tmp_path)["workers"] == 4


def test_evaluations_after_one_update_are_one_record(tmp_path: Path) -> None:
    def evaluation(number: int, **metrics: float) -> dict[str, Any]:
        return {"kind": "evaluation", "update": number, "position": 32 * number, "metrics": metrics}

    with RunDirectory.create(tmp_path, JOB) as run:
        for record in (
            evaluation(2, accuracy=0.5),
            evaluation(2, averaged=0.6),
            {**evaluation(3, accuracy=0.1, averaged=0.1), "position": 100},
            evaluation(3, accuracy=0.7),
            evaluation(2, accuracy=0.4),
        ):
            run.record(record)
    assert [(record["update"], record["metrics"]) for record in read_evaluations(tmp_path)] == [
        (2, {"accuracy": 0.4, "averaged": 0.6}),
        (3, {"accuracy": 0.7}),
    ]


def test_a_fresh_run_is_refused_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    assert not is_used(tmp_path)
    RunDirectory.create(tmp_path, JOB).close()
    assert is_used(tmp_path)
    with pytest.raises(RunDirectoryUsed, match=r"already holds a run\. Resume it"):
        RunDirectory.create(tmp_path, JOB)


@pytest.mark.parametrize(
    "trace", ["metrics.jsonl", "ledger.jsonl", "summary.json", "checkpoints/000000000001-g0-0123456789ab.json"]
)
def test_what_is_left_of_a_run_counts_as_one_and_gets_a_new_name(tmp_path: Path, trace: str) -> None:
    (tmp_path / trace).parent.mkdir(exist_ok=True)
    (tmp_path / trace).write_text("{}\n")
    with pytest.raises(RunDirectoryUsed):
        RunDirectory.create(tmp_path, JOB)
    with RunDirectory.resume(tmp_path, JOB) as run:
        assert read_run_id(tmp_path) == run.run_id


def test_a_creation_that_was_interrupted_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: x")
    (tmp_path / "checkpoints").mkdir()
    RunDirectory.create(tmp_path, JOB).close()
    assert read_job(tmp_path) == JOB


def test_where_there_is_no_run_one_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryMissing, match=r"there is no run in .*nowhere"):
        RunDirectory.resume(tmp_path / "nowhere", JOB)
    with pytest.raises(RunDirectoryMissing, match="does not see the same file system"):
        read_run_id(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(RunDirectoryMissing):
        read_run_id(tmp_path)


def test_readers_find_nothing_where_nothing_was_written(tmp_path: Path) -> None:
    assert read_job(tmp_path) == {}
    assert read_summary(tmp_path) == {}
    assert list(read_metrics(tmp_path)) == []
    assert read_run_ledger(tmp_path).ranges == []
    (tmp_path / "summary.json").write_text("{torn")
    (tmp_path / "job.yaml").write_text("- a list")
    assert read_summary(tmp_path) == read_job(tmp_path) == {}


def test_a_summary_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with RunDirectory.create(tmp_path, JOB) as run:
        monkeypatch.setattr(directory, "write_file", full)
        run.summarize({"updates": 1})
    assert "cannot write the summary" in caplog.text


def test_the_next_writer_adds_what_a_killed_one_owed(tmp_path: Path) -> None:
    commits = [Commit(number, 32 * number - 32, 32 * number, generation=number // 4) for number in range(1, 8)]
    with RunDirectory.create(tmp_path, {}) as killed:
        for commit in commits[:3]:
            killed.commit(commit)
    with RunDirectory.resume(tmp_path, {}) as run:
        run.complete([*commits[1:6], *commits[2:6]])
        run.commit(commits[6])
        run.complete(commits)
    ledger = read_run_ledger(tmp_path)
    assert (ledger.updates, ledger.repeated_updates, ledger.ranges) == (7, 0, [(0, 224)])
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 7


_WRITER = """
import sys
from elastic_batch.rundir import Commit, RunDirectory, is_used
path = sys.argv[1]
run = RunDirectory.resume(path, {}) if is_used(path) else RunDirectory.create(path, {})
update = 0
while True:
    update += 1
    run.commit(Commit(update, 32 * update - 32, 32 * update, generation=0))
    run.record({"kind": "update", "update": update, "loss": 1.0})
    run.flush()
    sys.stdout.write(f"{update}\\n")
    sys.stdout.flush()
"""


def test_every_line_that_was_flushed_survives_a_kill(tmp_path: Path) -> None:
    for trial in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        with writer.stdout as told:
            for _ in range(50 + 17 * trial):
                told.readline()
            writer.send_signal(signal.SIGKILL)
            last = max(int(line) for line in ["0", *told.read().split()])
        assert writer.wait(timeout=20) == -signal.SIGKILL
        ledger = read_run_ledger(tmp_path)
        assert ledger.lost(32 * last) == 0
        assert [record["update"] for record in read_metrics(tmp_path)][:last] == list(range(1, last + 1))
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1])
