"""How many micro-batches a worker runs as one pass: found by measuring speed and memory, or fixed by the user."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from elastic_batch.data import PassRequest
from elastic_batch.errors import CannotFuse
from elastic_batch.randomness import preserved
from elastic_batch.schedule import Schedule
from elastic_batch.shares import share
from elastic_batch.trainer.failures import is_out_of_memory
from elastic_batch.trainer.fusing import obstacle_to_fusing
from elastic_batch.trainer.machinery import Machinery
from elastic_batch.trainer.options import TrainerOptions
from elastic_batch.trainer.precision import autocast

logger = logging.getLogger(__name__)

LossFn = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor | float]]
"""Of (model, batch): the mean loss over the batch's samples, or (sum of losses, weight to divide by)."""

_LEAST_GAIN = 1.05
"""A wider pass must be this much faster for each micro-batch, or it only costs memory."""
_REPETITIONS = 3


def settle_width(
    options: TrainerOptions,
    schedule: Schedule,
    position: int,
    model: nn.Module,
    loss_fn: LossFn | None,
    machinery: Machinery,
) -> int:
    """The width of passes: as asked for, or the fastest, where the result cannot depend on it; else 1, with a log line.

    Parameters, statistics and random generators are as before.

    Args:
        options: What was asked for.
        schedule: Says how many micro-batches there can be.
        position: Where the samples to measure with come from.
        model: As it is called: compiled, if so.
        loss_fn: None where the user's own loop runs the passes.
        machinery: Runs passes.
    """
    wanted = options.micro_batches_per_pass
    obstacle = obstacle_to_fusing(model, options.micro_batch_size)
    if obstacle is None and wanted == "auto" and options.deterministic:
        obstacle = "what is fastest may differ from run to run, and with it the rounding"
    if obstacle is None and wanted == "auto" and loss_fn is None:
        obstacle = "they are only measured where the trainer owns the step"
    if obstacle is not None:
        logger.info("passes have one micro-batch, because %s", obstacle)
        return 1
    if wanted != "auto":
        return wanted
    assert loss_fn is not None
    most = schedule.max_global_batch_size // options.micro_batch_size
    widest = len(share(most, machinery.engine.size, 0))

    def run_pass(width: int) -> None:
        machinery.source.start(iter([PassRequest(position, width)]))
        batch = machinery.source.next()
        gradients = machinery.gradients.begin(alone=machinery.engine.size == 1)
        machinery.statistics.begin()
        machinery.statistics.samples_per_pass = width * options.micro_batch_size
        with machinery.randomness.over(list(range(width)), machinery.device) as draws:
            with autocast(options.precision, machinery.device):
                loss = loss_fn(model, batch)
            if reason := draws.stray():
                raise CannotFuse(position, [], reason)
            with gradients.accepting():
                (loss[0] if isinstance(loss, tuple) else loss).backward()

    with preserved(machinery.device):
        return choose_width(run_pass, widest, machinery.device)


def choose_width(
    run_pass: Callable[[int], None],
    widest: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Try passes of 1, 2, 4, ... micro-batches and return the fastest for each micro-batch.

    A pass that does not fit in memory, or cannot be one batch, ends the search.

    Args:
        run_pass: Runs one pass of a width and forgets what it did.
        widest: The most micro-batches that this worker ever has in an update.
        device: What to wait for when taking times.
        clock: Seconds.
    """
    best, best_seconds = 1, _seconds_for_each(run_pass, 1, device, clock)
    for width in _powers_of_two(widest):
        try:
            seconds = _seconds_for_each(run_pass, width, device, clock)
        except CannotFuse as error:
            logger.info("passes have one micro-batch: %s", error)
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            break
        if seconds * _LEAST_GAIN < best_seconds:
            best, best_seconds = width, seconds
    logger.info("micro-batches of a pass: %d (%.3g s for each)", best, best_seconds)
    return best


def _powers_of_two(widest: int) -> Iterator[int]:
    width = 2
    while width <= widest:
        yield width
        width *= 2


def _seconds_for_each(
    run_pass: Callable[[int], None], width: int, device: torch.device, clock: Callable[[], float]
) -> float:
    """Median seconds of a pass, divided by its micro-batches; the first one, with its allocations, is not counted."""
    run_pass(width)
    times = []
    for _ in range(_REPETITIONS):
        _synchronize(device)
        start = clock()
        run_pass(width)
        _synchronize(device)
        times.append(clock() - start)
    return median(times) / width


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
