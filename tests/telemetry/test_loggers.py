"""Experiment trackers: TensorBoard for real, the others against stand-ins of their clients."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from elastic_batch.errors import InvalidSetting, UnknownName
from elastic_batch.telemetry import open_loggers

JOB = {"schedule": {"strategy": "grow-batch", "milestones": ["10ep"]}, "seed": 3}


def update(number: int) -> dict[str, Any]:
    return {
        "kind": "update", "update": number, "position": 32 * number, "loss": 1 / number, "learning_rate": 0.1,
        "measured_noise_scale": None, "time": 1.7e9 + number, "generation": 0,
    }  # fmt: skip


def evaluation(number: int) -> dict[str, Any]:
    return {
        "kind": "evaluation",
        "update": number,
        "position": 32 * number,
        "metrics": {"accuracy": 0.9},
        "time": 1.7e9,
    }


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents)
    return made


def test_tensorboard_draws_over_the_position_and_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for leg in (range(1, 6), range(4, 8)):
        (tracker,) = open_loggers(["tensorboard"], tmp_path, name="digits", job=JOB)
        for number in leg:
            tracker.log(update(number))
        tracker.log(evaluation(number))
        tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(32 * number, pytest.approx(1 / number)) for number in range(1, 8)]
    assert [event.step for event in events.Scalars("evaluation/accuracy")] == [224]
    assert "train/measured_noise_scale" not in events.Tags()["scalars"]
    assert b"schedule.strategy: grow-batch" in events.Tensors("job/text_summary")[0].tensor_proto.string_val[0]


class FakeWandb:
    """The part of wandb's client that is used."""

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.axes: list[tuple[str, str | None]] = []
        self.finished = 0

    def init(self, **settings: Any) -> FakeWandb:
        self.inits.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=fake.init))
    for number in (1, 2):
        (tracker,) = open_loggers(["wandb"], tmp_path, name="digits", job=JOB)
        tracker.log(update(number))
        tracker.log(evaluation(number))
        tracker.close()
    assert fake.inits[0] == fake.inits[1]
    assert fake.inits[0] | {"id": ""} == {
        "name": "digits", "id": "", "resume": "allow", "dir": str(tmp_path), "config": JOB,
    }  # fmt: skip
    assert fake.axes[:2] == [("position", None), ("*", "position")]
    assert fake.logged[:2] == [
        {"position": 32, "train/loss": 1.0, "train/learning_rate": 0.1},
        {"position": 32, "evaluation/accuracy": 0.9},
    ]
    assert fake.finished == 2


class FakeMlflowClient:
    """The part of MLflow's client that is used; like the server, it refuses too large batches."""

    runs: list[str]
    batches: list[tuple[str, list[Any], list[Any], bool]]
    terminated: list[str]

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="7") if self.runs else None

    def create_experiment(self, name: str) -> str:
        assert name == "elastic-batch"
        return "7"

    def create_run(self, experiment_id: str, run_name: str) -> Any:
        self.runs.append(f"{experiment_id}-{run_name}-{len(self.runs)}")
        return SimpleNamespace(info=SimpleNamespace(run_id=self.runs[-1]))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), synchronous: bool = True) -> None:
        assert len(metrics) <= 1000
        assert len(params) <= 100
        self.batches.append((run_id, list(metrics), list(params), synchronous))

    def set_terminated(self, run_id: str) -> None:
        self.terminated.append(run_id)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> type[FakeMlflowClient]:
    FakeMlflowClient.runs, FakeMlflowClient.batches, FakeMlflowClient.terminated = [], [], []
    monkeypatch.setitem(sys.modules, "mlflow", module("mlflow", MlflowClient=FakeMlflowClient))
    entities = module("mlflow.entities", Metric=lambda *values: values, Param=lambda *values: values)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return FakeMlflowClient


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(tmp_path: Path, mlflow: type[FakeMlflowClient]) -> None:
    for number in (1, 2):
        (tracker,) = open_loggers(["mlflow"], tmp_path, name="digits", job=JOB)
        tracker.log(update(number))
        tracker.log(evaluation(number))
        tracker.close()
    assert mlflow.runs == ["7-digits-0"]
    assert mlflow.terminated == ["7-digits-0"] * 2
    assert ("seed", "3") in mlflow.batches[0][2]
    metrics = [metric for _, batch, _, _ in mlflow.batches for metric in batch]
    assert metrics[:3] == [
        ("train/loss", 1.0, 1_700_000_001_000, 32),
        ("train/learning_rate", 0.1, 1_700_000_001_000, 32),
        ("evaluation/accuracy", 0.9, 1_700_000_000_000, 32),
    ]


def test_values_for_mlflow_are_sent_in_batches_in_the_background(
    tmp_path: Path, mlflow: type[FakeMlflowClient]
) -> None:
    (tracker,) = open_loggers(["mlflow"], tmp_path, name="digits", job=JOB)
    for number in range(1, 1201):
        tracker.log(update(number))
    assert [synchronous for _, metrics, _, synchronous in mlflow.batches if metrics] == [False]
    tracker.close()
    assert sum(len(metrics) for _, metrics, _, _ in mlflow.batches) == 2400
    assert mlflow.batches[-1][3]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_names_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidSetting, match=rf"pip install 'elastic-batch\[{name}\]'"):
        open_loggers([name], tmp_path, name="digits", job=JOB)


def test_an_unknown_tracker_is_refused_before_any_is_opened(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'tensorboard'"):
        open_loggers(["tensorbord"], tmp_path / "run", name="digits", job=JOB)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_open_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_login(**settings: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=no_login))
    with pytest.raises(InvalidSetting, match="did not open: no API key"):
        open_loggers(["wandb"], tmp_path, name="digits", job=JOB)


def test_a_tracker_that_fails_later_is_told_once_a_minute_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeWandb()

    def unreachable(values: dict[str, Any]) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(fake, "log", unreachable)
    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=fake.init))
    (tracker,) = open_loggers(["wandb"], tmp_path, name="digits", job=JOB)
    for number in (1, 2, 3):
        tracker.log(update(number))
    tracker.close()
    assert caplog.text.count("logging to wandb failed; training goes on") == 1
    assert fake.finished == 1


def test_a_loss_that_is_not_a_number_reaches_the_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=fake.init))
    (tracker,) = open_loggers(["wandb"], tmp_path, name="digits", job=JOB)
    tracker.log(update(1) | {"loss": math.nan})
    assert math.isnan(fake.logged[0]["train/loss"])
