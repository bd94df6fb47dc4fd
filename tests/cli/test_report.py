"""`elastic-batch report`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from elastic_batch.cli.report import command
from elastic_batch.errors import InvalidSetting, RunDirectoryMissing
from elastic_batch.report import figures
from elastic_batch.rundir import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with RunDirectory.create(tmp_path / "run", {"name": "digits"}) as run:
        for update in (1, 2, 3):
            run.record(
                {
                    "kind": "update", "update": update, "position": 32 * update, "epoch": update / 10, "phase": 0,
                    "global_batch_size": 32, "learning_rate": 0.1, "momentum": 0.9, "noise_scale": 10.0,
                    "measured_noise_scale": None, "loss": 1 / update, "seconds": 0.5,
                }
            )  # fmt: skip
    return run.path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], standalone_mode=False)


def test_one_run_gets_its_report_beside_its_logs_and_a_table_on_the_screen(run: Path) -> None:
    result = call(run)
    assert result.exception is None
    assert (run / "report" / "overview.png").is_file()
    assert result.output.split()[:4] == ["run", "seeds", "updates", "of"]
    assert "overview.png" in result.output


def test_the_output_may_be_elsewhere_and_the_table_json(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "draw_figures", lambda groups, metric, output: [])
    result = call(run, "--output", tmp_path / "there", "--json")
    assert json.loads(result.output)[0]["updates"] == 3
    assert (tmp_path / "there" / "table.md").is_file()


def test_a_place_without_runs_is_one_error(tmp_path: Path) -> None:
    assert isinstance(call(tmp_path).exception, RunDirectoryMissing)


def test_an_output_that_is_a_file_is_refused(run: Path) -> None:
    error = call(run, "--output", run / "metrics.jsonl").exception
    assert isinstance(error, InvalidSetting)
    assert error.field == "--output"
