"""How many micro-batches a worker runs as one pass: found by measuring speed and memory, or fixed by the user."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from elastic_batch.errors import CannotFuse
from elastic_batch.trainer.failures import is_out_of_memory

logger = logging.getLogger(__name__)

_LEAST_GAIN = 1.05
"""A wider pass must be this much faster for each micro-batch, or it only costs memory."""
_REPETITIONS = 3


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
    logger.info("passes have %d micro-batches: %.3g s for each", best, best_seconds)
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
