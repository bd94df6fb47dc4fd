"""The fast path for data that fit in memory or on the device: samples are rows of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from elastic_batch.data.finish import Finisher
from elastic_batch.data.local import next_request
from elastic_batch.data.source import PassRequest


@dataclass(frozen=True, slots=True)
class Rows:
    """A data set whose sample i is row i of each tensor, or row `numbers[i]`."""

    tensors: tuple[Tensor, ...]
    numbers: npt.NDArray[np.int64] | None

    @classmethod
    def of(cls, dataset: Any) -> Rows | None:
        """The rows of a TensorDataset or of (nested) Subsets of one; None for anything else.

        Subclasses may do more than give rows, so they are something else.
        """
        if type(dataset) is TensorDataset:
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
        self._requests: Iterator[PassRequest] | None = None

    def start(self, requests: Iterator[PassRequest]) -> None:
        self._requests = requests

    def next(self) -> Any:
        request = next_request(self._requests)
        size = self._finisher.micro_batch_size
        indices = self._finisher.stream.indices(request.start, request.start + request.num_micro_batches * size)
        if self._rows.numbers is not None:
            indices = self._rows.numbers[indices]
        batch = self._select(torch.from_numpy(indices))
        if self._finisher.batch_transform is None:
            return batch
        micro_batches = zip(*(torch.split(tensor, size) for tensor in batch), strict=True)
        return self._finisher.transform(request, [list(tensors) for tensors in micro_batches])

    def close(self) -> None:
        self._requests = None

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
