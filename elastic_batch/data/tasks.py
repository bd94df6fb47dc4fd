"""What passes between the training process and its data workers."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterator
from ctypes import c_int64
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from typing import Any

from torch.utils.data import Dataset

from elastic_batch.data.fetch import FetchCancelledError, Fetcher, data_error
from elastic_batch.data.nested import pin
from elastic_batch.data.packing import pack
from elastic_batch.data.source import PassRequest
from elastic_batch.errors import DataError


@dataclass(frozen=True, slots=True)
class Task:
    """One pass for a worker; `request` is None where there is nothing to do at the moment."""

    plan: int
    request: PassRequest | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """A worker's answer, packed by the worker itself so that what cannot be pickled is an error, not a silence.

    Args:
        task: What was asked.
        packed: The pickled list of batches, or the pickled DataError; None if the task had become pointless.
        opened: The same, unpacked.
    """

    task: Task
    packed: bytes | None
    opened: Any = None

    def open(self) -> Delivery:
        """Unpack. Every delivery must be opened once: its large tensors are shared memory that waits to be fetched."""
        if self.packed is None:
            return self
        return replace(self, packed=None, opened=pickle.loads(self.packed))

    def pin_memory(self) -> Delivery:
        """Called by the DataLoader's pinning thread."""
        delivery = self.open()
        return replace(delivery, opened=pin(delivery.opened))


class Plan:
    """The requests in force. The DataLoader draws its endless tasks from here, and so learns of a new plan by itself.

    Requests are read ahead by whoever calls `look_ahead`, so that an error of their iterator meets the caller, not the
    DataLoader.
    """

    def __init__(self, context: BaseContext) -> None:
        self.number = context.RawValue(c_int64, 0)  # shared with the workers, who skip tasks of older plans
        self.issued: deque[PassRequest] = deque()
        self._ahead: deque[PassRequest] = deque()
        self._requests: Iterator[PassRequest] = iter(())

    def replace(self, requests: Iterator[PassRequest]) -> None:
        """Let these requests take the place of all that are not served."""
        self.number.value += 1
        self.issued.clear()
        self._ahead.clear()
        self._requests = requests

    def look_ahead(self, count: int) -> None:
        """Read until `count` requests are at hand, or the last."""
        while len(self._ahead) < count and (request := next(self._requests, None)) is not None:
            self._ahead.append(request)

    @property
    def unserved(self) -> PassRequest | None:
        """The request that is to be served next, if there is one at hand."""
        return next(iter(self.issued or self._ahead), None)

    def is_current(self, task: Task) -> bool:
        """Whether the task has a request of the plan in force."""
        return task.plan == self.number.value and task.request is not None

    def __iter__(self) -> Iterator[Task]:
        while True:
            request = self._ahead.popleft() if self._ahead else None
            if request is not None:
                self.issued.append(request)
            yield Task(self.number.value, request)


class TaskReader(Dataset[Delivery]):
    """The data set that the DataLoader sees: its indices are tasks, its samples are whole passes.

    Args:
        fetcher: Makes the batches.
        plan_number: The shared number of the plan in force.
    """

    def __init__(self, fetcher: Fetcher, plan_number: Any) -> None:
        self._fetcher = fetcher
        self._plan_number = plan_number

    def __getitem__(self, task: Task) -> Delivery:
        def is_cancelled() -> bool:
            return bool(self._plan_number.value != task.plan)

        if task.request is None or is_cancelled():
            return Delivery(task, None)
        try:
            return Delivery(task, self._pack(self._fetcher.fetch(task.request, is_cancelled), task.request))
        except DataError as error:
            return Delivery(task, pickle.dumps(error))
        except FetchCancelledError:
            return Delivery(task, None)

    def _pack(self, batches: list[Any], request: PassRequest) -> bytes:
        try:
            return pack(batches)
        except Exception as error:  # any class in a batch may fail in its own way
            stop = request.start + request.num_micro_batches * self._fetcher.micro_batch_size
            indices = self._fetcher.stream.indices(request.start, stop).tolist()
            raise data_error(error, request.start, indices) from error
