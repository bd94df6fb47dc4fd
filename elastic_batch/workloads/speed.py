"""Timing of a job's real model on this machine, without the job's data where the data set is built in."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from elastic_batch.ghost import convert_batch_norm
from elastic_batch.job import Job
from elastic_batch.workloads.catalog import DATA_SETS
from elastic_batch.workloads.data_target import load_data_target
from elastic_batch.workloads.devices import choose_device
from elastic_batch.workloads.losses import LossFunction, build_loss
from elastic_batch.workloads.networks import build_model
from elastic_batch.workloads.optimizers import build_optimizer
from elastic_batch.workloads.step_times import StepTimes

_WIDTHS = (1, 2, 4, 8, 16)
_SECONDS_PER_WIDTH = 2.0
_LEAST_REPETITIONS = 3
_SECONDS_IN_ALL = 30.0
"""No wider pass is tried after this long: a plan should not take minutes."""


def measure_steps(job: Job, *, max_width: int) -> StepTimes:
    """Time forward and backward passes of several widths, and the optimizer's step.

    Args:
        job: Which model, on what data; random images stand for a built-in data set.
        max_width: Micro-batches of the largest update; no pass is wider.

    Raises:
        ElasticBatchError: The model or the user's data set cannot be had.
    """
    device = choose_device(job.device, {})
    if job.num_threads is not None:
        torch.set_num_threads(job.num_threads)
    facts = DATA_SETS.get(job.data.name or "")
    torch.manual_seed(job.seed)
    model = build_model(job.model, facts).to(device)
    convert_batch_norm(model, job.ghost_batch_size or job.micro_batch_size)
    model.train()
    loss_fn, optimizer = build_loss(job.loss), build_optimizer(job.optimizer, model)
    seconds: dict[int, float] = {}
    end = time.perf_counter() + _SECONDS_IN_ALL
    for width in _WIDTHS:
        if width > 1 and time.perf_counter() > end:
            break
        batch = _make_batch(job, width * job.micro_batch_size, device)
        run_pass = partial(_run_pass, job, model, loss_fn, batch)
        if width > max_width or (width > 1 and _draws_at_random(model, loss_fn, batch)):
            break
        try:
            seconds[width] = _time(run_pass, device)
        except torch.cuda.OutOfMemoryError:
            if width == 1:
                raise
            break
    return StepTimes(device=_describe(device), pass_seconds=seconds, step_seconds=_time(optimizer.step, device))


def _make_batch(job: Job, num_samples: int, device: torch.device) -> Any:
    facts = DATA_SETS.get(job.data.name or "")
    if facts is None:
        data = load_data_target(job.data).training
        length = len(data)  # type: ignore[arg-type] # map-style: it was checked for a length
        batch = default_collate([data[index % length] for index in range(num_samples)])
        return [part.to(device) for part in batch]
    channels, height, width = facts.image_shape
    if job.data.image_size is not None:
        height = width = job.data.image_size
    layout = torch.channels_last if job.memory_format == "channels_last" else torch.contiguous_format
    images = torch.randn(num_samples, channels, height, width, device=device).to(memory_format=layout)
    return [images, torch.randint(facts.num_classes, (num_samples,), device=device)]


def _run_pass(job: Job, model: nn.Module, loss_fn: LossFunction, batch: Any) -> None:
    number_format = torch.bfloat16 if job.precision == "bf16" else torch.float16
    with torch.autocast(batch[0].device.type, number_format, enabled=job.precision != "float32"):
        loss = loss_fn(model, batch)
    (loss[0] if isinstance(loss, tuple) else loss).backward()


def _draws_at_random(model: nn.Module, loss_fn: LossFunction, batch: Any) -> bool:
    """Whether a forward moves the random generator; then micro-batches are not run as one pass."""
    before = torch.get_rng_state()
    with torch.no_grad():
        loss_fn(model, batch)
    return not torch.equal(before, torch.get_rng_state())


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
