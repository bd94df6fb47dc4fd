"""How fast the sample stream is on one core: indices a second for large ranges, microseconds for a micro-batch of 32.

Run `python benchmarks/bench_stream.py`; it prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from elastic_batch.stream import SampleStream

CASES: dict[str, tuple[int, int | None]] = {
    "digits": (1437, None),
    "cifar10": (50_000, None),
    "imagenet": (1_281_167, None),
    "imagenet, blocks of 256": (1_281_167, 256),
    "10^12": (10**12, None),
    "10^12, blocks of 1024": (10**12, 1024),
}
LARGE = 2_000_000  # positions of a large range
REPEATS = 9


def seconds(work: Callable[[], object]) -> float:
    """Median over the repeats."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(num_samples: int, block_size: int | None) -> dict[str, float]:
    """Throughput, and the cost of a micro-batch of 32 in a run of positions and after a jump."""
    stream = SampleStream(num_samples, 1, block_size=block_size)
    large = seconds(lambda: stream.indices(7, 7 + LARGE))
    run = seconds(lambda: [stream.indices(start, start + 32) for start in range(0, 32_768, 32)])
    jumps = seconds(lambda: [stream.indices(start, start + 32) for start in range(0, 2_000_000, 20_000)])
    return {
        "million_indices_per_second": round(LARGE / large / 1e6, 1),
        "micro_batch_microseconds": round(run / 1024 * 1e6, 1),
        "micro_batch_after_a_jump_microseconds": round(jumps / 100 * 1e6, 1),
    }


def main() -> None:
    """Print the figures of every case."""
    results = {name: measure(*case) for name, case in CASES.items()}
    slowest = min(result["million_indices_per_second"] for result in results.values())
    print(json.dumps({"numpy": np.__version__, "slowest_million_indices_per_second": slowest, "cases": results}))


if __name__ == "__main__":
    main()
