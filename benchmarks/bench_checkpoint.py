"""What a checkpoint blocks training for, against plain copies of the same state.

Run `python benchmarks/bench_checkpoint.py`; it prints one JSON object. Each ratio is the geometric mean over
interleaved pairs, with its 95 % interval. `to_fresh_memory` compares with a clone of every tensor on the host,
`to_warm_memory` with copying into host tensors that were written to before: the least that any copy takes.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor

from elastic_batch.checkpoint import CheckpointInfo, CheckpointStore, CheckpointWriter

NUM_PAIRS = 24
WARM_UPS = 2

Nested = dict[str, dict[str, Tensor]]

# name: (number of tensors, elements of each); weights and one momentum buffer for each of them
STATES = {
    "WRN-16-4, 2.7 M parameters": (80, 34_000),
    "ResNet-50, 25.6 M parameters": (160, 160_000),
    "one layer of 64 M parameters": (1, 64_000_000),
}


def make_state(num_tensors: int, num_elements: int, device: str) -> Nested:
    """Weights and momentum buffers."""
    names = [f"layer{index}.weight" for index in range(num_tensors)]
    return {part: {name: torch.randn(num_elements, device=device) for name in names} for part in ("model", "momentum")}


def timed(work: Callable[[], object]) -> float:
    """Seconds, with the device's work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del result
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Geometric mean of the pairs' ratios with its 95 % interval."""
    logs = [math.log(mine / other) for mine, other in zip(ours, theirs, strict=True)]
    mean, half = statistics.mean(logs), 2.07 * statistics.stdev(logs) / math.sqrt(len(logs))
    bounds = {"ratio": mean, "low": mean - half, "high": mean + half}
    return {name: round(math.exp(value), 3) for name, value in bounds.items()}


def measure(num_tensors: int, num_elements: int, device: str) -> dict[str, object]:
    """Times of a checkpoint's blocking part and of plain copies, in turn."""
    state = make_state(num_tensors, num_elements, device)
    tensors = [tensor for part in state.values() for tensor in part.values()]
    warm = [torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor) for tensor in tensors]
    times: dict[str, list[float]] = {"blocked": [], "fresh": [], "warm": [], "written": []}
    with tempfile.TemporaryDirectory() as directory, CheckpointWriter(CheckpointStore(directory, keep=1)) as writer:
        for number in range(NUM_PAIRS + WARM_UPS):
            info = CheckpointInfo(position=number, update=number)
            blocked = timed(lambda info=info: writer.copy_and_submit(state, info))  # type: ignore[misc]  # bound now
            start = time.perf_counter()
            writer.wait()
            written = time.perf_counter() - start
            fresh = timed(lambda: [tensor.to("cpu", copy=True) for tensor in tensors])
            again = timed(lambda: torch._foreach_copy_(warm, tensors))
            if number >= WARM_UPS:
                for name, seconds in zip(times, (blocked, fresh, again, written), strict=True):
                    times[name].append(seconds)
    return {
        "megabytes": round(sum(tensor.nbytes for tensor in tensors) / 1e6, 1),
        "tensors": len(tensors),
        "blocked_milliseconds": round(1e3 * statistics.median(times["blocked"]), 2),
        "written_in_background_milliseconds": round(1e3 * statistics.median(times["written"]), 1),
        "to_fresh_memory": ratio(times["blocked"], times["fresh"]),
        "to_warm_memory": ratio(times["blocked"], times["warm"]),
    }


def main() -> None:
    """Print the figures of every state, on the CPU and on a CUDA device if there is one."""
    torch.set_num_threads(1)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    cases = {device: {name: measure(*sizes, device) for name, sizes in STATES.items()} for device in devices}
    print(json.dumps({"benchmark": "checkpoint", "torch": torch.__version__, "pairs": NUM_PAIRS, "cases": cases}))


if __name__ == "__main__":
    main()
