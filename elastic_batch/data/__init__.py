"""Batches for the trainer: the right samples for any position, under the right seeds, on the device."""

from elastic_batch.data.nested import NotDivisibleError, cut, duplicate, to_device
from elastic_batch.data.opening import count_samples, open_source
from elastic_batch.data.process import WorkerInit
from elastic_batch.data.source import BatchSource, PassRequest
from elastic_batch.data.workers import iterate
from elastic_batch.errors import CannotFuse, DataError

__all__ = [
    "BatchSource",
    "CannotFuse",
    "DataError",
    "NotDivisibleError",
    "PassRequest",
    "WorkerInit",
    "count_samples",
    "cut",
    "duplicate",
    "iterate",
    "open_source",
    "to_device",
]
