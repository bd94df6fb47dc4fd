"""How gradients are summed: for others to add theirs to, or by a worker that is alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor
from torch.nn import Parameter

from elastic_batch.engines import Engine
from elastic_batch.gradients.buckets import DEFAULT_BUCKET_BYTES, BucketSums
from elastic_batch.gradients.lone import LoneSums


class Sums(Protocol):
    """The sums of one update.

    Parameters narrower than float32 are accumulated in float32 and get a gradient of their own type at the end.
    """

    @property
    def seen(self) -> tuple[bool, ...]:
        """For each parameter, whether any backward of this update reached it on this worker."""

    def check(self) -> None:
        """See that gradients are as the last backward left them, so far as that is noticed late.

        Raises:
            MisusedTrainer: Somebody else changed one.
        """

    def accepting(
        self, reduce_with: Engine | None = None, norms: list[Tensor] | None = None
    ) -> AbstractContextManager[None]:
        """Let a backward add to the sums.

        Args:
            reduce_with: In the last backward of the update: the engine on which what is complete is reduced at once.
            norms: Receives the norm of each part before its reduction (0-dim tensors).

        Raises:
            MisusedTrainer: Somebody else changed a gradient.
        """

    def flush(self, engine: Engine, norms: list[Tensor] | None = None) -> None:
        """Launch the reductions that are still to come, in order: unused parameters', or all of them on a spare
        worker."""

    def wait(self) -> None:
        """Wait for every reduction of this update.

        Raises:
            WorldBroken: One of them failed. All were waited for, so that none still writes into the sums.
        """

    def norms(self) -> list[Tensor]:
        """Euclidean norms of parts that together are the sums: 0-dim tensors."""

    def finish(self, factor: float, seen_by_any: Sequence[bool]) -> None:
        """Scale the sums by `factor` and give each parameter its gradient.

        Args:
            factor: What the division by the update's weight still asks for, times a clipping factor; often 1.
            seen_by_any: For each parameter, whether any worker has a gradient for it; the others keep `None`.
        """


class GradientSums:
    """The sums of one worker's gradients, update by update.

    Args:
        parameters: What the optimizer trains, in its order.
        bucket_bytes: Size at which a bucket is full.
    """

    def __init__(self, parameters: Iterable[Parameter], bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> None:
        self._parameters = list(parameters)
        self._lone = LoneSums(self._parameters)
        self._buckets = BucketSums(self._parameters, bucket_bytes)
        self._current: LoneSums | BucketSums | None = None

    @property
    def num_parameters(self) -> int:
        return len(self._parameters)

    def begin(self, *, alone: bool) -> Sums:
        """Forget every gradient; the next update will be reduced with others', or is this worker's `alone`."""
        wanted = self._lone if alone else self._buckets
        if self._current is not wanted:
            self.close()
        self._current = wanted
        wanted.begin()
        return wanted

    def close(self) -> None:
        """Let go of the parameters and their gradients."""
        if self._current is not None:
            self._current.release()
        self._current = None
