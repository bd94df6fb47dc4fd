"""What workers do in the contract test that every engine must pass."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import torch

from elastic_batch.engines import Engine
from elastic_batch.errors import WorldBroken


def sum_in_every_type(engine: Engine) -> dict[str, list[float]]:
    """Sums of tensors in which each worker holds its rank + 1, launched together and waited for in the same order."""
    types = (torch.float32, torch.float64, torch.int64, torch.uint8)
    tensors = [torch.full((5,), engine.rank + 1, dtype=dtype) for dtype in types]
    for handle in [engine.all_reduce(tensor) for tensor in tensors]:
        handle.wait()
    return {str(tensor.dtype): tensor.tolist() for tensor in tensors}


def broadcast_from_last(engine: Engine) -> list[float]:
    tensor = torch.full((3,), float(engine.rank))
    engine.broadcast(tensor, source=engine.size - 1).wait()
    return tensor.tolist()


def describe(engine: Engine) -> tuple[int, int, int]:
    return engine.rank, engine.size, engine.generation


def abort_while_waiting(engine: Engine) -> tuple[str, float]:
    """Rank 0 waits for a collective that the others never join, and is woken by an abort in another thread.

    Returns what its wait raised, and after how many seconds from the abort; the others sleep meanwhile.
    """
    if engine.rank > 0:
        time.sleep(3)
        return "", 0.0
    tensor = torch.ones(4)
    handle = engine.all_reduce(tensor)
    if engine.size == 1:
        engine.abort()
    aborted_at: list[float] = []

    def abort() -> None:
        aborted_at.append(time.monotonic())
        engine.abort()

    timer = threading.Timer(0.3, abort)
    timer.start()
    started = time.monotonic()
    try:
        handle.wait()
    except WorldBroken as error:
        raised_at = time.monotonic()
        timer.join()
        return type(error).__name__, raised_at - (aborted_at[0] if aborted_at and engine.size > 1 else started)
    timer.join()
    return "nothing", 0.0


def launch_after_abort(engine: Engine) -> str:
    engine.check()
    engine.abort()
    raised = []
    for attempt in (engine.check, lambda: engine.all_reduce(torch.ones(1)).wait()):
        try:
            attempt()
        except WorldBroken as error:
            raised.append(type(error).__name__)
    return " ".join(raised)


def lose_a_peer(engine: Engine) -> Any:
    """The last rank dies; every other one must hear of it in its next collective."""
    if engine.rank == engine.size - 1:
        os._exit(1)
    try:
        for _ in range(100):
            engine.all_reduce(torch.ones(1000)).wait()
            time.sleep(0.01)
    except WorldBroken as error:
        # So that this worker's own connections close too, and its other neighbours hear of it.
        engine.abort()
        return type(error).__name__
    return "nothing"


def close_alone(engine: Engine) -> float:
    """Seconds that closing takes while the others are still at work."""
    if engine.rank > 0:
        time.sleep(1)
    started = time.monotonic()
    engine.close()
    return time.monotonic() - started
