"""The gradients of a worker that is alone: what autograd leaves in `.grad` is the sum."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import is_

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


_SMALL = 2**14
"""Vectors of up to this many elements share one norm: a norm of each would take longer than copying them."""


class LoneSums:
    """Sums that nobody adds to: nothing is zeroed, added or copied for them, and hooks run for narrow parameters only.

    Who else changes a gradient is noticed at the next backward, or at the end, by the tensors and their versions.

    Args:
        parameters: What the optimizer trains, in its order.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = parameters
        self._is_wide = [parameter.dtype in (torch.float32, torch.float64) for parameter in parameters]
        self._is_small = [parameter.dim() == 1 and parameter.numel() <= _SMALL for parameter in parameters]
        self._left: list[Tensor | None] = []  # in each `.grad`, by the last backward: the sums of wide parameters
        self._versions: list[int | None] = []
        self._narrow: dict[int, Tensor] = {}  # the sums of the other parameters
        self._memories: set[int] = set()
        self._hooks: list[RemovableHandle] = []
        self._is_complete = False  # whether no parameter can get its first gradient any more
        self._accepting = False

    def begin(self) -> None:
        """Forget every gradient."""
        if not self._hooks:
            self._hooks = [
                hook(parameter, partial(self._add_narrow, index))
                for index, parameter in enumerate(self._parameters)
                if not self._is_wide[index]
            ]
        self._forget()

    def release(self) -> None:
        """Let go of the parameters and their gradients."""
        for each in self._hooks:
            each.remove()
        self._hooks = []
        self._forget()

    @property
    def seen(self) -> tuple[bool, ...]:
        return tuple([gradient is not None or index in self._narrow for index, gradient in enumerate(self._left)])

    def check(self) -> None:
        if not all(map(is_, self._gradients(), self._left)):
            raise MisusedTrainer(_CHANGED)
        self._check_versions()

    def accepting(self, reduce_with: Engine | None = None, norms: list[Tensor] | None = None) -> _Accepting:
        return _Accepting(self)

    def open(self) -> None:
        """A backward begins."""
        if self._is_complete:
            self._check_versions()  # a gradient that was replaced shows in the end
        else:
            self.check()
        self._accepting = True

    def shut(self, *, has_added: bool) -> None:
        """It ended: what it left are the sums, unless it failed."""
        self._accepting = False
        if not has_added:
            return
        if not self._is_complete:
            self._take(self._gradients())
            self._is_complete = all(gradient is not None for gradient in self._left)
        self._versions = _versions(self._left)

    def flush(self, engine: Engine, norms: list[Tensor] | None = None) -> None:
        """Nothing is to be reduced."""

    def wait(self) -> None:
        """Nothing was launched."""

    def norms(self) -> list[Tensor]:
        sums = list(zip(self._left, self._is_small, strict=True))
        tensors = [total for total, is_small in sums if total is not None and not is_small]
        tensors += self._narrow.values()
        if small := [total for total, is_small in sums if total is not None and is_small]:
            tensors.append(torch.cat(small))
        return list(torch._foreach_norm(tensors)) if tensors else []

    def finish(self, factor: float, seen_by_any: Sequence[bool]) -> None:
        tensors = [total for total in self._left if total is not None] + list(self._narrow.values())
        if factor != 1 and tensors:
            torch._foreach_mul_(tensors, factor)
        for index, total in self._narrow.items():
            self._parameters[index].grad = total.to(self._parameters[index].dtype)

    def _gradients(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self._parameters]

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        self._left, self._versions = [None] * len(self._parameters), [None] * len(self._parameters)
        self._narrow.clear()
        self._memories.clear()
        self._is_complete = False

    def _check_versions(self) -> None:
        if _versions(self._left) != self._versions:
            raise MisusedTrainer(_CHANGED)

    def _take(self, found: list[Tensor | None]) -> None:
        """Make what a first backward left the sums."""
        if (memories := _memories(found)) is not None and not self._memories:
            self._left, self._memories = found, memories
            return
        for index, gradient in enumerate(found):
            left = self._left[index]
            if gradient is left:
                continue
            if gradient is None or left is not None:
                raise MisusedTrainer(_CHANGED)
            # A sum is changed in place, so it is to be dense, in memory that no other one has.
            if gradient.is_sparse:
                gradient = self._parameters[index].grad = gradient.to_dense()
            if gradient.untyped_storage().data_ptr() in self._memories:  # two views that were added, say
                gradient = self._parameters[index].grad = gradient.clone()
            self._memories.add(gradient.untyped_storage().data_ptr())
            self._left[index] = gradient

    def _add_narrow(self, index: int, parameter: Tensor) -> None:
        """Add a gradient as soon as it is there, so that not all of them are at once."""
        gradient = parameter.grad
        assert gradient is not None
        if not self._accepting:
            raise MisusedTrainer(_CHANGED)
        total = self._narrow.get(index)
        self._narrow[index] = gradient.to_dense().to(torch.float32) if total is None else total.add_(gradient)
        parameter.grad = None


class _Accepting:
    """The time of one backward. A generator would do, at five times the cost: it runs once for each pass."""

    def __init__(self, sums: LoneSums) -> None:
        self._sums = sums

    def __enter__(self) -> None:
        self._sums.open()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._sums.shut(has_added=kind is None)


def _memories(gradients: Sequence[Tensor | None]) -> set[int] | None:
    """Where they lie, if each is there, dense, and in memory of its own: the usual case."""
    try:
        memories = {gradient.untyped_storage().data_ptr() for gradient in gradients if gradient is not None}
    except NotImplementedError:  # one is sparse
        return None
    return memories if len(memories) == len(gradients) else None


def _versions(gradients: Sequence[Tensor | None]) -> list[int | None]:
    return [None if gradient is None else gradient._version for gradient in gradients]
