"""`elastic-batch plan`: the JSON that programs read, the tables that people read, the picture, the measured hours."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from elastic_batch.cli.main import main
from elastic_batch.workloads.recipe_book import recipe_names

PHASE_FIELDS = {
    "start_epoch",
    "end_epoch",
    "global_batch_size",
    "num_micro_batches",
    "learning_rate",
    "momentum",
    "noise_scale",
    "updates",
}


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"], {}) == 0
    described = json.loads(capsys.readouterr().out)
    assert isinstance(described, dict)
    return described


def plan_text(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments], {}) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_planned_as_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    described = plan_json(capsys, name)
    phases = described["phases"]
    assert all(phase.keys() >= PHASE_FIELDS for phase in phases)
    assert described["updates"] == sum(phase["updates"] for phase in phases)
    assert phases[0]["start_epoch"] == 0
    assert [phase["start_epoch"] for phase in phases[1:]] == [phase["end_epoch"] for phase in phases[:-1]]
    assert described["baseline_updates"] >= described["updates"]


@pytest.mark.parametrize("name", ["cifar10-wrn16-4-raised-momentum", "imagenet-inception-resnet-v2-decay-lr"])
def test_a_plan_takes_less_than_two_seconds_of_processor_time(name: str) -> None:
    # Processor time, because wall time on a shared machine measures the others; on an idle one they are the same.
    code = (
        "import resource, sys\n"
        "from elastic_batch.cli.main import main\n"
        f"main(['plan', {name!r}, '--json'], {{}})\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(usage.ru_utime + usage.ru_stime, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stderr) < 2
    assert json.loads(done.stdout)["updates"] > 0


def test_the_number_of_updates_does_not_cost_time(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.process_time()
    described = plan_json(capsys, "digits", "--max-duration", "1e6ep")
    assert described["updates"] > 10_000_000
    assert time.process_time() - start < 1


def test_strategy_and_duration_can_be_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    described = plan_json(capsys, "digits", "--strategy", "decay-lr", "--max-duration", "19ep")
    assert {phase["global_batch_size"] for phase in described["phases"]} == {32}
    assert described["updates"] == described["baseline_updates"] == -(-19 * 1437 // 32)


def test_the_environment_is_between_flag_and_file(capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"ELASTIC_BATCH_SCHEDULE__STRATEGY": "decay-lr", "ELASTIC_BATCH_SCHEDULE__MAX_DURATION": "19ep"}
    assert main(["plan", "digits", "--json", "--max-duration", "20ep"], environ) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["updates"], len(described["phases"])) == (899, 5)


def test_shares_are_told_for_the_workers_that_were_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    workers = plan_json(capsys, "digits", "--workers", "1,3")["workers"]
    assert [one["num_workers"] for one in workers] == [1, 3]
    assert workers[1]["micro_batches_per_worker"] == [1, 1, 2, 2, 2]
    assert workers[1]["idle_share"] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3])
    assert workers[0]["baseline_micro_batches_in_sequence"] == 899


def test_workers_beyond_the_micro_batches_stand_by(capsys: pytest.CaptureFixture[str]) -> None:
    (seven,) = plan_json(capsys, "digits", "--workers", "7")["workers"]
    assert seven["micro_batches_per_worker"] == [1, 1, 1, 1, 1]
    assert seven["idle_share"] == pytest.approx([6 / 7, 5 / 7, 3 / 7, 3 / 7, 3 / 7])
    assert "1 (43%)" in plan_text(capsys, "digits", "--workers", "1,4,7")


@pytest.mark.parametrize("workers", ["", "0", "two", "1,,2", "1;2", "1,-2"])
def test_numbers_of_workers_that_make_no_sense_are_refused(workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "digits", "--workers", workers], {}) == 2
    assert "numbers from 1 on" in capsys.readouterr().err


def test_people_see_phases_chart_workers_and_the_form_of_the_noise_scale(capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan_text(capsys, "cifar10-wrn16-4-grow-batch")
    for words in ("grow-batch, factor 5, linear noise scale, cap 5120", "lr N / (B (1 - m))", "120 to 160", "29142"):
        assert words in shown
    assert "63% fewer" in shown
    assert "1 (98%)" in shown  # 40 workers in the first phase
    assert "▁▁▁▁" in shown


def test_a_continuous_schedule_is_shown_by_changes_of_the_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cosine.yaml"
    path.write_text(
        "{name: cosine, data: {name: cifar10}, model: {name: wrn-10-1}, micro_batch_size: 128,\n"
        " optimizer: {learning_rate: 0.1, momentum: 0.9},\n"
        " schedule: {strategy: convert, shape: cosine, global_batch_size: 128, max_duration: 30ep}}\n"
    )
    shown = plan_text(capsys, str(path))
    assert "more rows (--json has all)" not in shown or "..." in shown
    assert " to " in shown
    assert "convert cosine" in shown
    assert plan_json(capsys, str(path))["baseline_updates"] == -(-30 * 50_000 // 128)


def test_batches_without_a_decay_to_compare_with_are_planned_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "steps.yaml"
    path.write_text(
        "{name: steps, data: {target: 'a:b', num_samples: 4096, tokens_per_sample: 8}, model: {target: 'a:c'},\n"
        " micro_batch_size: 32, optimizer: {name: adamw, learning_rate: 1e-3},\n"
        " schedule: {strategy: steps, points: '0:32 16e3tok:64', max_duration: 64e3tok}}\n"
    )
    described = plan_json(capsys, str(path))
    assert [phase["global_batch_size"] for phase in described["phases"]] == [32, 64]
    assert described["workers"][0]["baseline_micro_batches_in_sequence"] is None
    assert "plain decay" in plan_text(capsys, str(path))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_plan_is_drawn(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"new/plan.{suffix}"
    plan_text(capsys, "digits", "--plot", str(path))
    assert path.stat().st_size > 10_000


def test_another_kind_of_picture_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "digits", "--measure", "--plot", str(tmp_path / "plan.jpg")], {}) == 2
    said = capsys.readouterr()
    assert "must end with .png or .svg" in said.err
    assert said.out == ""


def test_without_matplotlib_nothing_is_measured_in_vain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plan", "digits", "--measure", "--plot", str(tmp_path / "plan.png")], {}) == 2
    said = capsys.readouterr()
    assert "pip install 'elastic-batch[report]'" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("schedule.global_batch_size=48", "must be a multiple of micro_batch_size = 32"),
        ("schedule.max_global_batch_size=16", "must not be below the first batch"),
        ("schedule.max_global_batch_size=1437", "must be below the training set's 1437 samples"),
        ("schedule.milestones=[12ep, 8ep]", "Sort them"),
        ("schedule.milestones=[8ep, 30ep]", "past the end"),
        ("ghost_batch_size=12", "must divide micro_batch_size"),
        ("data.augmentation.min_crop_area=0.5", "is for image folders"),
    ],
)
def test_a_job_that_cannot_run_fails_in_its_plan(
    assignment: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "digits", "--set", assignment], {}) == 2
    assert words in capsys.readouterr().err


def test_measured_hours_are_shown_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    described = plan_json(capsys, "digits", "--measure", "--workers", "1,4", "--set", "model.args={width: 2}")
    assert set(described["measured"]["pass_seconds"]) == {"1", "2", "4"}
    hours = [one["hours"] for one in described["workers"]]
    assert 0 < hours[1] < hours[0]
    assert all(one["baseline_hours"] > 0 for one in described["workers"])
