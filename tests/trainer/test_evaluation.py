"""What an evaluation gives, and under which names it is recorded."""

from __future__ import annotations

import math
import multiprocessing
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.evaluations import evaluate_classes, evaluate_to_infinity
from support.jobs import TOKENS
from support.training import Plan, make_trainer
from support.worlds import run_world
from torch import nn
from torch.utils.data import TensorDataset

from elastic_batch.engines import FixedWorld, SoloEngine
from elastic_batch.errors import WorkerFailed
from elastic_batch.rundir import read_evaluations
from elastic_batch.trainer.evaluation import Measure, evaluate


def share_of_halves(model: nn.Module, batch: Any) -> tuple[float, float]:
    return 1.0, 2.0


def by_name(model: nn.Module, batch: Any) -> Mapping[str, tuple[float, float]]:
    return {"value": (1.0, 4.0)}


class Judge:
    def __call__(self, model: nn.Module, batch: Any) -> tuple[float, float]:
        return 1.0, 8.0


@pytest.mark.parametrize(
    ("measure", "result", "metrics"),
    [
        (share_of_halves, 0.5, {"share_of_halves": 0.5}),
        (lambda *_: (1.0, 2.0), 0.5, {"value": 0.5}),
        (Judge(), 0.125, {"value": 0.125}),
        (by_name, {"value": 0.25}, {"value": 0.25}),
    ],
)
def test_a_single_pair_is_a_number_recorded_under_the_functions_name(
    measure: Measure, result: Any, metrics: dict[str, float], tmp_path: Path
) -> None:
    plan = Plan(TOKENS, owns_loop=True, options={"run_dir": tmp_path / "run"})
    with make_trainer(plan, FixedWorld(SoloEngine())) as trainer:
        assert trainer.evaluate(trainer._train_set, measure) == result
    assert [record["metrics"] for record in read_evaluations(tmp_path / "run")] == [metrics]


def test_names_belong_together_whatever_their_order() -> None:
    found = run_world(2, evaluate_classes, [["cat", "horse"], ["horse", "cat"]])
    assert found == [{"cat": 3.0, "horse": 5.0}] * 2


def test_other_names_on_another_worker_are_refused_on_all() -> None:
    for error, own in zip(run_world(2, evaluate_classes, [["cat"], ["horse"]]), ("cat", "horse"), strict=True):
        assert f"other names on workers 1 than on the others; here it gives '{own}'" in error


def test_a_worker_without_samples_adds_nothing_to_a_result_that_is_infinite() -> None:
    assert run_world(2, evaluate_to_infinity) == [math.inf, math.inf]


def test_a_mean_of_nothing_is_not_a_number() -> None:
    with make_trainer(Plan(TOKENS, owns_loop=True), FixedWorld(SoloEngine())) as trainer:
        assert math.isnan(trainer.evaluate(trainer._train_set, lambda *_: (0.0, 0)))


@pytest.fixture
def _signals_of_children_are_torch_s(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The next DataLoader with workers installs torch's handler."""
    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("_signals_of_children_are_torch_s")
def test_a_worker_s_death_waits_for_the_next_batch() -> None:
    gone_on = []

    def measure(model: nn.Module, batch: Any) -> tuple[float, float]:
        (worker,) = multiprocessing.active_children()
        worker.kill()
        time.sleep(0.2)  # where the signal of its death is heard
        gone_on.append(True)
        return 1.0, 1.0

    samples = TensorDataset(torch.zeros(8, 1))
    with pytest.raises(WorkerFailed, match="the evaluation failed"):
        evaluate(
            SoloEngine(), nn.Linear(1, 1), samples, measure, device=torch.device("cpu"), batch_size=4, num_workers=1
        )
    assert gone_on == [True]
