"""The trainer's update loop against a plain torch loop and, in two processes, against DistributedDataParallel.

Run `python benchmarks/bench_update.py`: JSON to stdout, a table to stderr. Both loops train the same model with the
same kernels, data, optimizer and accumulation, at pass width 1, on one thread per process; they take turns block by
block. The ratio is that of throughputs, ours by theirs: at least 0.98 is promised. `--quick` for a look, `--check` to
fail where the promise is not kept.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from loops import WORKLOADS, block, plain_loop, trainer_loop
from pairs import (
    Elapsed,
    Pair,
    Ratio,
    Work,
    elapsed,
    interleave,
    milliseconds,
    publish,
    ratio_of,
    read_options,
    trusted_clock,
)

BOUND = 0.98
BLOCK_SECONDS = 0.15  # a block is as many updates as take about this long
WARM_UPS = 3  # blocks of one update; the first compiles and checks the loss
TIMEOUT_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison."""

    workload: str
    processes: int
    compiled: bool
    micro_batches: int
    """Of one update, on each worker."""


CASES = [
    Case(workload, processes, compiled, 4)
    for workload in WORKLOADS
    for processes in (1, 2)
    for compiled in (False, True)
] + [Case(workload, 1, False, 1) for workload in WORKLOADS]


def compare(case: Case, num_pairs: int) -> list[Pair]:
    """Measure both loops, block by block: (theirs, ours) for each pair. Its ratio is that of throughputs."""
    torch.set_num_threads(1)
    workload, count = WORKLOADS[case.workload], case.micro_batches
    measure = elapsed if case.processes == 1 else elapsed_together
    with (
        closing(plain_loop(workload, num_micro_batches=count, compiled=case.compiled)) as theirs,
        closing(trainer_loop(workload, num_micro_batches=count * case.processes, compile=case.compiled)) as ours,
    ):
        warm_ups = [pair for _ in range(WARM_UPS) for pair in interleave(block(theirs), block(ours), 1, measure)]
        fastest = min(each.cpu / case.processes for pair in warm_ups for each in pair)
        num_updates = max(1, round(BLOCK_SECONDS / fastest))
        pairs = interleave(block(theirs, num_updates), block(ours, num_updates), num_pairs, measure)
    return [(first.divided(num_updates), second.divided(num_updates)) for first, second in pairs]


def elapsed_together(work: Work) -> Elapsed:
    """As `elapsed`, over all workers: from a common start to the last one's end, and processor time in total."""
    dist.barrier()
    mine = elapsed(work)
    walls, cpus = torch.tensor([mine.wall]), torch.tensor([mine.cpu])
    dist.all_reduce(walls, dist.ReduceOp.MAX)
    dist.all_reduce(cpus)
    return Elapsed(walls.item(), cpus.item())


def run_world(cases: list[Case], num_pairs: int) -> list[list[Pair]]:
    """Run cases of two processes, on gloo over the loopback interface."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    receiver, sender = context.Pipe(duplex=False)
    workers = [
        context.Process(target=work_in_world, args=(rank, port, cases, num_pairs, sender), daemon=True)
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    sender.close()
    try:
        return [receiver.recv() if receiver.poll(TIMEOUT_SECONDS) else _too_late() for _ in cases]
    except EOFError:
        raise SystemExit("a worker of the two-process cases died; its error is above") from None
    finally:
        for worker in workers:
            worker.join(5)
            worker.kill()


def work_in_world(rank: int, port: int, cases: list[Case], num_pairs: int, results: Connection) -> None:
    """What each of the two processes does: every case, in order."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo"
    )
    dist.init_process_group("gloo")
    for case in cases:
        pairs = compare(case, num_pairs)
        if rank == 0:
            results.send(pairs)
    dist.destroy_process_group()


def _too_late() -> list[Pair]:
    raise SystemExit(f"no result of a two-process case within {TIMEOUT_SECONDS} s")


def summarize(case: Case, pairs: list[Pair]) -> dict[str, Any]:
    """A case's figures."""
    clock = trusted_clock(pairs, case.processes)
    by_clock = {name: ratio_of(pairs, name) for name in ("wall", "cpu")}
    theirs, ours = zip(*pairs, strict=True)
    return {
        **asdict(case),
        "plain_milliseconds": milliseconds(theirs, clock),
        "trainer_milliseconds": milliseconds(ours, clock),
        "clock": clock,
        "throughput_ratio": {name: asdict(value) for name, value in by_clock.items()},
        "promise": by_clock[clock].verdict(at_least=BOUND),
    }


def row(result: dict[str, Any]) -> list[object]:
    """A case's line in the table."""
    return [
        result["workload"],
        result["processes"],
        "compiled" if result["compiled"] else "eager",
        result["micro_batches"],
        result["plain_milliseconds"],
        result["trainer_milliseconds"],
        *(Ratio(**result["throughput_ratio"][clock]) for clock in ("wall", "cpu")),
        f"{result['promise']} ({result['clock']})",
    ]


HEAD = ("model", "processes", "mode", "micro-batches", "plain ms", "trainer ms", "by wall", "by cpu", "at least 0.98")


def main() -> int:
    """Run every case and print the figures."""
    options = read_options(__doc__, quick="few pairs, nothing compiled", only="cases")
    num_pairs = options.pairs
    cases = [case for case in CASES if options.only in str(case) and not (options.quick and case.compiled)]
    together = [case for case in cases if case.processes > 1]
    measured = dict(zip(together, run_world(together, num_pairs), strict=True)) if together else {}
    results = [summarize(case, measured.get(case) or compare(case, num_pairs)) for case in cases]
    publish("update", {"bound": BOUND, "pairs": num_pairs, "cases": results}, [HEAD, *map(row, results)])
    return int(options.check and any(result["promise"] == "broken" for result in results))


if __name__ == "__main__":
    sys.exit(main())
