"""Batches that the training process fetches by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from elastic_batch.data.fetch import Fetcher
from elastic_batch.data.finish import Finisher
from elastic_batch.data.source import PassRequest
from elastic_batch.randomness import preserved


class LocalSource:
    """A `BatchSource` without data workers: each batch is made when it is asked for.

    Args:
        fetcher: Makes the batches.
        finisher: Brings them onto the device.
    """

    def __init__(self, fetcher: Fetcher, finisher: Finisher) -> None:
        self._fetcher = fetcher
        self._finisher = finisher
        self._requests: Iterator[PassRequest] | None = None

    def start(self, requests: Iterator[PassRequest]) -> None:
        self._requests = requests

    def next(self) -> Any:
        request = next_request(self._requests)
        with preserved():
            batches = self._fetcher.fetch(request)
        return self._finisher.finish(request, batches)

    def close(self) -> None:
        self._requests = None


def next_request(requests: Iterator[PassRequest] | None) -> PassRequest:
    """Take one request.

    Raises:
        RuntimeError: There is none.
    """
    if requests is None:
        raise RuntimeError("the source has no requests: call start() before next(), and again after a data worker died")
    request = next(requests, None)
    if request is None:
        raise RuntimeError("every request was served: start() must be given as many as there are calls of next()")
    return request
