"""Is a user's mean loss really the mean over samples? The first micro-batch is compared with its two halves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from elastic_batch.errors import MisusedTrainer

_TOLERANCE = 1e-2
"""Relative: far above what bf16 rounding does to a mean, far below what a wrong one shows."""


class MeanCheck:
    """Compares a loss over a micro-batch with the losses over its halves, in evaluation mode and uncompiled.

    With `ignore_index`, class weights or negatives taken from the batch, a mean over the batch is not the mean of its
    samples' losses, and dividing the summed gradient by the number of samples would change with the micro-batch size.

    Args:
        model: Put into evaluation mode meanwhile, where samples do not influence each other.
        batch: A micro-batch.
        num_samples: Its samples, along the first axis of its tensors.
    """

    def __init__(self, model: nn.Module, batch: Any, num_samples: int) -> None:
        self._model = model
        self._batch = batch
        self._num_samples = num_samples
        self._losses: list[float] = []

    def parts(self) -> Iterator[Any]:
        """The whole batch and its halves, each to be answered by `record`; nothing if it cannot be halved."""
        half = self._num_samples // 2
        if half == 0 or not _has_samples_first(self._batch, self._num_samples):
            return
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                for start, stop in ((0, self._num_samples), (0, half), (half, self._num_samples)):
                    yield _slice(self._batch, start, stop)
        finally:
            for module, mode in modes:
                module.training = mode

    def record(self, loss: Tensor) -> None:
        """Take the mean loss of the part at hand."""
        self._losses.append(float(loss.detach()))

    def verify(self) -> None:
        """Compare.

        Raises:
            MisusedTrainer: The whole is not the mean of its halves.
        """
        if len(self._losses) != 3 or not all(map(math.isfinite, self._losses)):
            return
        whole, first, second = self._losses
        half = self._num_samples // 2
        mean = (first * half + second * (self._num_samples - half)) / self._num_samples
        if abs(whole - mean) > _TOLERANCE * max(abs(whole), abs(mean), abs(first - second), 1e-6):
            raise MisusedTrainer(
                f"the loss over a micro-batch is {whole:.6g}, but its halves' mean is {mean:.6g}: it is not a mean "
                "over samples (ignore_index, class weights or negatives from the batch do that). Give a sum and its "
                "weight: update.backward(loss_sum, weight=...), or (loss_sum, weight) from loss_fn. To keep the loss "
                "as it is, pass check_loss=False"
            )


def _has_samples_first(batch: Any, num_samples: int) -> bool:
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return bool(tensors) and all(tensor.dim() > 0 and tensor.shape[0] == num_samples for tensor in tensors)


def _slice(batch: Any, start: int, stop: int) -> Any:
    return tree_map(lambda leaf: leaf[start:stop] if isinstance(leaf, Tensor) else leaf, batch)
