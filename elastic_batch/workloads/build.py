"""From a job to everything that trains it: data, model, loss, optimizer, and the trainer that holds them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import Dataset

from elastic_batch.checkpoint import read_weights
from elastic_batch.data import count_samples
from elastic_batch.errors import CheckpointDamaged, InvalidSetting
from elastic_batch.job import DataSettings, Job
from elastic_batch.telemetry import Logger
from elastic_batch.trainer import Trainer
from elastic_batch.workloads.augmentation import LayoutTransform
from elastic_batch.workloads.catalog import DATA_SETS
from elastic_batch.workloads.data_sets import BatchTransform, DataSets
from elastic_batch.workloads.data_target import load_data_target
from elastic_batch.workloads.devices import choose_device
from elastic_batch.workloads.losses import Judge, build_loss
from elastic_batch.workloads.networks import build_model
from elastic_batch.workloads.optimizers import build_optimizer
from elastic_batch.workloads.planning import num_training_samples
from elastic_batch.workloads.readers import load_data_sets


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A job that is ready to train."""

    job: Job
    trainer: Trainer
    evaluation: Dataset[Any] | None
    """The test set, if there is one."""
    judge: Judge
    """Measures the model on a batch of it."""

    def evaluate(self) -> dict[str, float]:
        """Measure the model on the test set; all workers call it at the same place. Empty without a test set."""
        if self.evaluation is None:
            return {}
        batch_size = self.job.evaluation.batch_size
        return cast(dict[str, float], self.trainer.evaluate(self.evaluation, self.judge, batch_size=batch_size))


def build_workload(
    job: Job,
    *,
    environ: Mapping[str, str],
    run_dir: str | os.PathLike[str] | None = None,
    resume: str = "never",
    init_from: str | None = None,
    loggers: Sequence[Logger] = (),
) -> Workload:
    """Build what a job describes.

    Args:
        job: The job.
        environ: Where a launcher's variables are read (the local rank chooses the GPU).
        run_dir: Where records and checkpoints go; None: nowhere.
        resume: `never`, `auto`, or a checkpoint's or run's path.
        init_from: Weights to start from, if the run starts fresh.
        loggers: Further receivers of records.

    Raises:
        DataMissing: The data set is not there.
        PackageMissing: A package that has the data set or the model is not installed.
        InvalidSetting: Something in the job cannot be built.
    """
    data = load_data(job.data)
    _check_num_samples(data.training, num_training_samples(job))
    device = choose_device(job.device, environ)
    if job.num_threads is not None:
        torch.set_num_threads(job.num_threads)
    torch.manual_seed(job.seed)
    model = build_model(job.model, DATA_SETS.get(job.data.name or ""))
    if init_from is not None:
        _load_weights(model, init_from)
    layout = _LAYOUTS[job.memory_format]
    model.to(device=device, memory_format=layout)  # type: ignore[call-overload] # torch types one of the two at a time
    loss = build_loss(job.loss)
    trainer = Trainer(
        model,
        build_optimizer(job.optimizer, model),
        data.training,
        job.schedule,
        loss_fn=loss,
        batch_transform=_with_layout(data.training_transform, layout),
        run_dir=run_dir,
        resume=resume,
        loggers=loggers,
        **_trainer_options(job),
    )
    judge = Judge(loss, _with_layout(data.evaluation_transform, layout))
    return Workload(job=job, trainer=trainer, evaluation=data.evaluation, judge=judge)


def load_data(settings: DataSettings) -> DataSets:
    """Read the data set of a job, built in or the user's own.

    Raises:
        DataMissing: It is not there.
        InvalidSetting: The target cannot be called.
    """
    return load_data_target(settings) if settings.target is not None else load_data_sets(settings)


def _trainer_options(job: Job) -> dict[str, Any]:
    """Fields of the job that the trainer takes under (nearly) the same names."""
    same = (
        "name",
        "seed",
        "micro_batch_size",
        "ghost_batch_size",
        "precision",
        "compile",
        "max_grad_norm",
        "on_non_finite",
        "momentum_correction",
        "deterministic",
        "micro_batches_per_pass",
        "spares",
        "num_workers",
        "metrics_port",
    )
    return {
        **{field: getattr(job, field) for field in same},
        "job": job.dump(),
        "trajectory": {part: known for part, known in job.fingerprint().items() if part in _TRAINERS_BLIND_SPOTS},
        "checkpoint_every": str(job.checkpoint.every),
        "checkpoint_location": job.checkpoint.location,
        "keep": job.checkpoint.keep,
        "momentum": job.optimizer.momentum,
        "adaptive_optimizer": job.optimizer.adaptive,
        "block_size": job.data.block_size,
        "tokens_per_sample": job.data.tokens_per_sample,
    }


def _check_num_samples(data: Dataset[Any], planned: int) -> None:
    found = count_samples(data, "data.target")
    if found != planned:
        remedy = f"Set data.num_samples: {found}, and look at the plan again"
        raise InvalidSetting("data.num_samples", planned, f"the training set holds {found} samples", remedy)


def _load_weights(model: nn.Module, place: str) -> None:
    try:
        model.load_state_dict(read_weights(place))
    except CheckpointDamaged as error:
        raise InvalidSetting("--init-from", place, f"must hold weights that can be read ({error.reason})") from error
    except RuntimeError as error:
        raise InvalidSetting("--init-from", place, f"does not fit the model: {error}") from error


_TRAINERS_BLIND_SPOTS = ("data", "model", "loss", "schedule")
"""Sections of a job that the trainer sees only as objects, and cannot name the differences of."""
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _with_layout(transform: BatchTransform | None, layout: torch.memory_format) -> BatchTransform | None:
    return transform if layout is torch.contiguous_format else LayoutTransform(layout, transform)
