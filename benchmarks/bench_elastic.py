"""How long training stands still when its world changes: real processes over the loopback interface.

Run `make bench-elastic`: JSON to stdout, a table to stderr. A worker is *ready* when it has connected and waits, *warm*
when it is forked from a process that has imported everything, *cold* when a Python is started for it. Every clock
starts at the signal, the launch or the commit that its line names, and stops at the next commit of the new world, as
the workers witness it; an update takes about `PACE` seconds of sleep and a few milliseconds of work.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from pairs import publish
from support.elastic import Cluster, Course

PACE = 0.02
EVICTION = 3.0
SLOTS = (f"w{number}" for number in count())


def main() -> int:
    """Measure every change and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7, help="of each measurement; default: 7")
    parser.add_argument("--only", default="", help="measurements whose description contains this")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a promise is broken")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the processes of a measurement would outlive it
    results = []
    for what, limit, measure in MEASUREMENTS:
        if options.only in what:
            seconds = list(measure(options.repetitions))
            results.append(summarize(what, limit, seconds))
            print(f"{what}: {results[-1]['median_seconds']} s", file=sys.stderr)
    head = ("what", "median s", "worst s", "n", "at most s", "promise")
    rows = [
        [r["what"], r["median_seconds"], r["worst_seconds"], r["n"], r["at_most_seconds"], r["promise"]]
        for r in results
    ]
    publish("elastic", {"pace_seconds": PACE, "eviction_seconds": EVICTION, "cases": results}, [head, *rows])
    return int(options.check and any(result["promise"] == "broken" for result in results))


def summarize(what: str, limit: float | None, seconds: list[float]) -> dict[str, Any]:
    """One line of the table."""
    median = round(statistics.median(seconds), 3)
    return {
        "what": what,
        "n": len(seconds),
        "median_seconds": median,
        "worst_seconds": round(max(seconds), 3),
        "at_most_seconds": limit,
        "promise": None if limit is None else "holds" if median <= limit else "broken",
    }


@contextmanager
def world(size: int, job: str = "endless", pace: float = PACE, num_workers: int = 2) -> Iterator[Cluster]:
    """A job that trains with `size` workers."""
    course = Course(job, pace, {"num_workers": num_workers, "checkpoint_every": None})
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder) / "run", course, max_workers=size, options=("--eviction-seconds", str(EVICTION)))
        with cluster:
            cluster.start_coordinator()
            for _ in range(size):
                cluster.start_worker(next(SLOTS))
            wait_for_world(cluster, size)
            yield cluster


def wait_for_world(cluster: Cluster, size: int) -> None:
    """Until `size` workers have trained together for some updates."""
    cluster.wait_until(lambda: _size(cluster) == size, 60, f"{size} workers train")
    cluster.wait_for_update(cluster.last_update() + 5)


def _size(cluster: Cluster) -> int:
    status = cluster.status()
    if status is None or status["phase"] != "running":
        return 0
    return sum(worker["state"] == "active" for worker in status["workers"])


def slots_by_rank(cluster: Cluster) -> list[str]:
    """The world's workers, the lead first: it is the one whose process writes the records."""
    status = cluster.status()
    assert status is not None
    return [worker["slot"] for worker in status["workers"] if worker["state"] == "active"]


def until_next_world(cluster: Cluster, since: float, *, after: int) -> float:
    """Seconds from `since` to the first commit of a generation above `after`."""
    time.sleep(1)  # the witnesses have the times; reading them meanwhile would take the workers' processors
    found: list[float] = []

    def committed() -> bool:
        found[:] = [line["time"] for line in cluster.witnessed() if line["generation"] > after]
        return bool(found)

    cluster.wait_until(committed, 60, "the next world commits")
    return min(found) - since


def generation_of(cluster: Cluster) -> int:
    """The newest generation that committed."""
    return max(int(line["generation"]) for line in cluster.witnessed())


def after_signal(number: int, place: int, size: int = 3) -> Callable[[int], Iterator[float]]:
    """From a signal to the worker at `place` (0: the first) to the next commit of the others."""

    def measure(repetitions: int) -> Iterator[float]:
        with world(size) as cluster:
            for _ in range(repetitions):
                slot, generation = slots_by_rank(cluster)[place], generation_of(cluster)
                since = time.monotonic()
                cluster.kill(slot, number)
                yield until_next_world(cluster, since, after=generation)
                if number == signal.SIGSTOP:
                    cluster.kill(slot)
                cluster.start_worker(next(SLOTS))
                wait_for_world(cluster, size)

    return measure


