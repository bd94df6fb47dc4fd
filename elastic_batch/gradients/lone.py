"""The gradients of a worker that is alone: what autograd leaves in `.grad` is the sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from elastic_batch.engines import Engine
from elastic_batch.errors import MisusedTrainer
from elastic_batch.gradients.hooks import hook

_CHANGED = (
    "a parameter's .grad was changed during an update; call update.backward(loss), not loss.backward(), and remove "
    "model.zero_grad(), clip_grad_norm_() and other code that changes gradients: the trainer clears and clips them"
)


class LoneSums:
    """Sums that nobody adds to: nothing is zeroed, added or copied for them, and hooks run for narrow parameters only.

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
        self._hooks: list[RemovableHandle] = []
        self._accepting = False

    def begin(self) -> None:
        """Forget every gradient."""
        if not self._hooks:
            self._hooks = [
                hook(parameter, partial(self._add_narrow, index))
                for index, parameter in enumerate(self._parameters)
                if not self._is_wide[index]
            ]
        for parameter in self._parameters:
            parameter.grad = None
        self._sums = [None] * len(self._parameters)
        self._versions = [None] * len(self._parameters)
        self._memories.clear()

    def release(self) -> None:
        """Let go of the parameters and their gradients."""
        for each in self._hooks:
            each.remove()
        self._hooks = []
        self._sums, self._versions = [], []
        for parameter in self._parameters:
            parameter.grad = None

    @property
    def seen(self) -> tuple[bool, ...]:
        return tuple(total is not None for total in self._sums)

    def check(self) -> None:
        for parameter, total, version in zip(self._parameters, self._sums, self._versions, strict=True):
            gradient = parameter.grad
            now = None if gradient is None else gradient._version
            if now != version or (gradient is not total and gradient is not None):
                raise MisusedTrainer(_CHANGED)

    @contextmanager
    def accepting(self, reduce_with: Engine | None = None, norms: list[Tensor] | None = None) -> Iterator[None]:
        self.check()
        self._accepting = True
        try:
            yield
        finally:
            self._accepting = False
        for index, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient is not self._sums[index]:
                gradient = self._take(index, gradient)
            self._versions[index] = gradient._version

    def flush(self, engine: Engine, norms: list[Tensor] | None = None) -> None:
        """Nothing is to be reduced."""

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

    def _take(self, index: int, gradient: Tensor) -> Tensor:
        """Make what the first backward left the sum."""
        if self._sums[index] is not None:
            raise MisusedTrainer(_CHANGED)
        self._sums[index] = own = self._own(gradient)
        if own is not gradient:
            self._parameters[index].grad = own
        return own

    def _add_narrow(self, index: int, parameter: Tensor) -> None:
        """Add a gradient as soon as it is there, so that not all of them are at once."""
        total, gradient = self._sums[index], parameter.grad
        assert gradient is not None
        if not self._accepting:
            raise MisusedTrainer(_CHANGED)
        self._sums[index] = gradient.to_dense().to(torch.float32) if total is None else total.add_(gradient)
        parameter.grad = None

    def _own(self, gradient: Tensor) -> Tensor:
        """A handed-over gradient as one that can be changed in place: dense, in memory that no other one has."""
        if gradient.is_sparse:
            return gradient.to_dense()
        memory = gradient.untyped_storage().data_ptr()
        if memory in self._memories:  # such as two views that were added
            return gradient.clone()
        self._memories.add(memory)
        return gradient
