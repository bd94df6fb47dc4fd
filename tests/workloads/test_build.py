"""From a job to a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elastic_batch.errors import InvalidSetting
from elastic_batch.job import Job
from elastic_batch.workloads.build import Workload, build_workload
from elastic_batch.workloads.devices import choose_device


def job(**fields: Any) -> Job:
    return Job.parse(
        {
            "name": "built",
            "data": {"name": "digits", "augmentation": {"crop_padding": 1}},
            "model": {"name": "small-resnet", "args": {"width": 2}},
            "optimizer": {"learning_rate": 0.1, "momentum": 0.9},
            "schedule": {
                "strategy": "grow-batch",
                "global_batch_size": 32,
                "max_duration": "128sp",
                "milestones": ["64sp"],
                "factor": 2,
            },
            "micro_batch_size": 32,
            "num_threads": 1,
            "micro_batches_per_pass": 1,  # what measuring finds may differ from time to time, and rounding with it
            **fields,
        }
    )


def train(workload: Workload) -> list[float]:
    with workload.trainer as trainer:
        return [update.loss for update in trainer]


def weights(workload: Workload) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in workload.trainer.model.state_dict().items()}


def test_a_job_trains_and_is_judged() -> None:
    workload = build_workload(job(), environ={})
    with workload.trainer as trainer:
        assert [update.global_batch_size for update in trainer] == [32, 32, 64]
        metrics = workload.evaluate()
    assert metrics.keys() == {"loss", "accuracy"}
    assert 0 <= metrics["accuracy"] <= 1


def test_equal_seeds_train_alike_and_others_do_not() -> None:
    assert train(build_workload(job(), environ={})) == train(build_workload(job(), environ={}))
    assert train(build_workload(job(seed=1), environ={})) != train(build_workload(job(), environ={}))


def test_channels_last_trains_to_the_same_losses() -> None:
    # Not fewer channels: torch's own strided 1x1 convolution (oneDNN, channels_last) then writes past its buffers.
    model = {"name": "small-resnet", "args": {"width": 8}}
    plain = train(build_workload(job(model=model), environ={}))
    laid_out = train(build_workload(job(model=model, memory_format="channels_last"), environ={}))
    assert laid_out == pytest.approx(plain, rel=1e-3)


def test_the_job_as_resolved_and_its_intervals_reach_the_trainer(tmp_path: Path) -> None:
    settings = job(checkpoint={"every": "64sp", "keep": 2}, max_grad_norm=1.0, spares=1)
    options = build_workload(settings, environ={}, run_dir=tmp_path / "run").trainer.options
    assert options.job == settings.dump()
    assert (options.checkpoint_every, options.keep, options.max_grad_norm, options.spares) == ("64sp", 2, 1.0, 1)


def test_a_fresh_run_may_start_from_given_weights(tmp_path: Path) -> None:
    donor = build_workload(job(seed=5), environ={})
    torch.save(donor.trainer.model.state_dict(), tmp_path / "weights.pt")
    started = weights(build_workload(job(), environ={}, init_from=str(tmp_path / "weights.pt")))
    assert all(torch.equal(value, started[name]) for name, value in weights(donor).items())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(InvalidSetting, match="does not fit the model"):
        build_workload(job(), environ={}, init_from=str(tmp_path / "weights.pt"))


def test_a_file_without_weights_to_start_from_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_text("none")
    with pytest.raises(InvalidSetting, match=r"^--init-from = '.*': must hold weights that can be read"):
        build_workload(job(), environ={}, init_from=str(tmp_path / "weights.pt"))


def test_a_data_set_of_another_length_than_planned_is_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"holds 1437 samples.*Set data\.num_samples: 1437"):
        build_workload(job(data={"name": "digits", "num_samples": 1500}), environ={})


def test_a_data_set_without_a_test_set_gives_no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(640, 3), torch.zeros(640, dtype=torch.long))
    monkeypatch.setattr("elastic_batch.workloads.data_target.call_target", lambda *_: data)
    model = {"target": "torch.nn:Linear", "args": {"in_features": 3, "out_features": 2}}
    workload = build_workload(job(data={"target": "mine:data"}, model=model), environ={})
    assert len(train(workload)) == 3
    assert workload.evaluate() == {}


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", {}) == torch.device("cpu")
    with pytest.raises(InvalidSetting, match="torch sees no GPU here"):
        choose_device("cuda:1", {})


@pytest.mark.parametrize(
    ("setting", "environ", "device"),
    [
        ("auto", {"LOCAL_RANK": "1"}, "cuda:1"),
        ("cuda", {"SLURM_LOCALID": "3"}, "cuda:1"),
        ("cuda:0", {"LOCAL_RANK": "1"}, "cuda:0"),
        ("cpu", {"LOCAL_RANK": "1"}, "cpu"),
    ],
)
def test_workers_of_one_host_take_different_gpus(
    monkeypatch: pytest.MonkeyPatch, setting: str, environ: dict[str, str], device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert choose_device(setting, environ) == torch.device(device)