def pause_of_join(job: str = "endless", num_workers: int = 2) -> Callable[[int], Iterator[float]]:
    """The others' longest time between two commits while a worker joins, less that of an update without a join."""

    def measure(repetitions: int) -> Iterator[float]:
        for _ in range(repetitions):
            with world(2, job, num_workers=num_workers) as cluster:
                cluster.kill(slots_by_rank(cluster)[1])
                cluster.wait_until(lambda: _size(cluster) == 1, 60, "one worker trains")
                cluster.wait_for_update(cluster.last_update() + 5)
                since = time.monotonic()
                cluster.start_worker(next(SLOTS))
                wait_for_world(cluster, 2)
                yield longest_gap(cluster, since)

    return measure


def longest_gap(cluster: Cluster, since: float) -> float:
    """Between two commits of the first worker after `since`, less its median."""
    gaps = gaps_between_commits(cluster, cluster.witnessed()[0]["worker"], since)
    return max(gaps) - statistics.median(gaps)


def gaps_between_commits(cluster: Cluster, worker: str, since: float) -> list[float]:
    """Seconds between a worker's commits, from a moment on."""
    times = [float(line["time"]) for line in cluster.witnessed() if line["worker"] == worker and line["time"] > since]
    return [later - earlier for earlier, later in pairwise(times)]


def from_launch(*, cold: bool) -> Callable[[int], Iterator[float]]:
    """From the launch of a worker to the first commit with it."""

    def measure(repetitions: int) -> Iterator[float]:
        for _ in range(repetitions if not cold else min(3, repetitions)):
            with world(2) as cluster:
                cluster.kill(slots_by_rank(cluster)[1])
                cluster.wait_until(lambda: _size(cluster) == 1, 60, "one worker trains")
                cluster.wait_for_update(cluster.last_update() + 5)
                generation, since = generation_of(cluster), time.monotonic()
                if cold:
                    start_cold(cluster)
                else:
                    cluster.start_worker(next(SLOTS))
                yield until_next_world(cluster, since, after=generation)

    return measure


def start_cold(cluster: Cluster) -> None:
    """Start a Python of its own for a worker; it ends with the cluster's coordinator, or is killed here."""
    program = (
        "import sys; from pathlib import Path; from support.elastic import Course, train_as_worker; "
        f"train_as_worker({cluster.course!r}, {str(cluster.run_dir)!r}, 'cold')"
    )
    environ = {**os.environ, "ELASTIC_BATCH_RUN_DIR": str(cluster.run_dir), "OMP_NUM_THREADS": "1"}
    with (cluster.run_dir / "logs" / "cold.log").open("ab") as log:
        cluster.others.append(subprocess.Popen((sys.executable, "-c", program), env=environ, stdout=log, stderr=log))


def coordinator_away(seconds: float) -> Callable[[int], Iterator[float]]:
    """The longest time between two commits while nobody coordinates, less three medians."""

    def measure(repetitions: int) -> Iterator[float]:
        with world(2) as cluster:
            for _ in range(min(3, repetitions)):
                lead, since = cluster.witnessed()[0]["worker"], time.monotonic()
                cluster.kill_coordinator()
                time.sleep(seconds)
                cluster.start_coordinator()
                wait_for_world(cluster, 2)
                gaps = gaps_between_commits(cluster, lead, since)
                yield max(gaps) - 3 * statistics.median(gaps)

    return measure


def loss_while_away(repetitions: int) -> Iterator[float]:
    """From the coordinator's return, when it answers, to the next commit of those whose fellow died meanwhile."""
    with world(2) as cluster:
        for _ in range(repetitions):
            generation = generation_of(cluster)
            cluster.kill_coordinator()
            cluster.kill(slots_by_age(cluster)[-1])
            time.sleep(3)
            cluster.start_coordinator()
            yield until_next_world(cluster, time.monotonic(), after=generation)
            cluster.start_worker(next(SLOTS))
            wait_for_world(cluster, 2)


def slots_by_age(cluster: Cluster) -> list[str]:
    """The living workers, the oldest first."""
    return [slot for slot, process in cluster.workers.items() if process.is_alive()]


