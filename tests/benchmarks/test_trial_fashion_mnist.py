"""The trial's own machinery, with stand-ins for training runs."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import pytest

STAND_IN = """
import json, os, pathlib, signal, sys, time
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))  # after "train fashion-mnist"
directory = pathlib.Path(options["--run-dir"])
directory.mkdir(exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: (directory.joinpath("saved").touch(), os._exit(75)))
directory.joinpath("begun").touch()
if options["--seed"] == "1":
    while not directory.with_name("hybrid-2").joinpath("begun").exists():
        time.sleep(0.01)
    sys.exit("no memory")
if options["--seed"] == "2":
    time.sleep(60)
summary = {"finished": True, "metrics": {"accuracy": 0.9}, "threads": os.environ["OMP_NUM_THREADS"]}
directory.joinpath("summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, whose runs are stand-ins: seed 1 fails, seed 2 takes for ever."""
    path = Path(__file__).parents[2] / "benchmarks" / "trial_fashion_mnist.py"
    spec = importlib.util.spec_from_file_location("trial_fashion_mnist", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its data classes look themselves up there
    spec.loader.exec_module(module)
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-S", str(script)))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    return module


@pytest.fixture
def lock(tmp_path: Path) -> Any:
    with open(tmp_path / "lock", "w", encoding="utf-8") as file:
        yield file


def options(runs: Path, minutes: float = 1) -> argparse.Namespace:
    return argparse.Namespace(runs=runs, parallel=2, minutes=minutes)


def result(trial: ModuleType, strategy: str, accuracy: float, updates: int = 10) -> Any:
    return trial.Result(strategy, 0, updates, 10, accuracy)


def verdict(trial: ModuleType, decay: tuple[float, ...], grow: tuple[float, ...], updates: int = 10) -> Any:
    results = [result(trial, "decay-lr", value) for value in decay]
    return trial.judge([*results, *(result(trial, "grow-batch", value, updates) for value in grow)])


def test_it_holds_where_means_differ_less_than_seeds_do(trial: ModuleType) -> None:
    given = verdict(trial, (0.900, 0.904), (0.901, 0.907))
    assert given.holds
    assert given.difference == pytest.approx(0.002)
    assert given.pooled_range == pytest.approx(0.006)


def test_a_difference_beyond_what_seeds_do_fails_even_below_half_a_point(trial: ModuleType) -> None:
    given = verdict(trial, (0.900, 0.901), (0.904, 0.905))
    assert given.difference < trial.LARGEST_DIFFERENCE
    assert not given.holds
    assert "does NOT hold" in trial.in_words(given)


def test_a_difference_of_more_than_half_a_point_fails_even_if_seeds_do_more(trial: ModuleType) -> None:
    assert not verdict(trial, (0.88, 0.92), (0.89, 0.93)).holds


def test_another_number_of_updates_than_planned_fails(trial: ModuleType) -> None:
    assert not verdict(trial, (0.900, 0.904), (0.900, 0.904), updates=9).holds


def test_finished_runs_are_kept_and_others_trained_on_one_thread(
    trial: ModuleType, tmp_path: Path, lock: IO[str]
) -> None:
    (tmp_path / "hybrid-0").mkdir()
    kept = '{"finished": true, "metrics": {"accuracy": 0.8}}'
    (tmp_path / "hybrid-0" / "summary.json").write_text(kept, encoding="utf-8")
    trials = [trial.Trial(strategy, 0) for strategy in trial.STRATEGIES]
    trial.train_all(trials, options(tmp_path), lock)
    assert (tmp_path / "hybrid-0" / "summary.json").read_text(encoding="utf-8") == kept
    assert all(trial.is_finished(tmp_path / each.name) for each in trials)
    assert '"threads": "1"' in (tmp_path / "decay-lr-0" / "summary.json").read_text(encoding="utf-8")


def test_when_time_is_up_runs_are_told_to_save_and_are_waited_for(
    trial: ModuleType, tmp_path: Path, lock: IO[str]
) -> None:
    with pytest.raises(trial.Stopped, match="minutes are over"):
        trial.train_all([trial.Trial("hybrid", 2)], options(tmp_path, minutes=0.08), lock)
    assert (tmp_path / "hybrid-2" / "saved").exists()


def test_a_run_that_fails_shows_its_last_words_and_stops_the_others(
    trial: ModuleType, tmp_path: Path, lock: IO[str]
) -> None:
    with pytest.raises(SystemExit, match=r"decay-lr-1 failed with exit code 1(.|\n)*no memory"):
        trial.train_all([trial.Trial("hybrid", 2), trial.Trial("decay-lr", 1)], options(tmp_path), lock)
    assert (tmp_path / "hybrid-2" / "saved").exists()
