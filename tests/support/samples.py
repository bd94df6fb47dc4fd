"""Data sets and requests for the tests of data loading."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from elastic_batch.data import BatchSource, PassRequest


class Draws(Dataset[tuple[torch.Tensor, int]]):
    """Sample i is i and what each of the global generators gives: an augmentation, in short."""

    def __init__(self, num_samples: int = 101) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        draws = [random.random(), np.random.rand(), np.random.randn(), float(torch.rand(()))]
        return torch.tensor([index, *draws], dtype=torch.float64), index


class DrawsAtOnce(Draws):
    """The same, fetched together."""

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        return [self[index] for index in indices]


class Troubled(Dataset[torch.Tensor]):
    """Does as files in a directory say: `fail` raises, `die` kills the process, `pid-N` tell who lives.

    The files let a test change its mind while data workers run.
    """

    def __init__(self, directory: Path, num_samples: int = 64) -> None:
        self.directory = directory
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> torch.Tensor:
        (self.directory / f"pid-{os.getpid()}").touch()
        if (self.directory / "fail").exists():
            raise UnpicklableError(index)
        if (self.directory / "die").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(index)

    @property
    def pids(self) -> set[int]:
        """Processes that have read."""
        return {int(path.name.removeprefix("pid-")) for path in self.directory.glob("pid-*")}


class UnpicklableError(Exception):
    """Would break whoever unpickles it."""

    def __init__(self, index: int) -> None:
        super().__init__(f"sample {index} is broken")
        self.trap = lambda: None


def requests(count: int, *, width: int = 1, start: int = 0, micro_batch_size: int = 4) -> Iterator[PassRequest]:
    """`count` micro-batches from a position on, in passes of `width`."""
    step = width * micro_batch_size
    return iter([PassRequest(start + i * step, width) for i in range(count // width)])


def read(source: BatchSource, count: int, *, width: int = 1, start: int = 0, micro_batch_size: int = 4) -> list[Any]:
    """The batches of `requests`."""
    source.start(requests(count, width=width, start=start, micro_batch_size=micro_batch_size))
    return [source.next() for _ in range(count // width)]
