"""The order of samples of a whole job, as a sampler for any DataLoader."""

from __future__ import annotations

from collections.abc import Iterator

from elastic_batch.stream import SampleStream
from torch.utils.data import Sampler

CHUNK = 8192
"""Indices that are computed at once."""


class TrainingOrder(Sampler[int]):
    """Gives the sample at each position from `start` to `stop`, across epochs.

    Batches are full up to the end of the job, and whoever knows a position can go on from there.

    Args:
        num_samples: Samples of the training set.
        stop: Position after the last sample, `schedule.end` for the whole job.
        start: Position of the first sample: that of the checkpoint, in a resumed run.
        seed: Of the permutations, one for each epoch.
        rank: Every `world_size`-th position, from this one on, is this process's; for frameworks that do not deal
            batches out themselves.
        world_size: Processes that share the positions. `stop - start` is a multiple of it.
    """

    def __init__(
        self, num_samples: int, stop: int, *, start: int = 0, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.stream = SampleStream(num_samples, seed)
        self.start, self.stop = start, stop
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return (self.stop - self.start) // self.world_size

    def __iter__(self) -> Iterator[int]:
        step = CHUNK * self.world_size
        for position in range(self.start, self.stop, step):
            indices = self.stream.indices(position, min(position + step, self.stop))
            yield from indices[self.rank :: self.world_size].tolist()
