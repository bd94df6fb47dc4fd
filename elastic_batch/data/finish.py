"""The last steps of every batch, in the training process: onto the device, through the batch transform, joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from elastic_batch.data.fetch import data_error, join_pass
from elastic_batch.data.nested import to_device
from elastic_batch.data.source import PassRequest
from elastic_batch.randomness import preserved, reseed
from elastic_batch.stream import SampleStream, micro_batch_seed


class Finisher:
    """Turns what was fetched into the batch that the trainer gets.

    Args:
        stream: The order of samples; its seed is the job's.
        micro_batch_size: Samples of a micro-batch.
        device: Where batches go.
        batch_transform: Applied to each micro-batch on the device, under the seeds of its position, so that its draws
            depend neither on the width of the pass nor on the worker.
    """

    def __init__(
        self,
        stream: SampleStream,
        micro_batch_size: int,
        device: torch.device,
        batch_transform: Callable[[Any], Any] | None,
    ) -> None:
        self.stream = stream
        self.micro_batch_size = micro_batch_size
        self.device = device
        self.batch_transform = batch_transform

    def finish(self, request: PassRequest, batches: list[Any]) -> Any:
        """Return the batch of a pass that came as one batch, or as its micro-batches if there is a transform.

        Raises:
            DataError: The transform failed.
            CannotFuse: The transformed micro-batches cannot be joined.
        """
        return self.transform(request, [to_device(batch, self.device) for batch in batches])

    def transform(self, request: PassRequest, batches: list[Any]) -> Any:
        """As `finish`, for batches that are on the device."""
        if self.batch_transform is None:
            return batches[0]
        with preserved(self.device):
            transformed = [
                self._transform_one(request.start + i * self.micro_batch_size, batch) for i, batch in enumerate(batches)
            ]
        return join_pass(transformed, request, self.stream, self.micro_batch_size)

    def _transform_one(self, start: int, batch: Any) -> Any:
        assert self.batch_transform is not None
        reseed(micro_batch_seed(self.stream.seed, start, "batch_transform"), self.device)
        try:
            return self.batch_transform(batch)
        except torch.OutOfMemoryError:
            raise  # the trainer tries again with a narrower pass
        except Exception as error:
            indices = self.stream.indices(start, start + self.micro_batch_size).tolist()
            raise data_error(error, start, indices) from error
