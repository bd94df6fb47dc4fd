"""The fast path for data that fit in memory or on the device: samples are rows of tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from elastic_batch.data.finish import Finisher
from elastic_batch.data.local import next_request
from elastic_batch.data.source import PassRequest

_MOST_BYTES, _MOST_REQUESTS = 2**20, 32
"""What is selected at once: a call costs more than the few rows of a small batch."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A data set whose sample i is row i of each tensor, or row `numbers[i]`."""

    tensors: tuple[Tensor, ...]
    numbers: npt.NDArray[np.int64] | None

    @classmethod
    def of(cls, dataset: Any) -> Rows | None:
        """The rows of a TensorDataset or of (nested) Subsets of one; None for anything else.

        Subclasses may do more than give rows, and tensors that are trained get gradients: they are something else.
        """
        if type(dataset) is TensorDataset and not any(tensor.requires_grad for tensor in dataset.tensors):
            return cls(dataset.tensors, None)
        if type(dataset) is not Subset or (inner := cls.of(dataset.dataset)) is None:
            return None
        numbers = np.asarray(dataset.indices, np.int64).reshape(-1)
        num_rows = len(inner.tensors[0]) if inner.numbers is None else len(inner.numbers)
        if numbers.size and not -num_rows <= numbers.min() <= numbers.max() < num_rows:
            return None  # indexing sample by sample names the one that is outside
        numbers = np.where(numbers < 0, numbers + num_rows, numbers)
        return cls(inner.tensors, numbers if inner.numbers is None else inner.numbers[numbers])

    def to(self, device: torch.device) -> Rows:
        """The same rows, held on `device`."""
        return Rows(tuple(tensor.to(device) for tensor in self.tensors), self.numbers)


class TensorSource:
    """A `BatchSource` over rows of tensors: no workers, no collation, the same batches as the general path's.

    Args:
        rows: The data set.
        finisher: Order, sizes, device and batch transform.
    """

    def __init__(self, rows: Rows, finisher: Finisher) -> None:
        self._rows = rows
        self._finisher = finisher
        self._is_on_host = finisher.device.type == "cpu"
        self._is_there = all(tensor.device == finisher.device for tensor in rows.tensors)
        self._row_bytes = sum(tensor[:1].nbytes for tensor in rows.tensors)
        self._requests: Iterator[PassRequest] | None = None
        self._selected: deque[tuple[PassRequest, list[Tensor]]] = deque()

    def start(self, requests: Iterator[PassRequest]) -> None:
        self._requests = requests
        self._selected.clear()

    def next(self) -> Any:
        if not self._selected:
            self._select_ahead()
        request, batch = self._selected.popleft()
        if self._finisher.batch_transform is None:
            return batch
        micro_batches = zip(*(torch.split(tensor, self._finisher.micro_batch_size) for tensor in batch), strict=True)
        return self._finisher.transform(request, [list(tensors) for tensors in micro_batches])

    def close(self) -> None:
        self._requests = None
        self._selected.clear()

    def _select_ahead(self) -> None:
        """Select the rows of the next request, and of those after it while all are few."""
        first = next_request(self._requests)
        num_fitting = _MOST_BYTES // max(1, self._num_rows(first) * self._row_bytes)
        requests = [first, *islice(self._requests or (), max(0, min(num_fitting, _MOST_REQUESTS) - 1))]
        stream, sizes = self._finisher.stream, [self._num_rows(request) for request in requests]
        ranges = [(request.start, request.start + size) for request, size in zip(requests, sizes, strict=True)]
        indices = np.concatenate([stream.indices(start, stop) for start, stop in ranges])
        if self._rows.numbers is not None:
            indices = self._rows.numbers[indices]
        parts = [tensor.split(sizes) for tensor in self._select(torch.from_numpy(indices))]
        for request, *tensors in zip(requests, *parts, strict=True):
            # Each is a tensor of its own to autograd: what users write into one batch is not to reach the next.
            self._selected.append((request, [tensor.data for tensor in tensors]))

    def _num_rows(self, request: PassRequest) -> int:
        return request.num_micro_batches * self._finisher.micro_batch_size

    def _select(self, index: Tensor) -> list[Tensor]:
        device = self._finisher.device
        if self._is_there:
            if not self._is_on_host:
                index = index.to(device, non_blocking=True)
            return [tensor.index_select(0, index) for tensor in self._rows.tensors]
        if device.type != "cuda":
            return [tensor.index_select(0, index.to(tensor.device)).to(device) for tensor in self._rows.tensors]
        return [_select_pinned(tensor, index).to(device, non_blocking=True) for tensor in self._rows.tensors]


def _select_pinned(tensor: Tensor, index: Tensor) -> Tensor:
    """Select into page-locked memory, from which the copy to the device needs no waiting."""
    if tensor.device.type != "cpu":
        return tensor.index_select(0, index.to(tensor.device))
    rows = torch.empty(len(index), *tensor.shape[1:], dtype=tensor.dtype, pin_memory=True)
    return torch.index_select(tensor.detach(), 0, index, out=rows)
