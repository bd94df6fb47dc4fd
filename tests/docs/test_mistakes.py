"""Mistakes that docs/training.md says are caught, made by way of the public names as a script would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import elastic_batch as eb
from elastic_batch.errors import InvalidSetting, MisusedTrainer, WorkerFailed

DATA = TensorDataset(torch.randn(48, 4), torch.arange(48) % 3)


class Script:
    """A user's script up to its loop."""

    def __init__(self, **options: Any) -> None:
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)
        given = {"schedule": self._schedule(), "micro_batch_size": 4, **options}
        self.trainer = eb.Trainer(self.model, self.optimizer, DATA, **given)

    def _schedule(self) -> Any:
        return eb.from_lr_scheduler(
            self.scheduler, per="epoch", max_duration="2ep", global_batch_size=4, max_global_batch_size=16
        )

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def run(
        self,
        backward: Callable[[Script, Any, Any], object] = lambda script, update, batch: update.backward(
            script.loss(batch)
        ),
        end: Callable[[Script, Any], object] = lambda script, update: update.step(),
    ) -> None:
        for update in self.trainer.updates():
            for batch in update:
                backward(self, update, batch)
            end(self, update)


@pytest.mark.parametrize(
    ("backward", "message"),
    [
        pytest.param(lambda script, update, batch: script.loss(batch).backward(), r"call update.backward", id="direct"),
        pytest.param(
            lambda script, update, batch: [update.backward(script.loss(batch)) for _ in range(2)],
            "once for each batch",
            id="twice",
        ),
        pytest.param(lambda script, update, batch: None, "a batch got no update.backward", id="none"),
        pytest.param(
            lambda script, update, batch: [script.optimizer.zero_grad(), update.backward(script.loss(batch))],
            r"zero_grad\(\) was called; remove it",
            id="optimizer.zero_grad",
        ),
        pytest.param(
            lambda script, update, batch: [script.model.zero_grad(), update.backward(script.loss(batch))],
            r"remove model.zero_grad\(\)",
            id="model.zero_grad",
        ),
        pytest.param(
            lambda script, update, batch: update.backward(script.loss(batch) * torch.ones(3)), "one number", id="vector"
        ),
    ],
)
def test_what_belongs_to_the_trainer_is_left_to_it_in_a_batch(
    backward: Callable[[Script, Any, Any], object], message: str
) -> None:
    with pytest.raises(MisusedTrainer, match=message):
        Script().run(backward)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        pytest.param(lambda script, update: None, r"step\(\) was not called", id="no step"),
        pytest.param(lambda script, update: [update.step(), update.step()], "called twice", id="two steps"),
        pytest.param(lambda script, update: [update.step(), script.optimizer.step()], r"call update.step", id="direct"),
        pytest.param(
            lambda script, update: [update.step(), script.scheduler.step()], r"remove scheduler.step", id="scheduler"
        ),
    ],
)
def test_what_belongs_to_the_trainer_is_left_to_it_at_an_update_s_end(
    end: Callable[[Script, Any], object], message: str
) -> None:
    with pytest.raises(MisusedTrainer, match=message):
        Script().run(end=end)


def test_a_torch_scheduler_is_no_schedule() -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), 1)
    with pytest.raises(InvalidSetting, match=r"StepLR.*from_lr_scheduler\("):
        Script(schedule=scheduler)


def test_a_measure_gives_a_sum_and_its_weight() -> None:
    script = Script()
    mean: Any = lambda _, batch: script.loss(batch)  # noqa: E731 # of a type that a checker would refuse too
    with pytest.raises(WorkerFailed, match=r"\(sum, weight\) pair"):
        script.trainer.evaluate(DATA, mean)


def test_without_mistakes_the_script_runs_to_the_end() -> None:
    script = Script()
    script.run()
    assert script.trainer.finished
