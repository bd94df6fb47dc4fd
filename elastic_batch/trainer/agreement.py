"""Whether the workers of a world have the same: parameters, above all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from elastic_batch.engines import Engine
from elastic_batch.errors import WorkersDiverged

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MODULUS = 2**31 - 1


def digest(tensors: Iterable[Tensor]) -> int:
    """A number in [0, 2^31 - 1) that depends on every bit of the tensors and on their order."""
    total: Tensor | None = None
    for tensor in tensors:
        words = tensor.detach().reshape(-1).view(_WORDS[tensor.element_size()]).to(torch.int64)
        # Neighbouring weights differ, so that exchanged or shifted values do not cancel.
        places = torch.arange(1, words.numel() + 1, device=words.device) * 2654435761 % _MODULUS
        part = (words % _MODULUS * places % _MODULUS).sum() % _MODULUS
        total = part if total is None else (total * 31 + part) % _MODULUS
    return 0 if total is None else int(total)


def require_same_parameters(engine: Engine, parameters: list[nn.Parameter], update: int) -> None:
    """Compare digests of the parameters over the workers. A collective.

    Raises:
        WorkersDiverged: They differ; it names the workers, and all of them raise it.
        WorldBroken: The world broke meanwhile.
    """
    if engine.size == 1:
        return
    if ranks := deviating_ranks(engine, digest(parameters), parameters[0].device):
        raise WorkersDiverged(update, ranks)


def deviating_ranks(engine: Engine, value: int, device: torch.device) -> list[int]:
    """Ranks whose `value`, in [0, 2^53), is not that of most workers; of rank 0 where there is no majority.

    A collective.
    """
    row = torch.zeros(engine.size, dtype=torch.float64, device=device)
    row[engine.rank] = value
    engine.all_reduce(row).wait()
    values = row.tolist()
    [(most_common, count)] = Counter(values).most_common(1)
    expected = most_common if 2 * count > engine.size else values[0]
    return [rank for rank, found in enumerate(values) if found != expected]
