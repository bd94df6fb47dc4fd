"""An average of the weights over the course of training."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from elastic_batch.errors import InvalidSetting


class EMA:
    """An exponential moving average of a model's parameters, whose horizon is counted in samples.

    Because its clock is the position, a growing batch leaves the averaged stretch of training as long as it was.
    Attached to a trainer (`trainer.attach(ema=ema)`) it follows every commit and is part of each checkpoint. Buffers
    are copied. Averages of parameters narrower than float32 are kept in float32, because most steps are too small for
    such a type to show; the averaged model has them rounded, the state as they are.

    Args:
        model: The model that trains; it is copied.
        horizon: Samples after which an old value's part has fallen to 1/e. Above 0.

    Attributes:
        model: The averaged model, for evaluation.

    Raises:
        InvalidSetting: The horizon is not above 0.
    """

    def __init__(self, model: nn.Module, horizon: float) -> None:
        if not horizon > 0:
            raise InvalidSetting("horizon", horizon, "must be a number of samples above 0")
        self.horizon = horizon
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._source = model
        self._averages: dict[str, Tensor] = {
            name: average.float() if average.dtype.itemsize < 4 else average
            for name, average in self.model.named_parameters()
        }

    @torch.no_grad()
    def after_update(self, num_samples: int) -> None:
        """Take in the model after an update of `num_samples` samples: part 1 - exp(-num_samples / horizon) of it."""
        part = -math.expm1(-num_samples / self.horizon)
        averages = list(self._averages.values())
        sources = [
            source.to(average.dtype) for source, average in zip(self._source.parameters(), averages, strict=True)
        ]
        torch._foreach_lerp_(averages, sources, part)
        self._round()
        for average, buffer in zip(self.model.buffers(), self._source.buffers(), strict=True):
            average.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict() | self._averages

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)
        for name, average in self._averages.items():
            average.copy_(state[name])

    def _round(self) -> None:
        for rounded, average in zip(self.model.parameters(), self._averages.values(), strict=True):
            if rounded is not average:
                rounded.copy_(average)
