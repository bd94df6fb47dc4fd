"""Number formats: autocast for the forward, and the loss scale that fp16 needs."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

Precision = Literal["float32", "bf16", "fp16"]

_INITIAL_SCALE = 2.0**16
_GROWTH_INTERVAL = 2000
"""Updates without an overflow after which the scale doubles (as in mixed-precision practice)."""


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a forward runs: the model's own format, or autocast to bf16 or fp16."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a backward runs, wherever it is called."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


class LossScaler:
    """The factor that keeps fp16 gradients away from zero.

    Backward runs on loss_sum * factor; the division by the update's weight takes the factor out again. Half of the
    factor is a power of two near a micro-batch's nominal weight, because a sum of losses is that much larger than the
    mean for which scales are usually chosen. Overflow is judged on the reduced gradient, so that all workers judge
    alike.

    Args:
        precision: Scaling is off (a factor of 1) unless it is `fp16`.
        nominal_weight: Samples of a micro-batch.
    """

    def __init__(self, precision: Precision, nominal_weight: int) -> None:
        self._enabled = precision == "fp16"
        self._shift = 2.0 ** -round(math.log2(nominal_weight))
        self.scale = _INITIAL_SCALE
        self._good_updates = 0

    @property
    def enabled(self) -> bool:
        return self._enabled

    @property
    def factor(self) -> float:
        """What the loss sum is multiplied by."""
        return self.scale * self._shift if self._enabled else 1.0

    def record(self, *, overflow: bool) -> None:
        """Adapt the scale after an update: halve it on overflow, double it after a long time without."""
        if not self._enabled:
            return
        if overflow:
            self.scale, self._good_updates = self.scale / 2, 0
            return
        self._good_updates += 1
        if self._good_updates == _GROWTH_INTERVAL:
            self.scale, self._good_updates = self.scale * 2, 0

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "good_updates": self._good_updates}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale, self._good_updates = state["scale"], int(state["good_updates"])
