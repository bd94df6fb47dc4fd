"""What it is worth on the CPU that memory which an update frees stays in the process.

Run `python benchmarks/bench_heap.py`: JSON to stdout, a table to stderr. Fresh processes train the same model, in turn
with the heap as the trainer sets it and as the C library has it by default; the ratio is that of throughputs. Faults
are page faults of an update.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from contextlib import closing
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
from loops import WORKLOADS, trainer_loop
from pairs import Options, publish, ratio, read_options

import elastic_batch.trainer.trainer

NUM_ROUNDS = 12
MICRO_BATCHES, WARM_UPS, UPDATES = 4, 5, 25


def measure(workload: str, kept: bool, results: Connection) -> None:
    """Send the median seconds and page faults of an update."""
    torch.set_num_threads(1)
    if not kept:
        mock.patch.object(elastic_batch.trainer.trainer, "keep_freed_memory").start()
    spent = []
    with closing(trainer_loop(WORKLOADS[workload], num_micro_batches=MICRO_BATCHES)) as loop:
        for _ in range(WARM_UPS):
            next(loop)
        for _ in range(UPDATES):
            started, faults = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            next(loop)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            spent.append((time.perf_counter() - started, faults))
    seconds, all_faults = zip(*spent, strict=True)
    results.send((statistics.median(seconds), statistics.median(all_faults)))


def in_fresh_process(workload: str, kept: bool) -> tuple[float, float]:
    """What `measure` sends."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(workload, kept, sender))
    process.start()
    sender.close()
    found: tuple[float, float] = receiver.recv()
    process.join()
    return found


def compare(workload: str, options: Options) -> dict[str, Any]:
    """One model's figures."""
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(options.pairs):
        for kept in (True, False) if number % 2 else (False, True):
            found[kept].append(in_fresh_process(workload, kept))
    seconds, faults = ({kept: [pair[part] for pair in found[kept]] for kept in found} for part in (0, 1))
    return {
        "workload": workload,
        "milliseconds": {"default": _middle(seconds[False], 1e3), "kept": _middle(seconds[True], 1e3)},
        "faults": {"default": _middle(faults[False]), "kept": _middle(faults[True])},
        "throughput_ratio": str(ratio(seconds[False], seconds[True])),
    }


def _middle(values: list[float], scale: float = 1.0) -> float:
    return round(scale * statistics.median(values), 1)


def main() -> None:
    """Compare for each model and print the figures."""
    options = read_options(__doc__, quick="few rounds", only="models", pairs=NUM_ROUNDS)
    results = [compare(workload, options) for workload in WORKLOADS if options.only in workload]
    head = ("model", "ms by default", "ms kept", "faults by default", "faults kept", "throughput")
    table = [
        (each["workload"], *each["milliseconds"].values(), *each["faults"].values(), each["throughput_ratio"])
        for each in results
    ]
    publish("heap", {"rounds": options.pairs, "micro_batches": MICRO_BATCHES, "cases": results}, [head, *table])


if __name__ == "__main__":
    main()
