"""Nested batches: tensors inside dicts, lists, tuples and named tuples."""

from __future__ import annotations

import copy
import inspect
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor


class NotJoinableError(ValueError):
    """Batches of micro-batches have no common batch."""


class NotDivisibleError(ValueError):
    """A batch has parts of which it cannot be told what belongs to which sample."""


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor on `device`, copied without waiting where memory is pinned.

    Objects that are neither tensors nor containers move by their own `to` method, or stay as they are.
    """
    return _map(batch, "to", lambda leaf: _move(leaf, device))


def pin(batch: Any) -> Any:
    """Return the batch with every tensor in page-locked memory, from which copies to a GPU run on their own."""
    return _map(batch, "pin_memory", lambda leaf: leaf.pin_memory())


def join(batches: Sequence[Any], micro_batch_size: int) -> Any:
    """Return one batch with the samples of all, in order; every tensor has its samples along the first axis.

    A list or tuple with one plain value (a string, say) for each sample is lengthened, any other container is joined
    element by element.

    Raises:
        NotJoinableError: Shapes, types or keys differ, or an axis of `micro_batch_size` samples is missing.

    >>> join([{"x": torch.zeros(2, 3), "name": ["a", "b"]}, {"x": torch.ones(2, 3), "name": ["c", "d"]}], 2)["name"]
    ['a', 'b', 'c', 'd']
    """
    first = batches[0]
    if len(batches) == 1 or all(batch is None for batch in batches):
        return first
    if any(type(batch) is not type(first) for batch in batches):
        raise NotJoinableError(f"they hold different types: {', '.join(type(batch).__name__ for batch in batches)}")
    if isinstance(first, Tensor):
        return _join_tensors(batches, micro_batch_size)
    if isinstance(first, Mapping):
        if any(batch.keys() != first.keys() for batch in batches):
            raise NotJoinableError("their keys differ")
        return _like(first, ((key, join([batch[key] for batch in batches], micro_batch_size)) for key in first))
    if isinstance(first, list | tuple):
        if all(len(batch) == micro_batch_size and not any(map(_is_nested, batch)) for batch in batches):
            return _sequence_like(first, [item for batch in batches for item in batch])
        if any(len(batch) != len(first) for batch in batches):
            raise NotJoinableError(f"they hold {type(first).__name__}s of different lengths")
        return _sequence_like(first, [join(items, micro_batch_size) for items in zip(*batches, strict=True)])
    raise NotJoinableError(f"a {type(first).__name__} has no samples to join")


def cut(batch: Any, start: int, stop: int, num_samples: int) -> Any:
    """Return the samples [start, stop) of a batch of `num_samples`, in tensors and containers of its own.

    Cut are tensors, along their first axis, and lists of one plain value for each sample. So are tuples of strings; a
    tuple of numbers may be a size.

    Raises:
        NotDivisibleError: Something in it belongs to the whole batch, or may do so.

    >>> cut({"x": torch.arange(4), "name": ["a", "b", "c", "d"]}, 1, 3, 4)
    {'x': tensor([1, 2]), 'name': ['b', 'c']}
    """
    if batch is None:
        return None
    if isinstance(batch, Tensor):
        if batch.is_nested or batch.layout != torch.strided or batch.shape[:1] != (num_samples,):
            raise NotDivisibleError(f"a tensor does not have the {num_samples} samples as first axis")
        return batch[start:stop].clone()
    if isinstance(batch, dict | UserDict):
        return _like(batch, ((key, cut(item, start, stop, num_samples)) for key, item in batch.items()))
    if not isinstance(batch, list | tuple) or hasattr(batch, "to"):
        raise NotDivisibleError(f"a {type(batch).__name__} has no samples to take")
    if len(batch) != num_samples or hasattr(batch, "_fields") or len({_kind(item) for item in batch}) > 1:
        return _sequence_like(batch, [cut(item, start, stop, num_samples) for item in batch])
    if not _is_nested(batch[0]) and (isinstance(batch, list) or isinstance(batch[0], str | bytes)):
        return batch[start:stop]
    raise NotDivisibleError(f"the {num_samples} items of a {type(batch).__name__} may be one for each sample, or not")


def duplicate(batch: Any) -> Any:
    """Return the batch in tensors and containers of its own, which whoever uses it may change."""
    if isinstance(batch, Tensor):
        return batch.clone()
    if isinstance(batch, dict | UserDict):
        return _like(batch, ((key, duplicate(item)) for key, item in batch.items()))
    if isinstance(batch, list | tuple):
        return _sequence_like(batch, [duplicate(item) for item in batch])
    return batch


def _kind(item: Any) -> tuple[object, ...]:
    """What the items of one field have in common, and different fields mostly have not."""
    return (Tensor, item.dtype, item.dim()) if isinstance(item, Tensor) else (type(item),)


def _join_tensors(tensors: Sequence[Tensor], micro_batch_size: int) -> Tensor:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if any(shape[:1] != (micro_batch_size,) for shape in shapes):
        raise NotJoinableError(f"tensors of shapes {shapes} do not have the {micro_batch_size} samples as first axis")
    if len(set(shapes)) > 1 or len({tensor.dtype for tensor in tensors}) > 1:
        raise NotJoinableError(f"their shapes {shapes} or types differ")
    return torch.cat(list(tensors))


def _map(batch: Any, method: str, function: Callable[[Any], Any]) -> Any:
    """Apply `function` to every part with that method, containers that have it included (a PackedSequence, say)."""
    if hasattr(batch, method):
        return function(batch)
    if isinstance(batch, Mapping):
        return _like(batch, ((key, _map(item, method, function)) for key, item in batch.items()))
    if isinstance(batch, list | tuple):
        return _sequence_like(batch, [_map(item, method, function) for item in batch])
    return batch


def _move(movable: Any, device: torch.device) -> Any:
    if isinstance(movable, Tensor) or _takes_non_blocking(movable.to):
        return movable.to(device, non_blocking=True)
    return movable.to(device)


def _takes_non_blocking(move: Callable[..., Any]) -> bool:
    parameters = inspect.signature(move).parameters
    return "non_blocking" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _is_nested(item: Any) -> bool:
    return isinstance(item, Tensor | Mapping | list | tuple)


def _like(mapping: Mapping[Any, Any], items: Iterable[tuple[Any, Any]]) -> Mapping[Any, Any]:
    if not isinstance(mapping, MutableMapping):
        return dict(items)
    clone = copy.copy(mapping)  # subclasses keep what else they hold, the factory of a defaultdict for one
    clone.update(items)
    return clone


def _sequence_like(sequence: list[Any] | tuple[Any, ...], items: list[Any]) -> list[Any] | tuple[Any, ...]:
    if hasattr(sequence, "_fields"):  # a named tuple
        return type(sequence)(*items)
    return items if isinstance(sequence, list) else tuple(items)
