"""What went wrong on one worker, and how all workers hear of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from elastic_batch.engines import Engine
from elastic_batch.errors import CannotFuse, MisusedTrainer, in_one_line

_TEXT_BYTES = 1000
_ALLOCATION_FAILED = ("can't allocate memory", "_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
"""What plain runtime errors say: of torch's host allocator, of cuBLAS, cuDNN and their kin, of CUDA itself."""


class Severity(IntEnum):
    """What a failure of one worker means for the update that all repeat."""

    NONE = 0
    SEEDED = 1
    """It will try again with more generators seeded; this does not count as a failed try."""
    NARROWER = 2
    """It will try again with a narrower pass; this does not count as a failed try."""
    ONCE = 3
    """It may be gone at the next try; if not, the run stops."""
    FINAL = 4
    """No repetition helps: the run stops."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A local failure in an update.

    Args:
        severity: What it means.
        text: One line for people; at most 1 000 bytes of it reach the other workers.
    """

    severity: Severity
    text: str


def judge(error: Exception, pass_width: int) -> Failure:
    """How bad `error` is, raised while a pass of `pass_width` micro-batches was fetched or run."""
    if is_out_of_memory(error):
        if pass_width > 1:
            return Failure(Severity.NARROWER, f"out of memory with {pass_width} micro-batches in a pass")
        text = f"out of memory with a single micro-batch in a pass; lower micro_batch_size ({in_one_line(error)})"
        return Failure(Severity.ONCE, text)
    if isinstance(error, CannotFuse):
        return Failure(Severity.NARROWER, in_one_line(error))
    severity = Severity.FINAL if isinstance(error, MisusedTrainer) else Severity.ONCE
    return Failure(severity, in_one_line(error))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or on the host."""
    is_typed = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_typed or any(words in str(error) for words in _ALLOCATION_FAILED)


def exchange(engine: Engine, failure: Failure | None, device: torch.device) -> dict[int, Failure]:
    """Tell every worker what failed where. A collective: all workers call it together.

    Args:
        engine: The world.
        failure: This worker's, if any.
        device: Where the engine's tensors lie.

    Returns:
        Rank -> failure, of the workers that have one.

    Raises:
        WorldBroken: The world broke meanwhile.
    """
    table = torch.zeros(engine.size, 1 + _TEXT_BYTES, dtype=torch.uint8)  # (rank, severity and text)
    if failure is not None:
        table[engine.rank] = _encode(failure)
    table = table.to(device)
    engine.all_reduce(table).wait()
    return {rank: _decode(row) for rank, row in enumerate(table.cpu()) if row[0]}


def texts(failures: Mapping[int, Failure]) -> dict[int, str]:
    """Rank -> the failure's line."""
    return {rank: failure.text for rank, failure in failures.items()}


def _encode(failure: Failure) -> Tensor:
    text = failure.text.encode()[:_TEXT_BYTES]
    return torch.tensor([failure.severity, *text.ljust(_TEXT_BYTES, b"\0")], dtype=torch.uint8)


def _decode(row: Tensor) -> Failure:
    severity, *text = row.tolist()
    return Failure(Severity(severity), bytes(text).rstrip(b"\0").decode(errors="replace"))
