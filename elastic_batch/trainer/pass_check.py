"""Is a pass of several micro-batches what they are one by one? The first such pass is compared with them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import Parameter

from elastic_batch.trainer.gradient_comparison import GradientComparison

_TOLERANCE = 1e-3
"""Of weights, relative."""


class PassCheck:
    """Compares a pass's gradient and weight with those of its micro-batches.

    What a model draws, normalizes or mixes along another axis than the samples' shows here: nothing tells from outside
    what the axes of a tensor inside a model mean. So do hooks that change gradients other than linearly.

    Args:
        parameters: What is trained.
        num_micro_batches: Of the pass.
    """

    def __init__(self, parameters: Sequence[Parameter], num_micro_batches: int) -> None:
        self._num_micro_batches = num_micro_batches
        self._comparison = GradientComparison(parameters)
        self._weights: list[float] = []
        self._stray: str | None = None

    def record(self, loss: Tensor, weight: Tensor | float | None, stray: str | None) -> None:
        """Take the loss of the pass, or after it of a micro-batch.

        Args:
            loss: A mean over samples, or a sum.
            weight: The sum's; None for a mean.
            stray: Why draws in the forward pass do not follow the micro-batches, if they do not.
        """
        self._stray = self._stray or stray
        is_part = bool(self._weights)
        share = 1 / self._num_micro_batches if weight is None and is_part else 1.0
        self._comparison.add(loss, share)
        self._weights.append(share if weight is None else float(weight))

    def obstacle(self) -> str | None:
        """Why passes must not have several micro-batches; None if nothing was found, or not all were answered."""
        if self._stray is not None:
            return self._stray
        if self._comparison.num_added != 1 + self._num_micro_batches:
            return None
        whole, *parts = self._weights
        if not math.isclose(whole, math.fsum(parts), rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
            return f"the weight of {len(parts)} micro-batches in one pass is {whole:g}, by themselves {sum(parts):g}"
        if (excess := self._comparison.excess()) is not None:
            return (
                f"the gradient of {len(parts)} micro-batches in one pass is {excess:.2%} away from the sum of theirs: "
                "something in the model, or a hook, does not keep samples apart along the first axis"
            )
        return None
