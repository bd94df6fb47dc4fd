"""Runs as a report sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_batch.errors import InvalidSetting, RunDirectoryMissing
from elastic_batch.report.runs import Group, Run, baseline_of, find_runs, group_runs, load_run

MakeRun = Callable[..., Path]


def test_a_run_is_read_into_columns(nine_runs: Path) -> None:
    run = load_run(nine_runs / "grow-batch-2")
    assert (run.name, run.strategy, run.seed, run.baseline_updates) == ("synthetic", "grow-batch", 2, 3000)
    assert (run.num_updates, run.num_samples) == (1500, 384_000)
    assert run.metrics == ["accuracy", "loss"]
    assert np.isnan(run.updates["measured_noise_scale"][0])
    assert run.boundaries.tolist() == [12, 24]
    assert run.starts[0] == 0
    assert 0.9 < run.final("accuracy") < 1
    assert np.isnan(run.final("perplexity"))


def test_a_shorter_last_update_is_no_step_of_the_schedule(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", "grow-batch", 1)
    log = path / "metrics.jsonl"
    *lines, last = log.read_text().splitlines()
    position = next(index for index, line in reversed(list(enumerate(lines))) if '"kind": "update"' in line)
    record = json.loads(lines[position]) | {"global_batch_size": 96}
    log.write_text("\n".join([*lines[:position], json.dumps(record), *lines[position + 1 :], last]) + "\n")
    run = load_run(path)
    assert run.updates["global_batch_size"][-1] == 96
    assert run.planned_batches[-1] == 1280


def test_runs_that_differ_in_their_seed_make_a_group_and_the_plain_decay_comes_first(nine_runs: Path) -> None:
    groups = group_runs([load_run(path) for path in find_runs([nine_runs])])
    assert [(group.label, group.seeds) for group in groups] == [
        ("decay-lr", [1, 2, 3]), ("grow-batch", [1, 2, 3]), ("hybrid", [1, 2, 3]),
    ]  # fmt: skip


def test_jobs_of_several_names_have_them_in_their_labels(make_run: MakeRun, tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path / "a", "hybrid", 1, name="digits"),
        make_run(tmp_path / "b", "hybrid", 1, name="cifar10-hybrid"),
    ]
    assert [group.label for group in group_runs(list(map(load_run, paths)))] == ["digits: hybrid", "cifar10-hybrid"]


def test_runs_that_differ_in_more_than_their_seed_are_groups_that_say_in_what(
    make_run: MakeRun, tmp_path: Path
) -> None:
    def settings(learning_rate: float, root: str) -> dict[str, Any]:
        optimizer = {"learning_rate": learning_rate, "nesterov": False, "weight_decay": None}
        return {"optimizer": optimizer, "data": {"name": "digits", "root": root}, "num_workers": len(root)}

    for seed, (rate, root) in enumerate([(0.1, "a"), (0.2, "a"), (0.1, "elsewhere")]):
        make_run(tmp_path / str(seed), "hybrid", seed, settings=settings(rate, root))
    groups = group_runs([load_run(path) for path in find_runs([tmp_path])])
    assert [(group.label, group.seeds) for group in groups] == [
        ("hybrid, optimizer.learning_rate 0.1", [0, 2]), ("hybrid, optimizer.learning_rate 0.2", [1]),
    ]  # fmt: skip


def test_scripts_runs_are_told_apart_by_their_options_and_first_updates(make_run: MakeRun, tmp_path: Path) -> None:
    options = {"schedule": None, "micro_batch_size": 32, "run_dir": "somewhere", "max_grad_norm": None}
    for name, strategy in (("a", "hybrid"), ("b", "hybrid"), ("c", "hybrid")):
        make_run(tmp_path / name, strategy, ord(name), settings=options | {"run_dir": name})
    log = tmp_path / "c" / "metrics.jsonl"
    log.write_text(log.read_text().replace('"learning_rate": 0.1,', '"learning_rate": 0.3,'))
    groups = group_runs([load_run(path) for path in find_runs([tmp_path])])
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("hybrid, learning_rate 0.1", 2), ("hybrid, learning_rate 0.3", 1),
    ]  # fmt: skip


def test_a_run_is_labelled_by_its_jobs_strategy_finished_or_not(make_run: MakeRun, tmp_path: Path) -> None:
    cosine = {"schedule": {"strategy": "convert", "shape": {"name": "cosine"}}}
    path = make_run(tmp_path / "a", "hybrid", 1, settings=cosine)
    summary = json.loads((path / "summary.json").read_text()) | {"strategy": "convert cosine"}
    (path / "summary.json").write_text(json.dumps(summary))
    assert load_run(path).strategy == "convert"


def group(name: str, strategy: str, **settings: str) -> Group:
    return Group(strategy, [Run(name, strategy, 1, {}, {}, None, settings=settings)])


def test_the_baseline_has_the_same_name_and_is_the_most_alike() -> None:
    decay, other_rate = group("a", "decay-lr", rate="0.1"), group("a", "decay-lr", rate="0.2")
    grow = group("a", "grow-batch", rate="0.2")
    assert baseline_of(grow, [decay, grow, other_rate]) is other_rate
    assert baseline_of(decay, [other_rate, decay]) is decay


def test_a_baseline_of_another_name_has_the_same_data_and_model() -> None:
    task = {"data.name": "cifar10", "model.name": "wrn-16-4"}
    decay, of_digits = (
        group("cifar10-decay-lr", "decay-lr", **task),
        group("digits", "decay-lr", **{"data.name": "digits"}),
    )
    assert baseline_of(group("cifar10-grow-batch", "grow-batch", **task), [of_digits, decay]) is decay
    assert baseline_of(group("cifar10-grow-batch", "grow-batch", **task), [of_digits]) is None
    assert baseline_of(group("script", "hybrid"), [group("another", "decay-lr")]) is None


def test_a_run_that_still_goes_on_is_named_by_its_job_or_its_directory(make_run: MakeRun, tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "a", "hybrid", 4, finished=False))
    assert (run.name, run.strategy, run.seed, run.baseline_updates) == ("synthetic", "hybrid", 4, None)
    (tmp_path / "a" / "job.yaml").unlink()
    run = load_run(tmp_path / "a")
    assert (run.name, run.strategy, run.seed) == ("a", "a", None)


def test_runs_are_found_by_themselves_and_in_what_holds_them(nine_runs: Path, tmp_path: Path) -> None:
    assert find_runs([nine_runs / "hybrid-1", nine_runs / "decay-lr-1"]) == [
        nine_runs / "hybrid-1", nine_runs / "decay-lr-1",
    ]  # fmt: skip
    assert len(find_runs([nine_runs])) == 9
    with pytest.raises(RunDirectoryMissing):
        find_runs([nine_runs, tmp_path / "nowhere"])


def test_a_run_without_updates_is_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "evaluation", "update": 0, "metrics": {}}) + "\n")
    with pytest.raises(InvalidSetting, match="must have an update on record"):
        find_runs([tmp_path])
    with pytest.raises(RunDirectoryMissing):
        load_run(tmp_path)


def test_a_run_whose_log_was_cut_is_not_finished(make_run: MakeRun, tmp_path: Path) -> None:
    log = make_run(tmp_path / "run", "decay-lr", 1) / "metrics.jsonl"
    assert load_run(tmp_path / "run").is_finished
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:1000]))
    assert not load_run(tmp_path / "run").is_finished


def test_a_run_that_is_named_twice_counts_once(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run(tmp_path / "runs" / "a", "hybrid", 1)
    assert find_runs([path, tmp_path / "runs", f"{path}/../a"]) == [path]
