"""How many micro-batches a worker runs as one pass: found by measuring speed and memory, or fixed by the user."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from elastic_batch.data import PassRequest, duplicate
from elastic_batch.errors import CannotFuse
from elastic_batch.randomness import preserved
from elastic_batch.schedule import Schedule
from elastic_batch.shares import share
from elastic_batch.trainer.buffers import preserved_buffers
from elastic_batch.trainer.failures import judge
from elastic_batch.trainer.fusing import obstacle_to_fusing
from elastic_batch.trainer.machinery import Machinery
from elastic_batch.trainer.options import TrainerOptions
from elastic_batch.trainer.precision import Precision

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

    Parameters, buffers, statistics and random generators are as before.

    Args:
        options: What was asked for.
        schedule: Says how many micro-batches there can be.
        position: Where the samples to measure with come from.
        model: As it is called: compiled, if so.
        loss_fn: None where the user's own loop runs the passes.
        machinery: Runs passes.
    """
    known = width_without_measuring(
        options.micro_batches_per_pass,
        model,
        options.micro_batch_size,
        precision=options.precision,
        deterministic=options.deterministic,
        owns_step=loss_fn is not None,
    )
    if known is not None:
        return known
    assert loss_fn is not None
    most = schedule.max_global_batch_size // options.micro_batch_size
    widest = len(share(most, machinery.engine.size, 0))

    def prepare(width: int) -> Callable[[], None]:
        machinery.source.start(iter([PassRequest(position, width)]))
        return partial(run_pass, width, machinery.source.next())

    def run_pass(width: int, batch: Any) -> None:
        gradients = machinery.gradients.begin(alone=machinery.engine.size == 1)
        machinery.statistics.begin()
        machinery.statistics.samples_per_pass = width * options.micro_batch_size
        with machinery.randomness.over(list(range(width)), machinery.device) as draws:
            with machinery.autocast.forward():
                loss = loss_fn(model, duplicate(batch))
            if reason := draws.stray():
                raise CannotFuse(position, [], reason)
            with gradients.accepting():
                (loss[0] if isinstance(loss, tuple) else loss).backward()

    with preserved(machinery.device), preserved_buffers(machinery.model):
        try:
            return choose_width(prepare, widest, machinery.device)
        except Exception as error:  # a mistake in the loss or the data; an update meets it too, and tells all workers
            logger.info("passes have one micro-batch, because measuring failed: %s", judge(error, 1).text)
            return 1


def width_without_measuring(
    wanted: int | Literal["auto"],
    model: nn.Module,
    micro_batch_size: int,
    *,
    precision: Precision,
    deterministic: bool,
    owns_step: bool = True,
) -> int | None:
    """The width that is asked for or the only one allowed; None: the fastest is to be found by measuring.

    Args:
        wanted: What was asked for.
        model: As it is called: compiled, if so.
        micro_batch_size: In samples.
        precision: What the forward pass computes in.
        deterministic: Whether runs are to be equal to the bit.
        owns_step: Whether passes can be run without the user's own loop.
    """
    obstacle = obstacle_to_fusing(model, micro_batch_size)
    if obstacle is None and wanted != 1 and precision == "fp16":
        obstacle = "what overflows in fp16, and with it which updates are skipped, depends on how many a pass has"
    if obstacle is None and wanted == "auto" and deterministic:
        obstacle = "what is fastest may differ from run to run, and with it the rounding"
    if obstacle is None and wanted == "auto" and not owns_step:
        obstacle = "they are only measured where the trainer owns the step"
    if obstacle is not None:
        logger.info("passes have one micro-batch, because %s", obstacle)
        return 1
    return None if wanted == "auto" else wanted


def choose_width(
    prepare: Callable[[int], Callable[[], None]],
    widest: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Try passes of 1, 2, 4, ... micro-batches and return the fastest for each micro-batch.

    The search ends at a pass that cannot be run, or after two that gain nothing.

    Args:
        prepare: Loads the batch of a pass of a width; what it gives runs the pass and forgets what it did.
        widest: The most micro-batches that this worker ever has in an update.
        device: What to wait for when taking times.
        clock: Seconds.
    """
    seconds = measure_widths(partial(_seconds_of_pass, prepare, device=device, clock=clock), powers_of_two(widest))
    best = fastest(seconds)
    logger.info("micro-batches of a pass: %d (%.3g s for each)", best, seconds[best] / best)
    return best


def measure_widths(measure: Callable[[int], float], widths: Iterable[int]) -> dict[int, float]:
    """Seconds of passes by width, until one cannot be run or is twice as wide as one that gained nothing.

    Args:
        measure: Gives the seconds of a pass of a width.
        widths: What to try besides 1, ascending.
    """
    seconds = {1: measure(1)}
    for width in widths:
        try:
            seconds[width] = measure(width)
        # Single micro-batches ran: what a wider pass meets are the limits of memory, of a kernel, or of the model.
        except (CannotFuse, RuntimeError, MemoryError) as error:
            logger.info("passes of %d micro-batches cannot be run: %s", width, judge(error, width).text)
            break
        if width >= 4 * fastest(seconds):
            break
    return seconds


def fastest(pass_seconds: Mapping[int, float]) -> int:
    """The width with the fewest seconds for each micro-batch; a wider pass must gain enough to be worth its memory.

    Args:
        pass_seconds: Width -> seconds of a pass, ascending from 1.

    >>> fastest({1: 1.0, 2: 1.98, 4: 2.0})
    4
    """
    best = 1
    for width, seconds in pass_seconds.items():
        if seconds / width * _LEAST_GAIN < pass_seconds[best] / best:
            best = width
    return best


def powers_of_two(widest: int) -> Iterator[int]:
    """2, 4, 8, ... up to `widest`."""
    width = 2
    while width <= widest:
        yield width
        width *= 2


def _seconds_of_pass(
    prepare: Callable[[int], Callable[[], None]], width: int, device: torch.device, clock: Callable[[], float]
) -> float:
    """Median seconds of a pass; neither its data nor the first one, with its allocations, are counted."""
    run = prepare(width)
    run()
    times = []
    for _ in range(_REPETITIONS):
        _synchronize(device)
        start = clock()
        run()
        _synchronize(device)
        times.append(clock() - start)
    return median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
