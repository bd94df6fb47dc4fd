"""One state for all workers of a new world: the most advanced worker's, sent to those that have another one or none."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic_batch.checkpoint import put_together, take_apart
from elastic_batch.engines import Engine
from elastic_batch.errors import WorldBroken
from elastic_batch.failpoints import reach


@dataclass(frozen=True, slots=True, order=True)
class Whereabouts:
    """Which state a worker has; the greatest one wins.

    Args:
        origin: Generation of the world that made the state; -1: the worker has no whole state.
        position: Samples committed in it.
    """

    origin: int = -1
    position: int = 0


NOWHERE = Whereabouts()


@dataclass(frozen=True, slots=True)
class Muster:
    """What the workers of a new world told each other.

    Args:
        all: Each worker's whereabouts, by rank.
        evaluating: Which evaluation since the last update each of them is in the middle of, from 1; 0: none.
    """

    all: tuple[Whereabouts, ...]
    evaluating: tuple[int, ...]

    @property
    def evaluates_together(self) -> bool:
        """Whether all are in the middle of the same evaluation."""
        return min(self.evaluating) == max(self.evaluating) > 0

    @property
    def source(self) -> int:
        """The rank whose state all take: the lowest of those with the greatest."""
        return self.all.index(max(self.all))

    @property
    def agreed(self) -> bool:
        """Whether all have the same state already."""
        return min(self.all) == max(self.all) != NOWHERE


def muster(engine: Engine, mine: Whereabouts, *, evaluating: int, device: torch.device) -> Muster:
    """Tell all workers of a new world where this one is. A collective.

    Raises:
        WorldBroken: The world broke meanwhile.
    """
    rows = torch.zeros(engine.size, 3, dtype=torch.float64, device=device)
    rows[engine.rank] = torch.tensor([mine.origin, mine.position, evaluating])
    engine.all_reduce(rows).wait()
    table = rows.tolist()
    places = tuple(Whereabouts(int(origin), int(position)) for origin, position, _ in table)
    return Muster(places, tuple(int(row[2]) for row in table))


def hand_over(
    engine: Engine, source: int, collect: Callable[[], Any], *, wanted: bool, device: torch.device
) -> Any | None:
    """Bring the state of the worker `source` to those that want it. A collective.

    It arrives beside what the receiver has: until all of it is here and its digest agrees, nothing is given up.

    Args:
        engine: The world.
        source: The rank that sends.
        collect: Gives the state there: tensors, numbers, strings in dicts, lists, tuples.
        wanted: Whether this worker is to have it; the others only take part.
        device: Where the engine's tensors lie.

    Returns:
        The state on `device`, for those that want it; on the host what the sender has there (the steps of Adam, say).

    Raises:
        WorldBroken: The world broke meanwhile, or what arrived is not what was sent.
        UnsavableState: Something in the state could not be read back without running code.
    """
    sends = engine.rank == source
    nesting, tensors = take_apart(collect()) if sends else (None, [])
    outline = _share_outline(engine, source, nesting, tensors, device)
    received: list[Tensor] = []
    checksum = 0
    for index, (shape, dtype, home) in enumerate(outline["tensors"]):
        tensor = tensors[index].to(device).contiguous() if sends else torch.empty(shape, dtype=dtype, device=device)
        reach("transfer.tensor")
        if tensor.numel():
            engine.broadcast(tensor.view(-1).view(torch.uint8), source).wait()  # gloo knows few types
        if sends or wanted:
            checksum = _checksum(tensor, checksum)
        if wanted:
            received.append(tensor.cpu() if home == "cpu" else tensor)
    expected = torch.tensor([checksum], dtype=torch.int64, device=device)
    engine.broadcast(expected, source).wait()
    if not wanted:
        return None
    if int(expected) != checksum:
        raise WorldBroken("the state that arrived is not the one that was sent", engine.generation)
    return put_together(outline["nesting"], received)


def _share_outline(
    engine: Engine, source: int, nesting: Any, tensors: list[Tensor], device: torch.device
) -> dict[str, Any]:
    """The state's nesting and its tensors' shapes, types and kinds of device, on every worker."""
    buffer = io.BytesIO()
    if engine.rank == source:
        kinds = [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors]
        torch.save({"nesting": nesting, "tensors": kinds}, buffer)
    length = torch.tensor([buffer.tell()], dtype=torch.int64, device=device)
    engine.broadcast(length, source).wait()
    text = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if engine.rank == source:
        text.copy_(torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8))
    engine.broadcast(text, source).wait()
    outline: dict[str, Any] = torch.load(io.BytesIO(text.cpu().numpy().tobytes()), weights_only=True)
    return outline


def _checksum(tensor: Tensor, start: int) -> int:
    return zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().data, start)
