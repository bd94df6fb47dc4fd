"""The gradient of a whole beside those of its parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

_TOLERANCE = 2e-3
"""Relative: above what TF32 rounding does to a gradient, below what a wrong mean shows even in an untrained model."""
_ROUNDINGS = 4
"""The same for shorter types, in units of their rounding: 3 % in bf16, where right losses show up to 0.7 %."""
_FP16_SCALE = 2.0**10
"""Keeps the gradients of fp16 away from zero."""


class GradientComparison:
    """Takes a gradient from others, and says how much is left of it.

    It compares as closely as the types allow in which gradients are computed.

    Args:
        parameters: Of whose gradients; what is added up lies in none of them.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = parameters
        self._types = {parameter.dtype for parameter in parameters}
        self._left: tuple[Tensor | None, ...] = (None,) * len(parameters)
        self._norms: list[float] = []

    @property
    def num_added(self) -> int:
        """Losses taken so far, the whole's included."""
        return len(self._norms)

    def add(self, loss: Tensor, factor: float) -> None:
        """Take the whole's loss, or after it a part's, each times its factor.

        One whose backward is not to be had this way (reentrant checkpointing, memory) is not counted.
        """
        if torch.is_autocast_enabled(loss.device.type):
            self._types.add(torch.get_autocast_dtype(loss.device.type))
        if torch.float16 in self._types:
            loss = loss * _FP16_SCALE
        try:
            with torch.autocast(loss.device.type, enabled=False):
                gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        except RuntimeError:
            return  # what is really wrong will show in the backward
        sign = -1.0 if self._norms else 1.0
        self._left = tuple(map(_sum, self._left, (_scaled(gradient, sign * factor) for gradient in gradients)))
        self._norms.append(_norm(gradients))

    def excess(self) -> float | None:
        """How far the whole is from its parts, by the largest of the gradients; None: no farther than rounding."""
        difference = _norm(self._left) / max(*self._norms, torch.finfo(torch.float32).tiny)
        allowed = max(_TOLERANCE, *(_ROUNDINGS * torch.finfo(kind).eps for kind in self._types))
        return difference if difference > allowed else None


def _scaled(gradient: Tensor | None, factor: float) -> Tensor | None:
    return None if gradient is None else gradient * factor


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return first if second is None else second if first is None else first.add_(second)


def _norm(gradients: Iterable[Tensor | None]) -> float:
    # Those of embeddings may be sparse.
    dense = (gradient.to_dense() for gradient in gradients if gradient is not None)
    return math.hypot(*(float(torch.linalg.vector_norm(gradient)) for gradient in dense))
