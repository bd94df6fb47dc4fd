"""The gradients of a worker that is alone: what autograd leaves in `.grad` is the sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from elastic_batch.engines import Engine
from elastic_batch.errors import MisusedTrainer

_CHANGED = (
    "a parameter's .grad was changed during an update; call update.backward(loss), not loss.backward(), and remove "
    "model.zero_grad(), clip_grad_norm_() and other code that changes gradients: the trainer clears and clips them"
)


class LoneSums:
    """Sums that nobody adds to: nothing is zeroed, added or copied for them, and no hook runs in a backward.

    Who else changes a gradient is noticed at the next backward, or at the end, by the tensors and their versions.

    Args:
        parameters: What the optimizer trains, in its order.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = parameters
        self._is_wide = [parameter.dtype in (torch.float32, torch.float64) for parameter in parameters]
        self._sums: list[Tensor | None] = []
        self._versions: list[int | None] = []
        self._memories: set[int] = set()
        self._is_torn = False  # a backward failed half-way: what it left is nobody's doing

    def begin(self) -> None:
        """Forget every gradient."""
        for parameter in self._parameters:
            parameter.grad = None
        self._sums = [None] * len(self._parameters)
        self._versions = [None] * len(self._parameters)
        self._memories.clear()
        self._is_torn = False

    def release(self) -> None:
        """Let go of the parameters and their gradients."""
        self.begin()

    @property
    def seen(self) -> tuple[bool, ...]:
        return tuple(total is not None for total in self._sums)

    def check(self) -> None:
        if self._is_torn:
            return
        for parameter, total, version in zip(self._parameters, self._sums, self._versions, strict=True):
            gradient = parameter.grad
            now = None if gradient is None else gradient._version
            if now != version or (gradient is not total and gradient is not None):
                raise MisusedTrainer(_CHANGED)

    @contextmanager
    def accepting(self, reduce_with: Engine | None = None, norms: list[Tensor] | None = None) -> Iterator[None]:
        self.check()
        self._is_torn = True
        yield
        self._is_torn = False
        for index, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient is not self._sums[index]:
                self._take(index, gradient)
            if parameter.grad is not None:
                self._versions[index] = parameter.grad._version

    def flush(self, engine: Engine, norms: list[Tensor] | None = None) -> None:
        self.check()

    def wait(self) -> None:
        """Nothing was launched."""

    def norms(self) -> list[Tensor]:
        tensors = self._tensors()
        return list(torch._foreach_norm(tensors)) if tensors else []

    def finish(self, factor: float, seen_by_any: Sequence[bool]) -> None:
        if factor != 1 and (tensors := self._tensors()):
            torch._foreach_mul_(tensors, factor)
        for parameter, total, is_wide in zip(self._parameters, self._sums, self._is_wide, strict=True):
            if total is not None and not is_wide:
                parameter.grad = total.to(parameter.dtype)

    def _tensors(self) -> list[Tensor]:
        return [total for total in self._sums if total is not None]

    def _take(self, index: int, gradient: Tensor) -> None:
        """Make what a backward left the sum, or add it."""
        total, parameter = self._sums[index], self._parameters[index]
        if not self._is_wide[index]:
            self._sums[index] = gradient.to_dense().to(torch.float32) if total is None else total.add_(gradient)
            parameter.grad = None
            return
        if total is not None:
            raise MisusedTrainer(_CHANGED)
        self._sums[index] = own = self._own(gradient)
        if own is not gradient:
            parameter.grad = own

    def _own(self, gradient: Tensor) -> Tensor:
        """A handed-over gradient as one that can be changed in place: dense, in memory that no other one has."""
        if gradient.is_sparse:
            return gradient.to_dense()
        memory = gradient.untyped_storage().data_ptr()
        if memory in self._memories:  # such as two views that were added
            return gradient.clone()
        self._memories.add(memory)
        return gradient
