"""The gradients of a worker that has others: in flat buckets, which are reduced while the last backward still runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from elastic_batch.engines import Engine, Handle
from elastic_batch.errors import MisusedTrainer, WorldBroken
from elastic_batch.gradients.hooks import hook

DEFAULT_BUCKET_BYTES = 25 * 2**20


_REPLACED = (
    "a parameter's .grad was replaced during an update; remove model.zero_grad() and other code that sets gradients: "
    "the trainer clears them"
)


class BucketSums:
    """Sums that are slices of flat buckets, which are reduced in the order of their index.

    Buckets follow the parameters from the last to the first, which is about the order in which backward finishes them.
    A parameter's `.grad` is a view of its bucket, into which autograd adds.

    Args:
        parameters: What the optimizer trains, in its order.
        bucket_bytes: Size at which a bucket is full.
    """

    def __init__(self, parameters: Sequence[Parameter], bucket_bytes: int) -> None:
        self._slots = [_Slot(parameter) for parameter in parameters]
        self._buckets = _fill_buckets(list(reversed(self._slots)), bucket_bytes)
        self._flats: list[Tensor] = []
        self._accepting = False
        self._engine: Engine | None = None
        self._next_launch = 0
        self._handles: list[Handle] = []
        self._norms: list[Tensor] | None = None
        self._hooks: list[RemovableHandle] = []

    @property
    def seen(self) -> tuple[bool, ...]:
        return tuple(slot.seen for slot in self._slots)

    def begin(self) -> None:
        """Forget every gradient."""
        self._handles = []
        self._next_launch = 0
        self._engine = None
        if self._flats:
            torch._foreach_zero_(self._flats)
        else:
            self._flats = [bucket.allocate() for bucket in self._buckets]
            self._hooks = [hook(slot.parameter, self._make_hook(slot)) for slot in self._slots]
        for slot in self._slots:
            slot.seen = False
            grad = slot.sum if slot.is_own_type else None
            if slot.parameter.grad is not grad:
                slot.parameter.grad = grad
        for bucket in self._buckets:
            bucket.missing = len(bucket.slots)

    def check(self) -> None:
        for slot in self._slots:
            if slot.parameter.grad is not (slot.sum if slot.is_own_type else None):
                raise MisusedTrainer(_REPLACED)

    @contextmanager
    def accepting(self, reduce_with: Engine | None = None, norms: list[Tensor] | None = None) -> Iterator[None]:
        self._accepting, self._engine, self._norms = True, reduce_with, norms
        try:
            yield
        finally:
            self._accepting = False

    def flush(self, engine: Engine, norms: list[Tensor] | None = None) -> None:
        self._engine, self._norms = engine, norms
        while self._next_launch < len(self._flats):
            self._launch_next(engine)

    def wait(self) -> None:
        failure: Exception | None = None
        for handle in self._handles:
            try:
                handle.wait()
            except Exception as error:
                failure = error.with_traceback(None)
        self._handles = []
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # or this frame and the error hold each other, and the update's batches with them

    def norms(self) -> list[Tensor]:
        return list(torch._foreach_norm(self._flats)) if self._flats else []

    def finish(self, factor: float, seen_by_any: Sequence[bool]) -> None:
        if factor != 1 and self._flats:
            torch._foreach_mul_(self._flats, factor)
        for slot, seen in zip(self._slots, seen_by_any, strict=True):
            if not seen:
                slot.parameter.grad = None
            elif not slot.is_own_type and slot.sum is not None:
                slot.parameter.grad = slot.sum.to(slot.parameter.dtype)

    def release(self) -> None:
        """Take the hooks off the parameters and let go of their gradients."""
        for each in self._hooks:
            each.remove()
        self._hooks, self._flats = [], []
        for slot in self._slots:
            slot.parameter.grad = slot.sum = None

    def _make_hook(self, slot: _Slot) -> Callable[[Tensor], None]:
        bucket = slot.bucket

        # Runs for each parameter in each backward: the usual case makes no further calls.
        def on_gradient(parameter: Tensor) -> None:
            if parameter.grad is not slot.sum or not self._accepting:
                self._take(slot, parameter)
            slot.seen = True
            if self._engine is not None:
                bucket.missing -= 1
                if bucket.missing <= 0:
                    self._launch_full(bucket, self._engine)

        return on_gradient

    def _take(self, slot: _Slot, parameter: Tensor) -> None:
        """Add a gradient that is not in its bucket yet; refuse one that should not be there."""
        if not self._accepting:
            parameter.grad = None
            raise MisusedTrainer(
                "loss.backward() was called directly; call update.backward(loss), which weighs the micro-batch and "
                "reduces over the workers"
            )
        if slot.is_own_type:
            raise MisusedTrainer(_REPLACED)
        assert parameter.grad is not None
        assert slot.sum is not None
        slot.sum.add_(parameter.grad)
        parameter.grad = None

    def _launch_full(self, bucket: _Bucket, engine: Engine) -> None:
        """Launch what can be, now that a bucket is full."""
        if bucket.missing < 0:
            raise MisusedTrainer(
                "a parameter got a gradient twice in one backward; use activation checkpointing with "
                "use_reentrant=False"
            )
        while self._next_launch < len(self._flats) and self._buckets[self._next_launch].missing == 0:
            self._launch_next(engine)

    def _launch_next(self, engine: Engine) -> None:
        flat = self._flats[self._next_launch]
        if self._norms is not None:
            self._norms.append(torch.linalg.vector_norm(flat))
        self._next_launch += 1
        try:
            self._handles.append(engine.all_reduce(flat))
        except WorldBroken as error:
            # Not raised here: an error that leaves a hook leaves autograd's graph behind, with the batch that it saved.
            self._handles.append(_NeverLaunched(error.with_traceback(None)))


class _NeverLaunched:
    """The handle of a reduction whose launch failed."""

    def __init__(self, error: WorldBroken) -> None:
        self._error = error

    def wait(self) -> None:
        raise self._error


class _Slot:
    """A parameter, its place in its bucket, and the sum of its gradients."""

    def __init__(self, parameter: Parameter) -> None:
        self.parameter = parameter
        self.is_own_type = parameter.dtype in (torch.float32, torch.float64)
        self.seen = False
        self.sum: Tensor | None = None
        self.bucket: _Bucket

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype if self.is_own_type else torch.float32


class _Bucket:
    """The parameters whose gradients share a flat tensor.

    Args:
        slots: Of one device and one type.
    """

    def __init__(self, slots: list[_Slot]) -> None:
        self.slots = slots
        self.missing = len(slots)
        for slot in slots:
            slot.bucket = self

    def allocate(self) -> Tensor:
        """A flat tensor of zeros, of which each parameter's sum is a part."""
        total = sum(slot.parameter.numel() for slot in self.slots)
        flat = torch.zeros(total, dtype=self.slots[0].dtype, device=self.slots[0].parameter.device)
        offset = 0
        for slot in self.slots:
            slot.sum = _view_like(flat, offset, slot.parameter)
            offset += slot.parameter.numel()
        return flat


def _view_like(flat: Tensor, offset: int, parameter: Tensor) -> Tensor:
    """The part of `flat` from `offset` on, in the parameter's shape and, where that is dense, its memory order."""
    strides = torch.empty_like(parameter, device="meta").stride()
    return flat.as_strided(parameter.size(), strides, offset)


def _fill_buckets(slots: list[_Slot], bucket_bytes: int) -> list[_Bucket]:
    """Cut `slots` into buckets: of one device and type each, full at `bucket_bytes`."""
    buckets: list[_Bucket] = []
    group: list[_Slot] = []
    group_bytes = 0
    for slot in slots:
        same_kind = group and (group[0].dtype, group[0].parameter.device) == (slot.dtype, slot.parameter.device)
        if group and (not same_kind or group_bytes >= bucket_bytes):
            buckets.append(_Bucket(group))
            group, group_bytes = [], 0
        group.append(slot)
        group_bytes += slot.parameter.numel() * slot.dtype.itemsize
    return [*buckets, _Bucket(group)] if group else buckets
