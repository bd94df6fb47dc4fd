"""Whole reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from elastic_batch.errors import PackageMissing, UnknownName
from elastic_batch.report import Report, figures, write_report
from elastic_batch.report.runs import group_runs, load_run
from elastic_batch.report.table import make_table
from elastic_batch.rundir import RunDirectory, read_metrics

MakeRun = Callable[..., Path]
PICTURES = ["schedule", "noise", "loss", "accuracy", "overview"]


@pytest.fixture(scope="module")
def report(nine_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return write_report([nine_runs], tmp_path_factory.mktemp("out") / "report")


def test_a_report_has_each_picture_as_png_and_svg_and_the_table_twice(report: Report) -> None:
    names = {path.name for path in report.files}
    assert names == {f"{name}{suffix}" for name in PICTURES for suffix in (".png", ".svg")} | {"table.md", "table.json"}
    for path in report.files:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.width > 600
                assert len(picture.convert("RGB").resize((80, 60)).getcolors(5000) or []) > 20
        elif path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_every_picture_names_every_group(report: Report) -> None:
    for path in report.files:
        if path.suffix == ".svg":
            text = path.read_text()
            assert all(f"<!-- {label} -->" in text for label in ("decay-lr", "grow-batch", "hybrid")), path


def test_an_axis_that_does_not_show_all_says_so(tmp_path: Path, make_run: MakeRun) -> None:
    label = "test accuracy (cut; lowest "
    cut = write_report([make_run(tmp_path / "run", "decay-lr", 1)], tmp_path / "report")
    assert label in next(path for path in cut.files if path.name == "accuracy.svg").read_text()


def test_drawing_leaves_nothing_behind_in_matplotlib(report: Report) -> None:
    assert "matplotlib.pyplot" not in sys.modules
    assert sys.modules["matplotlib"].rcParams["svg.hashsalt"] is None


def test_the_table_compares_with_the_plain_decay(report: Report) -> None:
    decay, grow, hybrid = report.rows
    assert [row.updates for row in report.rows] == [3000, 1500, 1560]
    assert [row.baseline_updates for row in report.rows] == [3000] * 3
    assert decay.difference is None
    assert grow.difference == pytest.approx(grow.final_mean - decay.final_mean)
    assert hybrid.final_low <= hybrid.final_mean <= hybrid.final_high
    markdown = next(path for path in report.files if path.name == "table.md").read_text().splitlines()
    assert markdown[0].startswith("| run | seeds | updates | of plain decay | samples | final accuracy |")
    assert "| grow-batch | 1, 2, 3 | 1 500 | 50.0% | 384 000 | 9" in markdown[3]
    rows = json.loads(next(path for path in report.files if path.name == "table.json").read_text())
    assert [row["label"] for row in rows] == ["decay-lr", "grow-batch", "hybrid"]


def test_one_run_without_evaluations_that_was_cut_off_is_drawn_too(make_run: MakeRun, tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", "grow-batch", 1)
    with RunDirectory.create(tmp_path / "cut", {"name": "cut"}) as run:
        for record in list(read_metrics(whole))[:700]:
            run.record(record | {"learning_rate": 0.0 if record["update"] < 5 else 0.1})
    report = write_report([tmp_path / "cut"], tmp_path / "report")
    (row,) = report.rows
    assert (row.metric, row.baseline_updates, row.difference, row.updates) == (None, None, None, 700)
    assert {path.stem for path in report.files} == {"schedule", "noise", "loss", "overview", "table"}
    assert "| cut (unfinished) | - | 700 | - | 89 600 | - | - | - |" in (tmp_path / "report" / "table.md").read_text()


def test_another_metric_may_be_asked_for(nine_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw_figures", lambda groups, metric, output: [])
    report = write_report([nine_runs / "hybrid-1"], tmp_path, metric="loss")
    assert report.rows[0].metric == "loss"
    with pytest.raises(UnknownName, match="Did you mean 'accuracy'"):
        write_report([nine_runs / "hybrid-1"], tmp_path, metric="acuracy")


@pytest.mark.parametrize(
    ("metric", "picture"),
    [
        ("loss", "evaluation-loss"),
        ("Noise", "evaluation-Noise"),
        ("top1.5", "top1-5"),
        ("test/averaged accuracy", "test-averaged-accuracy"),
    ],
)
def test_the_picture_of_a_metric_takes_no_others_place(
    metric: str, picture: str, make_run: MakeRun, tmp_path: Path
) -> None:
    path = make_run(tmp_path / "run", "hybrid", 1)
    log = path / "metrics.jsonl"
    log.write_text(log.read_text().replace('"metrics": {"accuracy"', f'"metrics": {{"{metric}"'))
    report = write_report([path], tmp_path / "report", metric=metric)
    pictures = {"schedule", "noise", "loss", picture, "overview"}
    assert {file.name for file in report.files if file.suffix == ".png"} == {f"{name}.png" for name in pictures}
    assert {file.name for file in (tmp_path / "report").iterdir()} == {file.name for file in report.files}


def test_each_run_is_compared_with_the_plain_decay_of_its_own_job(make_run: MakeRun, tmp_path: Path) -> None:
    settings = {job: {"data": {"name": job}} for job in ("digits", "fashion-mnist")}
    paths = [
        make_run(tmp_path / "a", "decay-lr", 1, name="digits", settings=settings["digits"]),
        make_run(tmp_path / "b", "hybrid", 1, name="digits", settings=settings["digits"]),
        make_run(tmp_path / "c", "grow-batch", 1, name="fashion-mnist", settings=settings["fashion-mnist"]),
    ]
    _, hybrid, grow = make_table(group_runs([load_run(path) for path in paths]), "accuracy")
    assert hybrid.difference is not None
    assert (grow.difference, grow.baseline_updates) == (None, 3000)


def test_without_matplotlib_the_error_names_the_extra(
    nine_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "elastic_batch.report.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PackageMissing, match=r"pip install 'elastic-batch\[report\]'"):
        write_report([nine_runs], tmp_path)


@pytest.mark.parametrize("losses", [(-1.0, -2.0), (0.5, -0.5), (None, None)])
def test_losses_may_be_negative_or_not_known(losses: tuple[float | None, ...], tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", {"name": "likelihood"}) as run:
        for update, loss in enumerate(losses, 1):
            run.record(
                {
                    "kind": "update", "update": update, "position": 32 * update, "epoch": update / 10, "phase": 0,
                    "global_batch_size": 32, "learning_rate": 0.1, "momentum": 0.9, "noise_scale": 10.0,
                    "measured_noise_scale": None, "loss": loss, "seconds": 0.5,
                }
            )  # fmt: skip
    files = write_report([run.path], tmp_path / "report").files
    assert {"loss.png", "overview.png"} <= {path.name for path in files}