def under_torchrun(repetitions: int) -> Iterator[float]:
    """From kill -9 of one of three workers under torchrun, which starts all anew from a checkpoint, to their commit."""
    course = Course("endless", PACE, {"num_workers": 2, "checkpoint_every": "640sp"})
    program = (
        "import os; from support.elastic import Course, train_as_worker; "
        f"train_as_worker({course!r}, os.environ['BENCH_RUN_DIR'], 'rank' + os.environ['RANK'])"
    )
    words = ("--standalone", "--nproc-per-node=3", "--max-restarts=99", "--no-python", sys.executable, "-c", program)
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder) / "run", course)  # for what its workers leave behind
        environ = {**os.environ, "BENCH_RUN_DIR": str(cluster.run_dir), "OMP_NUM_THREADS": "1"}
        with cluster, (cluster.run_dir / "logs" / "torchrun.log").open("wb") as log:
            agent = (sys.executable, "-m", "torch.distributed.run", *words)
            cluster.others.append(subprocess.Popen(agent, env=environ, stdout=log, stderr=log))
            try:
                for _ in range(min(3, repetitions)):
                    cluster.wait_for_update(cluster.last_update() + 40, 120)
                    known = {line["worker"] for line in cluster.witnessed()}
                    since = time.monotonic()
                    os.kill(int(newest(cluster, "rank2").rpartition("-")[2]), signal.SIGKILL)
                    yield first_commit_of_others(cluster, known) - since
            finally:
                os.kill(cluster.others[-1].pid, signal.SIGTERM)
                cluster.others[-1].wait(60)  # it ends its workers


def newest(cluster: Cluster, slot: str) -> str:
    """The witness of the process that has a slot now."""
    names = (str(line["worker"]) for line in reversed(cluster.witnessed()))
    return next(name for name in names if name.startswith(slot))


def first_commit_of_others(cluster: Cluster, known: set[str]) -> float:
    """When a process that is not among the known first committed."""
    found: list[float] = []

    def committed() -> bool:
        found[:] = [line["time"] for line in cluster.witnessed() if line["worker"] not in known]
        return bool(found)

    cluster.wait_until(committed, 120, "new processes commit")
    return min(found)


def at_milestone(repetitions: int) -> Iterator[float]:
    """From the commit that crosses a milestone to the first commit with the worker that stood by."""
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as folder:
            course = Course("digits", PACE, {"num_workers": 2, "checkpoint_every": None})
            with Cluster(Path(folder) / "run", course, max_workers=3) as cluster:
                cluster.start_coordinator()
                for _ in range(3):
                    cluster.start_worker(next(SLOTS))
                cluster.wait_for_update(50)
                lines = cluster.witnessed()
        crossed = min(line["time"] for line in lines if line["stop"] >= 640)
        before = max(line["generation"] for line in lines if line["stop"] <= 640)
        yield min(line["time"] for line in lines if line["generation"] > before) - crossed


MEASUREMENTS: list[tuple[str, float | None, Callable[[int], Iterator[float]]]] = [
    ("kill -9 of a worker, from the signal to the next commit", 0.15, after_signal(signal.SIGKILL, 2)),
    ("kill -9 of the first worker, from the signal to the next commit", 0.15, after_signal(signal.SIGKILL, 0)),
    (
        "SIGTERM to a worker, from the signal to the next commit without it",
        0.25,
        after_signal(signal.SIGTERM, 2),
    ),
    ("SIGSTOP of a worker, from the signal to the next commit", EVICTION + 0.3, after_signal(signal.SIGSTOP, 2)),
    ("a ready worker joins: the others' pause", 0.2, pause_of_join()),
    ("a warm worker joins: from its launch to the first commit with it", None, from_launch(cold=False)),
    ("a cold worker joins: from its launch to the first commit with it", None, from_launch(cold=True)),
    ("at a milestone, from the commit that crosses it to the first commit with the ready worker", 0.5, at_milestone),
    ("the coordinator is away for 30 s: the longest time between commits, less 3 medians", 0.05, coordinator_away(30)),
    ("a worker dies meanwhile: from the coordinator's return to the next commit", 2.0, loss_while_away),
    (
        "torchrun: kill -9 of a worker, from the signal to the next commit, of processes started anew",
        None,
        under_torchrun,
    ),
    ("a ready worker takes over 100 million parameters: the others' pause", None, pause_of_join("large", 0)),
]

if __name__ == "__main__":
    sys.exit(main())
