"""From a data set to a source of batches: what is refused, and which path is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import IterableDataset

from elastic_batch.data.fetch import Fetcher
from elastic_batch.data.finish import Finisher
from elastic_batch.data.local import LocalSource
from elastic_batch.data.source import BatchSource
from elastic_batch.data.tensors import Rows, TensorSource
from elastic_batch.data.workers import WorkerSettings, WorkerSource
from elastic_batch.errors import InvalidSetting
from elastic_batch.stream import SampleStream


def count_samples(dataset: Any, field: str = "dataset") -> int:
    """Return the size of a map-style data set.

    Args:
        dataset: Has `__len__` and `__getitem__`.
        field: The setting's name, for the error.

    Raises:
        InvalidSetting: It is an IterableDataset, has no length, or is empty.

    >>> count_samples(["a", "b"])
    2
    """
    name = type(dataset).__name__
    rule = "must be a map-style data set, with __len__() and __getitem__(index)"
    if isinstance(dataset, IterableDataset):
        remedy = (
            "Samples that only come in a row cannot be shared among a changing number of workers: write them to files "
            "once and read those by index, or keep them in a list if they fit in memory"
        )
        raise InvalidSetting(field, name, rule, remedy)
    try:
        num_samples = len(dataset)
        has_items = hasattr(dataset, "__getitem__")
    except (TypeError, NotImplementedError):
        has_items = False
    if not has_items:
        raise InvalidSetting(field, name, rule, "Add the missing method, or wrap the data set in a class that has both")
    if num_samples == 0:
        raise InvalidSetting(
            field, name, "must hold at least one sample", "Look at the path and filters it was made with"
        )
    return num_samples


def open_source(
    dataset: Any,
    *,
    stream: SampleStream,
    micro_batch_size: int,
    device: torch.device | str,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    batch_transform: Callable[[Any], Any] | None = None,
    keep_on_device: bool = False,
    worker_init_fn: Callable[[int], None] | None = None,
    start_method: str | None = None,
) -> BatchSource:
    """Open a data set for training. Nothing is read and no process starts before the source's `start`.

    A `TensorDataset`, or a `Subset` of one, without `collate_fn` is read by indexing its tensors, without workers. Any
    other data set is read sample by sample (or by its `__getitems__`), each micro-batch under the random seeds of its
    position, so that batches depend on neither the path, nor the workers, nor the width of passes.

    Args:
        dataset: Map-style.
        stream: The order of samples.
        micro_batch_size: Samples of a micro-batch, at least 1.
        device: Where batches go.
        collate_fn: Makes a batch of a micro-batch's samples. None: torch's default.
        num_workers: Data workers. 0: the calling process reads.
        prefetch_factor: Passes that each data worker reads ahead, at least 1.
        batch_transform: Applied to each micro-batch on the device, under the random seeds of its position.
        keep_on_device: Hold a TensorDataset's tensors on the device.
        worker_init_fn: Called in each data worker with its number.
        start_method: `fork`, `spawn` or `forkserver`; None: the platform's default.

    Raises:
        InvalidSetting: The data set cannot be used, or a setting is outside its range.
    """
    num_samples = count_samples(dataset)
    if num_samples != stream.num_samples:
        raise InvalidSetting("num_samples", stream.num_samples, f"must be the data set's size, {num_samples}")
    for field, value, least in (
        ("micro_batch_size", micro_batch_size, 1),
        ("num_workers", num_workers, 0),
        ("prefetch_factor", prefetch_factor, 1),
    ):
        if value < least:
            raise InvalidSetting(field, value, f"must be at least {least}")
    finisher = Finisher(stream, micro_batch_size, _exact(torch.device(device)), batch_transform)
    rows = Rows.of(dataset) if collate_fn is None else None
    if rows is not None:
        return TensorSource(rows.to(finisher.device) if keep_on_device else rows, finisher)
    if keep_on_device:
        rule = "needs a TensorDataset, or a Subset of one, without collate_fn"
        raise InvalidSetting("keep_on_device", keep_on_device, rule, "Read the data into tensors first")
    fetcher = Fetcher(
        dataset=dataset,
        stream=stream,
        micro_batch_size=micro_batch_size,
        collate_fn=collate_fn,
        join_passes=batch_transform is None,
    )
    if num_workers == 0:
        return LocalSource(fetcher, finisher)
    settings = WorkerSettings(
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        start_method=start_method,
        worker_init_fn=worker_init_fn,
    )
    return WorkerSource(fetcher, finisher, settings)


def _exact(device: torch.device) -> torch.device:
    """With the index that the device's tensors will name."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
