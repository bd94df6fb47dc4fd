"""What the session with the coordinator costs a steady world: its share of an update of 100 ms stays under 1 %.

Run `PYTHONPATH=tests python benchmarks/bench_session.py`: JSON to stdout, a table to stderr. One job, paced to updates
of a little more than 100 ms by a sleep, is trained at the same time by workers of a coordinator and by as many of a
fixed world. Compared is each worker's processor time for an update, all of its threads together, block by block.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from pairs import Elapsed, Ratio, difference_of, publish, read_options
from support.elastic import Cluster, Course
from support.elastic_jobs import MICRO_BATCH
from support.worlds import join_fixed, warm_context

from elastic_batch import Trainer
from elastic_batch.engines import FixedWorld, SoloEngine

BOUND = 0.01
PACE = 0.1
BLOCK = 10  # updates
WARM_UPS = 2  # blocks
SIZES = (1, 2)
COURSE = Course("endless", phases="0:16")  # as little work as two workers can share: it only adds noise


@dataclass(frozen=True, slots=True)
class Cost:
    """What the session costs a worker."""

    workers: int
    microseconds: list[float]
    """Of processor time for an update: the median and its interval."""
    share: Ratio
    """Of an update of `PACE`."""


def train(run_dir: Path, name: str, fixed: tuple[int, int] | None) -> None:
    """Train without an end, and write a line for each block: processor time until now.

    Args:
        run_dir: Of the run.
        name: Of this worker.
        fixed: Rank and size of a fixed world; None: the coordinator's.
    """
    log = os.open(run_dir / f"{name}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    membership = None
    if fixed is not None:
        rank, size = fixed
        membership = FixedWorld(SoloEngine() if size == 1 else join_fixed(rank, size, str(run_dir)))
    os.environ.update(ELASTIC_BATCH_RUN_DIR=str(run_dir), ELASTIC_BATCH_SLOT=name)
    job = COURSE.elastic_job
    model, optimizer, dataset = job.make()
    options: dict[str, Any] = {"micro_batch_size": MICRO_BATCH, "check_loss": False, "checkpoint_every": None}
    with (
        Trainer(model, optimizer, dataset, job.schedule, run_dir=run_dir, membership=membership, **options) as trainer,
        (run_dir / f"{name}.times").open("w", buffering=1) as times,
    ):
        for update in trainer.updates():
            for batch in update:
                update.backward(job.loss_fn(model, batch))
            if update.step() and trainer.num_updates % BLOCK == 0:
                times.write(f"{time.process_time()}\n")
            time.sleep(PACE)


def measure(size: int, num_pairs: int) -> Cost:
    """The cost in a world of `size` workers."""
    with tempfile.TemporaryDirectory() as folder:
        elastic, fixed = Path(folder, "elastic"), Path(folder, "fixed")
        fixed.mkdir()
        with Cluster(elastic, COURSE, min_workers=size, max_workers=size) as cluster:
            cluster.start_coordinator()
            places: list[tuple[Path, str, tuple[int, int] | None]] = []
            for rank in range(size):
                places += [(elastic, f"worker-{rank}", None), (fixed, f"worker-{rank}", (rank, size))]
            processes: list[BaseProcess] = [warm_context().Process(target=train, args=place) for place in places]
            try:
                for process in processes:
                    process.start()
                blocks = [_blocks(run_dir / f"{name}.times", num_pairs) for run_dir, name, _ in places]
            finally:
                for process in processes:
                    process.kill()
                    process.join()
    pairs = [pair for rank in range(size) for pair in zip(blocks[2 * rank], blocks[2 * rank + 1], strict=True)]
    cost = difference_of(pairs, "cpu")
    return Cost(size, [round(1e6 * value, 1) for value in cost], Ratio(*(round(value / PACE, 5) for value in cost)))


def _blocks(path: Path, count: int) -> list[Elapsed]:
    """What an update took in each of so many blocks after the warm-up; waits for them."""
    deadline = time.monotonic() + 60 + 3 * PACE * BLOCK * (count + WARM_UPS)
    while time.monotonic() < deadline:
        times = [float(line) for line in path.read_text().splitlines()] if path.exists() else []
        if len(times) > count + WARM_UPS:
            needed = times[WARM_UPS : WARM_UPS + count + 1]
            return [Elapsed(PACE, (after - before) / BLOCK) for before, after in itertools.pairwise(needed)]
        time.sleep(PACE)
    raise TimeoutError(f"{path.with_suffix('.log')}: {path.with_suffix('.log').read_text()}")


def main() -> int:
    """Measure both worlds and print the figures."""
    options = read_options(__doc__, quick="few pairs", only="numbers of workers")
    costs = [measure(size, options.pairs) for size in SIZES if options.only in str(size)]
    cases = [asdict(cost) | {"promise": cost.share.verdict(at_most=BOUND)} for cost in costs]
    rows = [
        [
            cost.workers,
            "{:.0f} [{:.0f}, {:.0f}]".format(*cost.microseconds),
            f"{100 * cost.share.ratio:.2f} % [{100 * cost.share.low:.2f}, {100 * cost.share.high:.2f}]",
            cost.share.verdict(at_most=BOUND),
        ]
        for cost in costs
    ]
    results = {"bound": BOUND, "pace_seconds": PACE, "block_updates": BLOCK, "pairs": options.pairs, "cases": cases}
    publish("session", results, [("workers", "cost us", "share of 100 ms", "at most 1 %"), *rows])
    return int(options.check and any(case["promise"] == "broken" for case in cases))


if __name__ == "__main__":
    sys.exit(main())
