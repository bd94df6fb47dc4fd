"""What workers do in tests of handing a state over."""

from __future__ import annotations

from typing import Any

import torch

from elastic_batch.engines import Engine
from elastic_batch.trainer.handover import Whereabouts, hand_over, muster


def exchange_states(engine: Engine, source: int) -> tuple[Any, int]:
    """Let `source` have the greatest state; return what this worker received, and who sent it."""
    weights = torch.full((3, 4), float(engine.rank), dtype=torch.float64)

    def collect() -> dict[str, Any]:
        return {
            "weights": weights,
            "tied": weights,
            "flags": torch.tensor([True, False, True]),
            "half": torch.ones(5, dtype=torch.bfloat16),
            "last": torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(7),
            "nested": [1, {"two": 2.5, 3: None}, "four"],
        }

    device = torch.device("cpu")
    mine = Whereabouts(1, 100 if engine.rank == source else 10)
    found = muster(engine, mine, evaluating=0, device=device)
    received = hand_over(engine, found.source, collect, wanted=engine.rank != found.source, device=device)
    return received, found.source
