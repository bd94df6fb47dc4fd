"""Sums of gradients over an update: in flat buckets that are reduced while the last backward still runs, or, where one
worker is alone, as autograd hands them over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from elastic_batch.engines import Engine, Handle
from elastic_batch.errors import MisusedTrainer, WorldBroken

DEFAULT_BUCKET_BYTES = 25 * 2**20


class GradientSums:
    """The sums of one worker's gradients.

    Several workers reduce them: they are then slices of flat buckets, which are reduced in the order of their index.
    Buckets follow the parameters from the last to the first, which is about the order in which backward finishes them.
    A parameter's `.grad` is a view of its bucket, into which autograd adds. A worker alone keeps the tensors that the
    first backward hands over: nothing is zeroed, added or copied for it.

    Parameters narrower than float32 are accumulated in float32 and get a gradient of their own type at the end.

    Args:
        parameters: What the optimizer trains, in its order.
        bucket_bytes: Size at which a bucket is full.
    """

    def __init__(self, parameters: Iterable[Parameter], bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> None:
        self._slots = [_Slot(parameter) for parameter in parameters]
        self._buckets = _fill_buckets(list(reversed(self._slots)), bucket_bytes)
        self._flats: list[Tensor] = []
        self._accepting = False
        self._engine: Engine | None = None
        self._next_launch = 0
        self._handles: list[Handle] = []
        self._memories: set[int] = set()
        self._norms: list[Tensor] | None = None
        self._hooks = [_hook(slot.parameter, self._make_hook(slot)) for slot in self._slots]

    @property
    def num_parameters(self) -> int:
        return len(self._slots)

    @property
    def seen(self) -> tuple[bool, ...]:
        """For each parameter, whether any backward of this update reached it on this worker."""
        return tuple(slot.seen for slot in self._slots)

    def begin(self, *, alone: bool) -> None:
        """Forget every gradient; the next update will be reduced with others', or is this worker's `alone`."""
        self._handles = []
        self._memories.clear()
        self._next_launch = 0
        self._engine = None
        if alone:
            self._flats = []
        elif self._flats:
            torch._foreach_zero_(self._flats)
        else:
            self._flats = [bucket.allocate() for bucket in self._buckets]
        for slot in self._slots:
            slot.seen = False
            if alone:
                slot.sum = None
            grad = slot.sum if slot.is_own_type else None
            if slot.parameter.grad is not grad:
                slot.parameter.grad = grad
        for bucket in self._buckets:
            bucket.missing = len(bucket.slots)

    @contextmanager
    def accepting(self, reduce_with: Engine | None = None, norms: list[Tensor] | None = None) -> Iterator[None]:
        """Let a backward add to the buckets.

        Args:
            reduce_with: In the last backward of the update: the engine on which full buckets are reduced at once.
            norms: Receives each bucket's norm before its reduction (0-dim tensors).
        """
        self._accepting, self._engine, self._norms = True, reduce_with, norms
        try:
            yield
        finally:
            self._accepting = False

    def flush(self, engine: Engine, norms: list[Tensor] | None = None) -> None:
        """Launch the reductions that are still to come, in order: unused parameters', or all of them on a spare
        worker."""
        self._engine, self._norms = engine, norms
        while self._next_launch < len(self._flats):
            self._launch_next(engine)

    def wait(self) -> None:
        """Wait for every reduction of this update.

        Raises:
            WorldBroken: One of them failed. All were waited for, so that none still writes into a bucket.
        """
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
        """The Euclidean norms of all buckets or, for a worker alone, of all gradients: 0-dim tensors."""
        tensors = self._tensors()
        return list(torch._foreach_norm(tensors)) if tensors else []

    def finish(self, factor: float, seen_by_any: Sequence[bool]) -> None:
        """Scale the sums by `factor` and give each parameter its gradient.

        Args:
            factor: What the division by the update's weight still asks for, times a clipping factor; often 1.
            seen_by_any: For each parameter, whether any worker has a gradient for it; the others keep `None`.
        """
        if factor != 1 and (tensors := self._tensors()):
            torch._foreach_mul_(tensors, factor)
        for slot, seen in zip(self._slots, seen_by_any, strict=True):
            if not seen:
                slot.parameter.grad = None
            elif not slot.is_own_type and slot.sum is not None:
                slot.parameter.grad = slot.sum.to(slot.parameter.dtype)

    def close(self) -> None:
        """Take the hooks off the parameters and let go of their gradients."""
        for hook in self._hooks:
            hook.remove()
        self._flats = []
        for slot in self._slots:
            slot.parameter.grad = slot.sum = None

    def _tensors(self) -> list[Tensor]:
        """What holds the sums."""
        return self._flats or [slot.sum for slot in self._slots if slot.sum is not None]

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
        gradient = parameter.grad
        assert gradient is not None
        if not slot.is_own_type:
            slot.sum = gradient.to_dense().to(slot.dtype) if slot.sum is None else slot.sum.add_(gradient)
            parameter.grad = None
        elif slot.sum is None:
            slot.sum = own = self._own(gradient)
            if own is not gradient:
                parameter.grad = own
        else:
            raise MisusedTrainer(
                "a parameter's .grad was replaced during an update; remove model.zero_grad() and other code that sets "
                "gradients: the trainer clears them"
            )

    def _own(self, gradient: Tensor) -> Tensor:
        """A handed-over gradient as one that can be changed in place: dense, in memory that no other one has."""
        if gradient.is_sparse:
            return gradient.to_dense()
        memory = gradient.untyped_storage().data_ptr()
        if memory in self._memories:  # such as two views that were added
            return gradient.clone()
        self._memories.add(memory)
        return gradient

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


def _hook(parameter: Parameter, call: Callable[[Tensor], None]) -> RemovableHandle:
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(call)
    return handle


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
