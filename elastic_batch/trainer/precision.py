"""Number formats: autocast for the forward, and the loss scale that fp16 needs."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["float32", "bf16", "fp16"]

_NOTHING: AbstractContextManager[Any] = nullcontext()

_INITIAL_SCALE = 2.0**16
_LEAST_SCALE = 1.0
"""Where scaling does not enlarge gradients any more, one that is not finite is not the scale's doing."""
_GROWTH_INTERVAL = 2000
"""Updates without an overflow after which the scale doubles (as in mixed-precision practice)."""


class Autocast:
    """In which format passes run on a device.

    Args:
        precision: `float32` is the model's own format.
        device: Where the model computes.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self._type = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self._device_type = device.type

    def forward(self) -> AbstractContextManager[Any]:
        """The model's own format, or autocast to bf16 or fp16."""
        return _NOTHING if self._type is None else torch.autocast(self._device_type, self._type)

    def backward(self, loss: Tensor, gradient: Tensor) -> None:
        """Run the loss's backward without the autocast of the forward, inside which it is asked for."""
        if self._type is None:
            loss.backward(gradient)
            return
        with torch.autocast(self._device_type, enabled=False):
            loss.backward(gradient)


class LossScaler:
    """What loss sums are divided by before their backward, so that fp16 gradients stay away from zero.

    The division by the update's weight makes up for it. Without scaling it is the number of the update's samples: with
    mean losses that is the weight, and the gradient needs no further division. With scaling it is a power of two near a
    micro-batch's nominal weight, which makes a sum of losses about a mean, over the scale. Overflow is judged on the
    reduced gradient, so that all workers judge alike.

    Args:
        precision: Scaling is off unless it is `fp16`.
        nominal_weight: Samples of a micro-batch.
    """

    def __init__(self, precision: Precision, nominal_weight: int) -> None:
        self._enabled = precision == "fp16"
        self._nominal_weight = 2.0 ** round(math.log2(nominal_weight))
        self.scale = _INITIAL_SCALE
        self._good_updates = 0

    @property
    def may_overflow(self) -> bool:
        """Whether a gradient that is not finite is to be expected, and mended by a lower scale."""
        return self._enabled and self.scale > _LEAST_SCALE

    def divisor(self, num_samples: int) -> float:
        """What loss sums are divided by in an update of `num_samples` samples."""
        return self._nominal_weight / self.scale if self._enabled else num_samples

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
