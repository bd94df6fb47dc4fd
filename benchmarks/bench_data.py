"""What batches from data workers cost the training process, against torch's own DataLoader over the same samples.

Run `python benchmarks/bench_data.py`: JSON to stdout, a table to stderr. Two data workers each; the samples are ready
in memory, so that what is measured is the way of a batch into the training process. Both have served some batches
before they are timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import count, cycle, islice
from typing import Any

import torch
from pairs import interleave, milliseconds, publish, ratio_of, read_options
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from elastic_batch.data import PassRequest, open_source
from elastic_batch.stream import SampleStream

MICRO_BATCH, NUM_SAMPLES, NUM_WORKERS = 32, 512, 2
CASES: dict[str, tuple[tuple[int, ...], int]] = {
    "digits, 1x8x8": ((1, 8, 8), 100),
    "CIFAR-10, 3x32x32": ((3, 32, 32), 60),
    "ImageNet, 3x224x224": ((3, 224, 224), 4),
}
"""What -> (shape of a sample, batches that are timed at once)."""


class Images(Dataset[Any]):
    """(image, label, number), each image made once."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.images = torch.randn(NUM_SAMPLES, *shape)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.images[index], index % 10, index


def ours(dataset: Images) -> Iterator[Any]:
    """Batches of the package, without end."""
    source = open_source(
        dataset,
        stream=SampleStream(NUM_SAMPLES, 1),
        micro_batch_size=MICRO_BATCH,
        device="cpu",
        num_workers=NUM_WORKERS,
    )
    source.start(PassRequest(position, 1) for position in count(step=MICRO_BATCH))
    try:
        while True:
            yield source.next()
    finally:
        source.close()


def torchs(dataset: Images) -> Iterator[Any]:
    """Batches of torch's DataLoader; it starts each epoch anew, its workers stay."""
    options: dict[str, Any] = {"shuffle": True, "num_workers": NUM_WORKERS, "persistent_workers": True}
    loader: DataLoader[Any] = DataLoader(dataset, MICRO_BATCH, **options)
    for epoch in cycle([loader]):
        yield from epoch


def take(batches: Iterator[Any], number: int) -> Callable[[], None]:
    """Work that consumes so many batches."""

    def work() -> None:
        for _ in islice(batches, number):
            pass

    work()
    return work


def main() -> int:
    """Measure every case."""
    options = read_options(__doc__, quick="six pairs")
    torch.set_num_threads(1)
    results = []
    for name, (shape, number) in CASES.items():
        if options.only not in name:
            continue
        dataset = Images(shape)
        pairs = interleave(take(ours(dataset), number), take(torchs(dataset), number), options.pairs)
        ratio = ratio_of(pairs, "wall")
        results.append(
            {
                "case": name,
                "ratio": ratio.ratio,
                "interval": [ratio.low, ratio.high],
                "milliseconds_a_batch": milliseconds([one for one, _ in pairs], "wall", number),
                "milliseconds_a_batch_of_torch": milliseconds([other for _, other in pairs], "wall", number),
                "processor_milliseconds_a_batch": milliseconds([one for one, _ in pairs], "cpu", number),
                "processor_milliseconds_a_batch_of_torch": milliseconds([other for _, other in pairs], "cpu", number),
            }
        )
    head = ("case", "ratio", "interval", "ms", "torch's ms", "cpu ms", "torch's cpu ms")
    publish("data", {"cases": results}, [head, *(list(result.values()) for result in results)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
