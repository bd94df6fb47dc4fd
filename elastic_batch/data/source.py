"""What the trainer asks for, and what it asks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class PassRequest:
    """The samples of one pass: consecutive micro-batches, delivered as one batch in position order.

    Args:
        start: First position.
        num_micro_batches: Width of the pass, at least 1.
    """

    start: int
    num_micro_batches: int


class BatchSource(Protocol):
    """Delivers batches on the device. For one thread; it owns its data workers until it is closed."""

    def start(self, requests: Iterator[PassRequest]) -> None:
        """Forget what was prefetched; from now on serve these requests, in order.

        Data workers survive it; those that died are replaced. `requests` may be endless: it is read only a bounded
        number ahead.
        """

    def next(self) -> Any:
        """Return the batch of the next request.

        Raises:
            DataError: The samples could not be had. The source is usable again after `start`.
            CannotFuse: The pass has several micro-batches and they cannot be one batch: ask for them one by one.
            RuntimeError: There is no request left, or `start` has not been called (again).
        """

    def close(self) -> None:
        """Stop the data workers, within a few seconds; may be called again."""
