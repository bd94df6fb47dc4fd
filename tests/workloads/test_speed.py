"""Timing of a job's model on this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from elastic_batch.job import Job
from elastic_batch.schedule import plan
from elastic_batch.workloads import speed
from elastic_batch.workloads.data_sets import DataSets
from elastic_batch.workloads.speed import measure_steps
from elastic_batch.workloads.step_times import StepTimes, hours


@pytest.fixture(autouse=True)
def few_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_SECONDS_PER_WIDTH", 0.0)


def job(model: dict[str, Any], **fields: Any) -> Job:
    return Job.parse(
        {
            "name": "timed",
            "data": {"name": "digits"},
            "model": model,
            "optimizer": {"learning_rate": 0.1},
            "schedule": {
                "strategy": "decay-lr",
                "global_batch_size": 32,
                "max_duration": "1ep",
                "milestones": [],
                "factor": 2,
            },
            "micro_batch_size": 8,
            "num_threads": 1,
            **fields,
        }
    )


def test_every_width_up_to_the_largest_update_is_timed() -> None:
    times = measure_steps(job({"name": "small-resnet", "args": {"width": 2}}), max_width=4)
    assert list(times.pass_seconds) == [1, 2, 4]
    assert all(seconds > 0 for seconds in [*times.pass_seconds.values(), times.step_seconds])


def test_dropout_and_stochastic_depth_are_timed_in_wide_passes_as_they_are_trained() -> None:
    times = measure_steps(job({"name": "wrn-10-1", "args": {"dropout": 0.5}}), max_width=2)
    assert list(times.pass_seconds) == [1, 2]


class Drawing(nn.Module):
    """Draws where no dropout is."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.scores(images.flatten(1))
        return scores + torch.rand(1)


def use(monkeypatch: pytest.MonkeyPatch, *, model: nn.Module | None = None, data: object = None) -> None:
    """Let the targets of a job give these."""
    monkeypatch.setattr("elastic_batch.workloads.networks.call_target", lambda *_: model)
    monkeypatch.setattr("elastic_batch.workloads.data_target.call_target", lambda *_: data)


def test_a_model_that_draws_outside_dropout_is_timed_one_micro_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, model=Drawing())
    times = measure_steps(job({"target": "mine:Drawing"}), max_width=8)
    assert list(times.pass_seconds) == [1]
    assert times.width == 1


@pytest.mark.parametrize(("width", "timed"), [(1, [1]), (3, [1, 3]), (16, [1])])
def test_a_width_that_is_asked_for_is_timed_beside_the_single_ones_that_remain(width: int, timed: list[int]) -> None:
    times = measure_steps(
        job({"name": "small-resnet", "args": {"width": 2}}, micro_batches_per_pass=width), max_width=8
    )
    assert list(times.pass_seconds) == timed
    assert times.width == timed[-1]


def test_a_deterministic_job_is_timed_one_micro_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(speed, "make_deterministic", lambda: asked.append(True))
    times = measure_steps(job({"name": "small-resnet", "args": {"width": 2}}, deterministic=True), max_width=8)
    assert list(times.pass_seconds) == [1]
    assert asked


def test_a_compiled_job_is_timed_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda model: compiled.append(model))
    measure_steps(job({"name": "small-resnet", "args": {"width": 2}}, compile=True), max_width=1)
    assert len(compiled) == 1


def test_a_users_data_set_gives_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = TensorDataset(torch.randn(5, 3), torch.zeros(5, dtype=torch.long))
    use(monkeypatch, model=nn.Linear(3, 2), data=data)
    times = measure_steps(job({"target": "torch.nn:Linear"}, data={"target": "mine:data"}), max_width=1)
    assert list(times.pass_seconds) == [1]


def mean_of_squares(model: nn.Module, batch: Any) -> Tensor:
    inputs = batch["inputs"] if isinstance(batch, dict) else batch
    loss: Tensor = model(inputs).square().mean()
    return loss


@pytest.mark.parametrize("samples", [[{"inputs": torch.ones(3)}] * 5, [torch.ones(3)] * 5])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_samples_may_have_any_form_that_training_takes(
    samples: list[Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, model=nn.Linear(3, 2), data=samples)
    monkeypatch.setattr("elastic_batch.workloads.losses.call_target", lambda *_: mean_of_squares)
    loss = {"target": "mine:loss", "takes": "model, batch"}
    timed = job({"target": "torch.nn:Linear"}, data={"target": "mine:data"}, loss=loss, precision=precision)
    assert list(measure_steps(timed, max_width=2).pass_seconds) == [1, 2]


def test_a_users_transform_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    training = TensorDataset(torch.zeros(5, 3, dtype=torch.uint8), torch.zeros(5, dtype=torch.long))
    data = DataSets(training=training, training_transform=lambda batch: (batch[0].float(), batch[1]))
    use(monkeypatch, model=nn.Linear(3, 2), data=data)
    times = measure_steps(job({"target": "torch.nn:Linear"}, data={"target": "mine:data"}), max_width=1)
    assert times.pass_seconds[1] > 0


def test_bf16_is_timed_as_such() -> None:
    timed = job({"name": "small-resnet", "args": {"width": 8}}, precision="bf16")
    assert measure_steps(timed, max_width=1).pass_seconds[1] > 0


def test_channels_last_holds_for_images_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    layouts: list[bool] = []
    model.register_forward_pre_hook(lambda _, inputs: layouts.append(is_channels_last(inputs[0])))
    use(monkeypatch, model=model)
    timed = job({"target": "mine:model"}, data={"name": "cifar10"}, memory_format="channels_last")
    measure_steps(timed, max_width=2)
    assert layouts
    assert all(layouts)
    assert is_channels_last(next(model.parameters()))


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def test_hours_count_the_busiest_worker_and_the_fastest_width() -> None:
    times = StepTimes(device="test", pass_seconds={1: 36.0, 2: 36.0}, step_seconds=0.0, width=2)
    planned = plan(job({"name": "small-resnet"}).build_schedule(1440))  # 45 updates of 4 micro-batches
    assert [hours(planned, workers, times) for workers in (1, 2, 3, 4)] == pytest.approx([0.9, 0.45, 0.45, 0.45])
