"""Timing of a job's real model on this machine, without the job's data where the data set is built in."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import takewhile
from statistics import median
from typing import Any

import torch
from torch.utils.data import TensorDataset

from elastic_batch.data import BatchSource, CannotFuse, PassRequest, count_samples, duplicate, open_source
from elastic_batch.ghost import RunningStatistics, convert_batch_norm
from elastic_batch.job import Job
from elastic_batch.stream import SampleStream
from elastic_batch.trainer.assembly import make_deterministic
from elastic_batch.trainer.passes import fastest, measure_widths, powers_of_two, width_without_measuring
from elastic_batch.trainer.precision import Autocast
from elastic_batch.trainer.stochastic import PassRandomness
from elastic_batch.workloads.augmentation import LayoutTransform
from elastic_batch.workloads.catalog import DATA_SETS
from elastic_batch.workloads.data_sets import DataSets
from elastic_batch.workloads.data_target import load_data_target
from elastic_batch.workloads.devices import choose_device
from elastic_batch.workloads.losses import build_loss
from elastic_batch.workloads.networks import build_model
from elastic_batch.workloads.optimizers import build_optimizer
from elastic_batch.workloads.step_times import StepTimes

_SECONDS_PER_WIDTH = 2.0
_LEAST_REPETITIONS = 3
_SECONDS_IN_ALL = 30.0
"""No wider pass is tried after this long: a plan should not take minutes."""


def measure_steps(job: Job, *, max_width: int) -> StepTimes:
    """Time forward and backward passes of the widths that training would try, and the optimizer's step.

    Args:
        job: Which model, on what data; random images stand for a built-in data set.
        max_width: Micro-batches of the largest update; no pass is wider.

    Raises:
        ElasticBatchError: The model or the user's data set cannot be had.
    """
    device = choose_device(job.device, {})
    if job.num_threads is not None:
        torch.set_num_threads(job.num_threads)
    if job.deterministic:
        make_deterministic()
    torch.manual_seed(job.seed)
    worker = _Worker(job, device)
    known = width_without_measuring(
        job.micro_batches_per_pass,
        worker.model,
        job.micro_batch_size,
        precision=job.precision,
        deterministic=job.deterministic,
    )
    seconds = measure_widths(lambda width: _time(worker.prepare(width), device), _widths(known, max_width))
    return StepTimes(
        device=_describe(device),
        pass_seconds=seconds,
        step_seconds=_time(worker.optimizer.step, device),
        width=fastest(seconds) if known is None else max(seconds),
    )


def _widths(known: int | None, max_width: int) -> Iterable[int]:
    """What to measure besides single micro-batches."""
    if known is not None:
        return [known] if 1 < known <= max_width else []
    end = time.perf_counter() + _SECONDS_IN_ALL
    return takewhile(lambda _: time.perf_counter() < end, powers_of_two(max_width))


class _Worker:
    """What a worker would train with, made as the trainer makes it, and its passes."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self._job, self._device = job, device
        layout = torch.channels_last if job.memory_format == "channels_last" else torch.contiguous_format
        self.model = build_model(job.model, DATA_SETS.get(job.data.name or ""))
        self.model.to(device=device, memory_format=layout)  # type: ignore[call-overload] # torch types one of the two
        convert_batch_norm(self.model, job.ghost_batch_size or job.micro_batch_size)
        if job.compile:
            self.model.compile()
        self.model.train()
        self.optimizer = build_optimizer(job.optimizer, self.model)
        self._loss_fn = build_loss(job.loss)
        self._autocast = Autocast(job.precision, device)
        self._source = _open_source(job, device, layout)
        self._statistics = RunningStatistics(self.model)
        self._randomness = PassRandomness(self.model)

    def prepare(self, width: int) -> Callable[[], None]:
        """Load the batch of a pass; what is returned runs forward and backward."""
        self._source.start(iter([PassRequest(0, width)]))
        return partial(self._run, self._source.next(), width)

    def _run(self, batch: Any, width: int) -> None:
        self._statistics.begin()
        self._statistics.samples_per_pass = width * self._job.micro_batch_size
        with self._randomness.over(list(range(width)), self._device) as draws:
            with self._autocast.forward():
                loss = self._loss_fn(self.model, duplicate(batch))  # it may take from it
            if reason := draws.stray():
                raise CannotFuse(0, [], reason)
            (loss[0] if isinstance(loss, tuple) else loss).backward()


def _open_source(job: Job, device: torch.device, layout: torch.memory_format) -> BatchSource:
    data = _random_images(job) if job.data.target is None else load_data_target(job.data)
    transform = data.training_transform
    return open_source(
        data.training,
        stream=SampleStream(count_samples(data.training, "data.target"), job.seed),
        micro_batch_size=job.micro_batch_size,
        device=device,
        batch_transform=transform if layout is torch.contiguous_format else LayoutTransform(layout, transform),
    )


def _random_images(job: Job) -> DataSets:
    facts = DATA_SETS[job.data.name or ""]
    channels, height, width = facts.image_shape
    if job.data.image_size is not None:
        height = width = job.data.image_size
    images = torch.randn(job.micro_batch_size, channels, height, width)
    return DataSets(training=TensorDataset(images, torch.randint(facts.num_classes, (job.micro_batch_size,))))


def _time(function: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call, after one that is not counted."""
    function()
    _wait(device)
    seconds: list[float] = []
    while len(seconds) < _LEAST_REPETITIONS or sum(seconds) < _SECONDS_PER_WIDTH:
        start = time.perf_counter()
        function()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{platform.machine()} with {count} thread{'s' if count > 1 else ''}"
