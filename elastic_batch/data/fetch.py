"""Fetching the micro-batches of a pass from a map-style data set, each under the seeds of its position."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch.utils.data import default_collate

from elastic_batch.data.nested import NotJoinableError, join
from elastic_batch.data.source import PassRequest
from elastic_batch.errors import CannotFuse, DataError, in_one_line
from elastic_batch.randomness import reseed
from elastic_batch.stream import SampleStream, micro_batch_seed

_COLLATION_ERRORS = (RuntimeError, TypeError, KeyError, ValueError)  # of unequal shapes, types and keys


class FetchCancelledError(Exception):
    """Nobody wants the pass any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetcher:
    """Makes batches of samples. Pure but for the global random generators, which it leaves seeded; picklable.

    Args:
        dataset: Map-style; its `__getitems__` is used if it has one.
        stream: The order of samples.
        micro_batch_size: Samples of a micro-batch.
        collate_fn: Makes a batch of a micro-batch's samples. None: torch's default.
        join_passes: Whether a pass becomes one batch here, or stays a list of micro-batches for a later transform.
    """

    dataset: Any
    stream: SampleStream
    micro_batch_size: int
    collate_fn: Callable[[list[Any]], Any] | None = None
    join_passes: bool = True

    def fetch(self, request: PassRequest, is_cancelled: Callable[[], bool] = lambda: False) -> list[Any]:
        """Return the pass as one batch, in a list, or as a list of its micro-batches.

        Raises:
            DataError: The data set or `collate_fn` failed.
            CannotFuse: The micro-batches cannot be joined.
            FetchCancelledError: `is_cancelled` said so between two samples.
        """
        starts = [request.start + i * self.micro_batch_size for i in range(request.num_micro_batches)]
        if self.join_passes and self.collate_fn is None:
            return [self._collate_at_once(request, starts, [self._samples(start, is_cancelled) for start in starts])]
        batches = [self._collate(start, self._samples(start, is_cancelled)) for start in starts]
        return [join_pass(batches, request, self.stream, self.micro_batch_size)] if self.join_passes else batches

    def _samples(self, start: int, is_cancelled: Callable[[], bool]) -> list[Any]:
        asked: list[int] = self.stream.indices(start, start + self.micro_batch_size).tolist()
        reseed(micro_batch_seed(self.stream.seed, start, "data"))
        fetch_many = getattr(self.dataset, "__getitems__", None)
        samples: list[Any] = []
        try:
            if callable(fetch_many):
                if is_cancelled():
                    raise FetchCancelledError
                samples = fetch_many(asked)
                _require_as_many(samples, asked)
                return samples
            for index in asked:
                if is_cancelled():
                    raise FetchCancelledError
                samples.append(self.dataset[index])
            return samples
        except FetchCancelledError:
            raise
        # Whatever users' code raises becomes the one error that the trainer knows and that crosses processes.
        except Exception as error:
            failed = asked if callable(fetch_many) else asked[len(samples) : len(samples) + 1]
            raise data_error(error, start, failed) from error

    def _collate(self, start: int, samples: list[Any]) -> Any:
        """Make a batch of a micro-batch's samples, still under its seeds: a `collate_fn` may draw, too."""
        try:
            return _collate_by_default(samples) if self.collate_fn is None else self.collate_fn(samples)
        except Exception as error:
            indices = self.stream.indices(start, start + self.micro_batch_size).tolist()
            raise data_error(error, start, indices) from error

    def _collate_at_once(self, request: PassRequest, starts: list[int], groups: list[list[Any]]) -> Any:
        """The default collation draws nothing, so it may save the copy from micro-batches to the pass."""
        try:
            return default_collate(list(chain.from_iterable(groups)))
        except _COLLATION_ERRORS:  # of a micro-batch, or of the pass only: separately it will be seen
            batches = [self._collate(start, samples) for start, samples in zip(starts, groups, strict=True)]
            return join_pass(batches, request, self.stream, self.micro_batch_size)


def join_pass(batches: list[Any], request: PassRequest, stream: SampleStream, micro_batch_size: int) -> Any:
    """Join a pass's micro-batches.

    Raises:
        CannotFuse: They have no common batch.
    """
    try:
        return join(batches, micro_batch_size)
    except NotJoinableError as error:
        stop = request.start + request.num_micro_batches * micro_batch_size
        reason = f"{request.num_micro_batches} micro-batches cannot be one pass: {error}. Use micro_batches_per_pass=1"
        raise CannotFuse(request.start, stream.indices(request.start, stop).tolist(), reason) from error


def data_error(error: Exception, position: int, sample_indices: list[int]) -> DataError:
    """Describe the error of users' code by plain text: foreign exceptions may not survive pickling."""
    trace = "".join(traceback.format_exception(error)).strip()
    return DataError(position, sample_indices, in_one_line(error), trace)


def _collate_by_default(samples: list[Any]) -> Any:
    try:
        return default_collate(samples)
    except _COLLATION_ERRORS as error:  # in a data worker, unequal shapes have a misleading message
        raise ValueError(
            f"torch's default collation cannot make a batch of these samples ({error}). If their shapes or types "
            "differ, pass a collate_fn that pads or lists them"
        ) from error


def _require_as_many(samples: Any, indices: list[int]) -> None:
    if len(samples) != len(indices):
        raise ValueError(
            f"__getitems__ gave {len(samples)} samples for {len(indices)} indices; it must give one for each"
        )
