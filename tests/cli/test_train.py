"""`elastic-batch train`: runs, their ends, resumption, signals, several workers."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.holders import other_process

from elastic_batch.cli.main import EXIT_RESUMABLE, main
from elastic_batch.cli.train import _print_end
from elastic_batch.job import load_job
from elastic_batch.rundir import read_metrics
from elastic_batch.workloads.planning import plan_job
from elastic_batch.workloads.recipe_book import find_job_file

SMALL = [
    "--max-duration",
    "256sp",
    "--set",
    "schedule.milestones=[64sp, 128sp]",
    "--set",
    "model.args={width: 2}",
    "--set",
    "checkpoint.every=64sp",
]


def train(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    assert main(["train", "digits", *arguments], {}) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_ends_with_accuracy_updates_saved_and_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = train(capsys, *SMALL, "--run-dir", str(tmp_path / "run"))
    assert "test accuracy 0." in out
    assert "4 updates; plain decay needs 8 (50% saved)" in out
    assert str(tmp_path / "run") in out
    assert "batch norms became ghost batch norms" in err
    assert {"job.yaml", "metrics.jsonl", "ledger.jsonl", "checkpoints", "summary.json"} <= set(
        os.listdir(tmp_path / "run")
    )


def test_the_job_as_resolved_is_itself_a_job_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(capsys, *SMALL, "--run-dir", str(tmp_path / "run"), "--seed", "3")
    job = load_job(tmp_path / "run" / "job.yaml")
    assert (job.seed, str(job.schedule.max_duration), job.model.args) == (3, "256sp", {"width": 2})


def test_for_programs_it_ends_with_a_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = train(
        capsys, *SMALL, "--run-dir", str(tmp_path / "run"), "--strategy", "decay-lr", "--seed", "4", "--json"
    )
    summary = json.loads(out)
    assert (summary["updates"], summary["baseline_updates"], summary["seed"]) == (8, 8, 4)
    assert (summary["strategy"], summary["finished"]) == ("decay-lr", True)
    assert summary["metrics"].keys() == {"loss", "accuracy"}


def test_a_run_that_diverged_ends_with_valid_json(capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"updates": 1, "baseline_updates": 1, "finished": True, "metrics": {"loss": math.nan, "accuracy": 0.1}}
    _print_end(summary, plan_job(load_job(find_job_file("digits"))), "runs/a", "again", as_json=True)
    assert json.loads(capsys.readouterr().out)["metrics"] == {"loss": None, "accuracy": 0.1}


def test_for_programs_the_command_that_resumes_is_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"updates": 1, "baseline_updates": 1, "finished": False, "metrics": {}}
    _print_end(summary, plan_job(load_job(find_job_file("digits"))), "runs/a", "again", as_json=True)
    captured = capsys.readouterr()
    assert captured.err == "Resume with:\n  again\n"
    assert json.loads(captured.out)["finished"] is False


def test_a_place_for_checkpoints_that_cannot_be_written_to_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    place = f"checkpoint.location={tmp_path / 'file'}"
    _, err = train(capsys, *SMALL, "--run-dir", str(tmp_path / "run"), "--set", place, code=2)
    assert "must be a directory that can be written to" in err
    assert not (tmp_path / "run").exists()


def test_the_run_directory_is_named_after_job_and_strategy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train(capsys, *SMALL)
    train(capsys, *SMALL, "--strategy", "hybrid")
    assert sorted(os.listdir(tmp_path / "runs")) == ["digits", "digits-hybrid"]


def test_evaluations_come_at_their_interval_and_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(capsys, *SMALL, "--run-dir", str(tmp_path), "--set", "evaluation.every=96sp")
    positions = [line["position"] for line in lines(tmp_path) if line["kind"] == "evaluation"]
    assert positions == [128, 256]
    train(capsys, *SMALL, "--run-dir", str(tmp_path / "end"), "--set", "evaluation.every=null")
    assert [line["position"] for line in lines(tmp_path / "end") if line["kind"] == "evaluation"] == [256]


def test_a_used_run_directory_is_refused_and_resumed_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--run-dir", str(tmp_path / "run")]
    train(capsys, *arguments)
    _, err = train(capsys, *arguments, code=2)
    assert "already holds a run" in err
    out, _ = train(capsys, *arguments, "--resume", "auto")
    assert "test accuracy" in out


def test_a_used_run_directory_is_refused_before_the_model_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_batch.workloads.build.build_workload", None)
    (tmp_path / "run.json").write_text("{}")
    _, err = train(capsys, "--run-dir", str(tmp_path), code=2)
    assert "already holds a run" in err


def test_what_is_left_of_a_launcher_is_named_before_the_model_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_batch.workloads.build.build_workload", None)
    assert main(["train", "digits", "--run-dir", str(tmp_path / "run")], {"WORLD_SIZE": "2"}) == 2
    assert "RANK = None: must be a whole number. torchrun sets it" in capsys.readouterr().err


def test_a_run_directory_in_which_another_process_trains_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_batch.rundir.hold.PATIENCE_SECONDS", 0.1)
    arguments = [*SMALL, "--run-dir", str(tmp_path / "run"), "--resume", "auto"]
    with other_process(tmp_path / "run") as process:
        _, err = train(capsys, *arguments, code=2)
    assert f"is in use by process {process.pid}" in err
    train(capsys, *arguments)


def test_a_finished_run_can_be_prolonged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--run-dir", str(tmp_path / "run"), "--json"]
    train(capsys, *arguments)
    out, _ = train(capsys, *arguments, "--resume", "auto", "--max-duration", "384sp")
    assert json.loads(out)["samples"] == 384


def test_a_run_of_many_steps_can_be_prolonged_by_more_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = "schedule={strategy: convert, global_batch_size: 64, max_duration: 256sp, "
    steps += "shape: {name: step, every: 64sp, gamma: 0.5}}"
    width = ("--set", "model.args={width: 2}")
    arguments = ["--set", steps, *width, "--run-dir", str(tmp_path / "run"), "--json"]
    train(capsys, *arguments)
    out, _ = train(capsys, *arguments, "--resume", "auto", "--max-duration", "384sp")
    assert json.loads(out)["samples"] == 384
    _, err = train(capsys, *arguments, "--resume", "auto", "--set", steps.replace("64sp,", "96sp,"), code=2)
    assert "schedule.shape.every: '64sp' there, '96sp' now" in err


def test_what_a_job_says_of_its_own_optimizer_holds_in_training_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = "optimizer={target: 'torch.optim:RMSprop', args: {alpha: 0.9}, learning_rate: 1e-3, adaptive: true}"
    run_dir = ("--run-dir", str(tmp_path / "run"))
    out, _ = train(capsys, *SMALL, *run_dir, "--set", optimizer, "--set", "schedule.rule=sqrt", "--json")
    assert json.loads(out)["samples"] == 256


def test_another_job_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--run-dir", str(tmp_path / "run")]
    train(capsys, *arguments)
    _, err = train(capsys, *arguments, "--resume", "auto", "--seed", "7", code=2)
    assert "seed: 0 there, 7 now" in err
    _, err = train(capsys, *arguments, "--resume", "auto", "--set", "model.args={width: 3}", code=2)
    assert "job.model.args.width: 2 there, 3 now" in err
    milestones = ("--set", "schedule.milestones=[64sp, 160sp]")
    _, err = train(capsys, *arguments, "--resume", "auto", *milestones, code=2)
    assert "job.schedule.milestones: ['64sp', '128sp'] there, ['64sp', '160sp'] now" in err


def test_another_jobs_checkpoint_is_not_taken_and_none_goes_on_among_another_jobs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    train(capsys, *SMALL, "--run-dir", first)
    train(capsys, *SMALL, "--run-dir", second, "--seed", "7")
    before = {path: path.read_bytes() for path in Path(first).rglob("*") if path.is_file()}
    _, err = train(capsys, *SMALL, "--run-dir", str(tmp_path / "new"), "--resume", second, code=2)
    assert f"{second} belongs to another job (seed: 7 there, 0 now)" in err
    _, err = train(capsys, *SMALL, "--run-dir", first, "--resume", second, "--seed", "7", code=2)
    assert f"{first}/checkpoints belongs to another job (seed: 0 there, 7 now)" in err
    assert {path: path.read_bytes() for path in Path(first).rglob("*") if path.is_file()} == before
    train(capsys, *SMALL, "--run-dir", second, "--resume", second, "--seed", "7")


def test_a_job_that_cannot_run_fails_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = train(capsys, "--run-dir", str(tmp_path / "run"), "--set", "schedule.global_batch_size=48", code=2)
    assert "multiple of micro_batch_size" in err
    assert not (tmp_path / "run").exists()


def test_missing_data_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "fashion-mnist", "--set", f"data.root={tmp_path}", "--run-dir", str(tmp_path / "run")]
    assert main(arguments, {}) == 2
    assert "dataset-fashion-mnist" in capsys.readouterr().err


def test_an_unknown_logger_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    _, err = train(capsys, "--log", "tensorbord", code=2)
    assert "Did you mean 'tensorboard'?" in err


def wait_for_updates(run_dir: Path, process: subprocess.Popen[str], number: int) -> None:
    deadline = time.monotonic() + 90
    while not (run_dir / "ledger.jsonl").is_file() or (run_dir / "ledger.jsonl").read_bytes().count(b"\n") < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_signal_stops_after_an_update_and_the_printed_command_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    job = ["train", "digits", "--set", "model.args={width: 2}", "--set", "schedule.milestones=[]"]
    arguments = [*job, "--run-dir", str(run_dir), "--max-duration", "999ep"]
    command = [sys.executable, "-m", "elastic_batch", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_updates(run_dir, process, 3)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_RESUMABLE, err
    stopped = json.loads((run_dir / "summary.json").read_text())["updates"]
    assert f"Stopped after update {stopped} (SIGTERM)" in out
    printed = shlex.split(out.splitlines()[-1])
    assert printed == ["elastic-batch", *job, "--max-duration", "999ep", "--run-dir", str(run_dir), "--resume", "auto"]
    resumed = [*printed[1:], "--max-duration", f"{32 * (stopped + 2)}sp", "--json"]
    assert main(resumed, {}) == 0
    assert json.loads(capsys.readouterr().out)["updates"] == stopped + 2
    updates = [line["update"] for line in lines(run_dir) if line["kind"] == "update"]
    assert updates == list(range(1, stopped + 3))


@pytest.mark.timeout(300)  # two starts of two workers, on a machine that may have other work
def test_workers_that_torchrun_starts_again_end_as_one_worker_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, "-m", *launcher, "-m", "elastic_batch", "train", "digits"]
    arguments = [*SMALL, "--json", "--run-dir"]
    # By the fourth update the checkpoint after the second is written; the second start has no fourth.
    faults = {"ELASTIC_BATCH_FAULTS": "reduce.start:3=slow,2;reduce.start:4=kill"}
    done = subprocess.run(
        [*command, *arguments, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **faults},
    )
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stderr
    two = json.loads(done.stdout)
    one = json.loads(train(capsys, *arguments, str(tmp_path / "one"))[0])
    assert (two["updates"], two["samples"]) == (one["updates"], one["samples"])
    # The killed start may have written down updates that the next one repeated: the last line counts, as for a report.
    losses = [{line["update"]: line["loss"] for line in read_metrics(tmp_path / run)} for run in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-2)
