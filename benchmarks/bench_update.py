"""The trainer's update loop against a plain torch loop and, in two processes, against DistributedDataParallel.

Run `python benchmarks/bench_update.py`: JSON to stdout, a table to stderr. Both loops train the same model with the
same kernels, data, optimizer and accumulation, at pass width 1, on one thread per process; they take turns block by
block, in rounds of fresh processes: each lays its memory out anew, which alone makes a loop some percent faster or
slower. The plain loop does not measure the noise scale, so the trainer does not either: `bench_noise.py` has its cost.
The ratio is that of throughputs, ours by theirs: at least 0.98 is promised for updates of several micro-batches. Those
of one show what an update costs by itself, whatever its length. `--quick` for a look, `--check` to fail where the
promise is not kept.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Generator
from contextlib import ExitStack, closing
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
    ratio_of_rounds,
    read_options,
    trusted_clock,
)

Loop = Generator[float, None, None]

BOUND = 0.98
BLOCK_SECONDS = 0.15  # a block is as many updates as take about this long
NUM_ROUNDS, NUM_PAIRS = 8, 480
WARM_UPS = 3  # blocks of one update, after the first, which compiles and checks the loss
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
] + [Case(workload, 1, False, 1) for workload in WORKLOADS]  # nothing is promised for these


def compare(case: Case, num_pairs: int, *, theirs_first: bool) -> list[Pair]:
    """Measure both loops in this process, block by block: (theirs, ours) for each pair.

    Args:
        case: What to compare.
        num_pairs: How often.
        theirs_first: Which loop is made first, and so lies first in memory.
    """
    torch.set_num_threads(1)
    measure = elapsed if case.processes == 1 else elapsed_together
    with ExitStack() as stack:
        theirs, ours = (stack.enter_context(closing(loop)) for loop in make_loops(case, theirs_first))
        warm_ups = [pair for _ in range(WARM_UPS) for pair in interleave(block(theirs), block(ours), 1, measure)]
        fastest = min(each.cpu / case.processes for pair in warm_ups for each in pair)
        num_updates = max(1, round(BLOCK_SECONDS / fastest))
        pairs = interleave(block(theirs, num_updates), block(ours, num_updates), num_pairs, measure)
    return [(first.divided(num_updates), second.divided(num_updates)) for first, second in pairs]


def make_loops(case: Case, theirs_first: bool) -> tuple[Loop, Loop]:
    """Their loop and ours, each after its first update: what it holds from then on is made in it."""

    def theirs() -> Loop:
        return plain_loop(workload, num_micro_batches=case.micro_batches, compiled=case.compiled)

    def ours() -> Loop:
        return trainer_loop(
            workload,
            num_micro_batches=case.micro_batches * case.processes,
            compile=case.compiled,
            measure_noise=False,
        )

    workload = WORKLOADS[case.workload]
    loops = {make: make() for make in ((theirs, ours) if theirs_first else (ours, theirs))}
    for loop in loops.values():
        next(loop)
    return loops[theirs], loops[ours]


def elapsed_together(work: Work) -> Elapsed:
    """As `elapsed`, over all workers: from a common start to the last one's end, and processor time in total."""
    dist.barrier()
    mine = elapsed(work)
    walls, cpus = torch.tensor([mine.wall]), torch.tensor([mine.cpu])
    dist.all_reduce(walls, dist.ReduceOp.MAX)
    dist.all_reduce(cpus)
    return Elapsed(walls.item(), cpus.item())


def run_round(case: Case, num_pairs: int, *, theirs_first: bool) -> list[Pair]:
    """Compare in fresh processes, several of them on gloo over the loopback interface."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    receiver, sender = context.Pipe(duplex=False)
    workers = [
        context.Process(target=work_in_round, args=(rank, port, case, num_pairs, theirs_first, sender), daemon=True)
        for rank in range(case.processes)
    ]
    for worker in workers:
        worker.start()
    sender.close()
    try:
        if not receiver.poll(TIMEOUT_SECONDS):
            raise SystemExit(f"no result within {TIMEOUT_SECONDS} s: {case}")
        pairs: list[Pair] = receiver.recv()
        return pairs
    except EOFError:
        raise SystemExit(f"a process died; its error is above: {case}") from None
    finally:
        for worker in workers:
            worker.join(5)
            worker.kill()


def work_in_round(rank: int, port: int, case: Case, num_pairs: int, theirs_first: bool, results: Connection) -> None:
    """What each process of a round does."""
    if case.processes > 1:
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            RANK=str(rank),
            WORLD_SIZE=str(case.processes),
            GLOO_SOCKET_IFNAME="lo",
        )
        dist.init_process_group("gloo")
    pairs = compare(case, num_pairs, theirs_first=theirs_first)
    if rank == 0:
        results.send(pairs)
    if dist.is_initialized():
        dist.destroy_process_group()


def summarize(case: Case, rounds: list[list[Pair]]) -> dict[str, Any]:
    """A case's figures."""
    pairs = [pair for each in rounds for pair in each]
    clock = trusted_clock(pairs, case.processes)
    by_clock = {name: ratio_of_rounds(rounds, name) for name in ("wall", "cpu")}
    theirs, ours = zip(*pairs, strict=True)
    return {
        **asdict(case),
        "plain_milliseconds": milliseconds(theirs, clock),
        "trainer_milliseconds": milliseconds(ours, clock),
        "clock": clock,
        "throughput_ratio": {name: asdict(value) for name, value in by_clock.items()},
        "by_round": [ratio_of(each, clock).ratio for each in rounds],
        "promise": by_clock[clock].verdict(at_least=BOUND) if case.micro_batches > 1 else "none",
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
    options = read_options(__doc__, quick="few pairs, one round, nothing compiled", only="cases", pairs=NUM_PAIRS)
    num_rounds = 1 if options.quick else NUM_ROUNDS
    num_pairs = -(-options.pairs // num_rounds)
    cases = [case for case in CASES if options.only in str(case) and not (options.quick and case.compiled)]
    measured: dict[Case, list[list[Pair]]] = {case: [] for case in cases}
    for number in range(num_rounds):  # of all cases in turn: what the machine does for a while then meets all
        for case in cases:
            measured[case].append(run_round(case, num_pairs, theirs_first=number % 2 == 0))
    results = [summarize(case, rounds) for case, rounds in measured.items()]
    said = {"bound": BOUND, "rounds": num_rounds, "pairs": num_pairs * num_rounds, "cases": results}
    publish("update", said, [HEAD, *map(row, results)])
    return int(options.check and any(result["promise"] == "broken" for result in results))


if __name__ == "__main__":
    sys.exit(main())
