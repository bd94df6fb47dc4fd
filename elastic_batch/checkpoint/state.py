"""What a checkpoint may hold, and copies of it that training can go on without touching."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elastic_batch.errors import UnsavableState

# Not bytes: torch's restricted reader refuses empty ones.
_PLAIN_TYPES = {bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device}
_SEQUENCE_TYPES: dict[type, Callable[[list[Any]], Any]] = {list: list, tuple: tuple, set: set}
_TENSOR_TYPES = {Tensor, torch.nn.Parameter}

_Key = tuple[object, ...]


class HostMemory:
    """Host tensors for snapshots, lent again and again: touching fresh memory costs several times the copy itself.

    It grows to one set of tensors for each snapshot that was alive at the same time. Calls must not overlap.
    """

    def __init__(self) -> None:
        self._free: defaultdict[_Key, list[Tensor]] = defaultdict(list)

    def lend(self, like: Tensor) -> tuple[_Key, Tensor]:
        """A host tensor shaped like another one, and the key to give it back with."""
        key = (like.shape, like.stride(), like.dtype, like.is_cuda)
        if self._free[key]:
            return key, self._free[key].pop()
        # Only with pinned memory does a CUDA device copy without the host's help, and many tensors at once.
        return key, torch.empty_like(like, device="cpu", pin_memory=like.is_cuda)

    def take_back(self, key: _Key, tensor: Tensor) -> None:
        """Accept a lent tensor that nobody reads any more."""
        self._free[key].append(tensor)


class Snapshot:
    """A nested state copied to host memory.

    Args:
        state: Tensors on any device, numbers, strings, None, in dicts, lists, tuples and sets.
        memory: Where to copy to.

    Attributes:
        state: The copy. Names of one tensor (tied weights) share one copy. Valid until `release`.

    Raises:
        UnsavableState: Something in it could not be read back without running code.
    """

    def __init__(self, state: Any, memory: HostMemory) -> None:
        self._memory = memory
        self._loans: list[tuple[_Key, Tensor]] = []
        sources: list[Tensor] = []

        def borrow(source: Tensor) -> Tensor:
            sources.append(source)
            self._loans.append(memory.lend(source))
            return self._loans[-1][1]

        try:
            self.state = _rebuild(state, "state", _once_each(borrow), frozenset())
        except UnsavableState:
            self.release()
            raise
        for source, (_, target) in zip(sources, self._loans, strict=True):
            target.copy_(source, non_blocking=True)
        # The copies out of a device were queued behind its work; from here on they are complete.
        for device in {source.device for source in sources if source.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def release(self) -> None:
        """Give the memory back, for a later snapshot to overwrite."""
        # Last lent, first back: the next snapshot of the same state gets each tensor's memory in its old place.
        for key, tensor in reversed(self._loans):
            self._memory.take_back(key, tensor)
        self._loans.clear()


def snapshot(state: Any) -> Any:
    """A deep copy of a nested state in host memory, for a checkpoint to be written while training goes on.

    Args:
        state: Tensors on any device, numbers, strings, None, in dicts, lists, tuples and sets.

    Raises:
        UnsavableState: Something in it could not be read back without running code.
    """
    return Snapshot(state, HostMemory()).state


def check_state(state: Any) -> None:
    """Make sure that a state can be saved and read back without running code; nothing is copied.

    Raises:
        UnsavableState: Names the place in the state, and the type that is there.
    """
    _rebuild(state, "state", lambda tensor: tensor, frozenset())


def compact(state: Any) -> Any:
    """The state as it is written: plain tensors, of which none drags a larger storage along."""

    def without_surplus(tensor: Tensor) -> Tensor:
        return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()

    return _rebuild(state, "state", _once_each(without_surplus), frozenset())


def take_apart(state: Any) -> tuple[Any, list[Tensor]]:
    """Split a state into its nesting, which is small, and its tensors, each once, over the memory they have.

    Returns:
        The nesting, with 0-dim integer tensors in the tensors' places, and the tensors.

    Raises:
        UnsavableState: Something in it could not be read back without running code.
    """
    tensors: list[Tensor] = []

    def number(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return torch.tensor(len(tensors) - 1)

    return _rebuild(state, "state", _once_each(number), frozenset()), tensors


def put_together(nesting: Any, tensors: list[Tensor]) -> Any:
    """The state that `take_apart` split."""
    return _rebuild(nesting, "state", lambda number: tensors[int(number)], frozenset())


def _once_each(copy: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`copy`, with one result for all names of the same memory."""
    copies: dict[_Key, tuple[Tensor, Tensor]] = {}

    def convert(tensor: Tensor) -> Tensor:
        if tensor.numel() == 0:
            return copy(tensor)
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if key not in copies:
            # The source is kept too, so that no other tensor can get its address meanwhile.
            copies[key] = (tensor, copy(tensor))
        return copies[key][1]

    return convert


def _rebuild(value: Any, path: str, convert: Callable[[Tensor], Tensor], parents: frozenset[int]) -> Any:
    """The same nesting with every tensor converted; exact types only, since a subclass is read back by running code."""
    kind = type(value)
    if kind in _PLAIN_TYPES:
        return value
    if isinstance(value, np.generic) and type(number := value.item()) in _PLAIN_TYPES:
        return number
    if kind in _TENSOR_TYPES:
        if value.is_meta:
            raise UnsavableState(path, "a tensor on the meta device, which has no values")
        if value.layout != torch.strided:
            raise UnsavableState(path, f"a tensor with the layout {value.layout}; make it dense with to_dense()")
        # Detached: a new object without hooks, attributes and history, over the same memory.
        plain = value.detach()
        return convert(plain.resolve_conj() if plain.is_complex() else plain)
    if id(value) in parents:
        raise UnsavableState(path, "a container that holds itself")
    inside = parents | {id(value)}
    if kind in _SEQUENCE_TYPES:
        items = [_rebuild(item, f"{path}[{index}]", convert, inside) for index, item in enumerate(value)]
        return _SEQUENCE_TYPES[kind](items)
    if kind is dict or kind is OrderedDict:
        return _rebuild_dict(value, path, convert, inside)
    raise UnsavableState(path, f"of type {kind.__module__}.{kind.__qualname__}")


def _rebuild_dict(
    value: dict[Any, Any], path: str, convert: Callable[[Tensor], Tensor], inside: frozenset[int]
) -> dict[Any, Any]:
    copy = type(value)()
    for key, item in value.items():
        if type(key) not in _PLAIN_TYPES:
            kind = type(key)
            raise UnsavableState(f"a key of {path}", f"{key!r}, of type {kind.__module__}.{kind.__qualname__}")
        copy[key] = _rebuild(item, f"{path}[{key!r}]", convert, inside)
    # A module's state_dict keeps the versions of its layers in an attribute, `_metadata`.
    for name, item in getattr(value, "__dict__", {}).items():
        setattr(copy, name, _rebuild(item, f"{path}.{name}", convert, inside))
    return copy
