"""Drives an elastic job from fault to fault, and measures how soon it commits again after each."""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self, cast

from support.elastic import Cluster, Course, train_alone
from support.elastic_jobs import MICRO_BATCH, SEED
from support.reference import largest_difference
from support.witness import check_witnesses

from elastic_batch.coordinator.state import MembershipConfig
from elastic_batch.rundir import read_run_ledger

CONFIG = MembershipConfig(
    max_workers=3, beat=0.2, eviction=1.5, gather=5.0, form=5.0, reconnect_grace=1.0, orphan_grace=2.0, cool_down=1.0
)
"""Short bounds, so that a trial meets many of them; the machine may be busy."""
UPDATE_SECONDS = 2.0
"""What an update may take, with the start of its data and two neighbours, on a busy machine."""
RECONNECT_SECONDS = 1.0
"""The longest pause between two attempts of a worker to reach the coordinator."""
MILESTONE, UPDATES = 320, 300
PATIENCE_SECONDS = 60.0

_FLAGS = ("beat", "eviction", "gather", "form", "reconnect_grace", "orphan_grace", "cool_down")


def trial_course(job: str, updates: int = UPDATES) -> Course:
    """A long job that grows from two to four micro-batches early on."""
    return Course(
        job=job,
        pace=0.02,
        options={"num_workers": 2, "checkpoint_every": "160sp", "check_every": 50},
        end=MILESTONE + 32 * updates,
        phases=f"0:16 {MILESTONE}sp:32",
    )


@cache
def _reference(job: str, updates: int) -> dict[str, Any]:
    return train_alone(trial_course(job, updates))


class WitnessTail:
    """What witnesses wrote so far, read a piece at a time.

    Args:
        folder: Where their files are.
    """

    def __init__(self, folder: Path) -> None:
        self.lines: list[dict[str, Any]] = []
        self.last_update = -1
        self._folder = folder
        self._read: dict[Path, int] = {}

    def catch_up(self) -> list[dict[str, Any]]:
        """The lines since the last time."""
        new = []
        for path in self._folder.glob("*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                whole, _, _ = file.read().rpartition(b"\n")
            if whole:
                self._read[path] = self._read.get(path, 0) + len(whole) + 1
                new += [{**json.loads(text), "worker": path.stem} for text in whole.splitlines()]
        self.lines += new
        self.last_update = max([self.last_update, *(line["update"] for line in new)])
        return new

    def before(self, moment: float) -> tuple[int, int]:
        """The newest update and the newest generation that were witnessed before a moment."""
        earlier = [line for line in self.lines if line["time"] <= moment] or [{"update": -1, "generation": -1}]
        return max(line["update"] for line in earlier), max(line["generation"] for line in earlier)


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How a job came through a fault.

    Args:
        cell: Which fault, and where.
        victim: Who met it.
        job: What was trained.
        seconds: From the fault to the next commit.
        bound: Sum of the bounds in force.
    """

    cell: str
    victim: str
    job: str
    seconds: float
    bound: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a finished trial showed.

    Args:
        recoveries: By fault.
        difference: Between the end state and that of an undisturbed run.
        repeated: Updates that were committed again in a later world.
    """

    recoveries: list[Recovery]
    difference: float
    repeated: int


@dataclass
class Trial:
    """One run of a job, in which faults happen one after the other.

    Args:
        folder: The run's directory.
        job: What is trained.
        updates: How long, after the milestone.
    """

    folder: Path
    job: str
    updates: int = UPDATES
    recoveries: list[Recovery] = field(default_factory=list)

    def __post_init__(self) -> None:
        course = trial_course(self.job, self.updates)
        words = [
            word for name in _FLAGS for word in (f"--{name}-seconds".replace("_", "-"), str(getattr(CONFIG, name)))
        ]
        self.cluster = Cluster(self.folder, course, max_workers=CONFIG.max_workers, options=tuple(words))
        self.tail = WitnessTail(self.folder / "witness")
        self._names = (f"w{number}" for number in itertools.count(1))
        self._expected_deaths: set[str] = set()

    def __enter__(self) -> Self:
        self.cluster.start_coordinator()
        for _ in range(CONFIG.max_workers):
            self.start_worker()
        self.wait(lambda: self.tail.last_update >= 2, PATIENCE_SECONDS, "training begins")
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.__exit__()

    # What a fault does it to.

    def start_worker(self, faults: str = "") -> str:
        """Start a new worker and return its slot. No two share one: each is somebody else who crashes."""
        name = next(self._names)
        self.cluster.start_worker(name, faults)
        return name

    def by_rank(self) -> list[str]:
        """The slots of the world's workers."""
        status = self.cluster.status() or {"workers": []}
        ranked = [worker for worker in status["workers"] if worker["rank"] is not None]
        return [worker["slot"] for worker in sorted(ranked, key=lambda worker: worker["rank"])]

    def _can_be_told_to_end(self) -> bool:
        workers = (self.cluster.status() or {"workers": []})["workers"]
        staying = {worker["slot"] for worker in workers if worker["state"] != "draining"}
        return staying.issuperset(self.living())

    def living(self) -> list[str]:
        """The slots whose processes live; it is checked how the others ended."""
        for slot, process in list(self.cluster.workers.items()):
            if not process.is_alive():
                del self.cluster.workers[slot]
                good = (0, 75, -signal.SIGKILL) if slot in self._expected_deaths else (0, 75)
                assert process.exitcode in good, f"{slot} ended with {process.exitcode}\n{self.cluster.logs()}"
        return list(self.cluster.workers)

    def may_die(self, *slots: str) -> None:
        """A fault may kill these."""
        self._expected_deaths.update(slots)

    @property
    def has_room(self) -> bool:
        """Whether there are updates enough left for another fault."""
        self.tail.catch_up()
        return self.tail.last_update < self.updates - 60

    def bring_to(self, size: int) -> list[str]:
        """Have `size` workers train together, and no others live. Returns their slots by rank."""
        assert self.cluster.coordinator is not None
        if self.cluster.coordinator.poll() is not None:
            self.cluster.start_coordinator()
        # One that has not come so far dies of a SIGTERM like any program, and one that leaves dies of a second one.
        self.wait(self._can_be_told_to_end, PATIENCE_SECONDS, "all workers are known and none leaves")
        living, world = self.living(), self.by_rank()
        surplus = sorted(living, key=lambda slot: world.index(slot) if slot in world else len(world))[size:]
        for slot in surplus:
            self.cluster.kill(slot, signal.SIGTERM)
        for _ in range(size - len(living)):
            self.start_worker()
        self.wait(lambda: self._is_steady(size), PATIENCE_SECONDS, f"{size} workers train")
        return self.by_rank()

    def _is_steady(self, size: int) -> bool:
        self.tail.catch_up()
        living = self.living()
        for _ in range(size - len(living)):
            self.start_worker()
        status = self.cluster.status()
        assert status is None or status["ended"] is None, f"the job ended early\n{self.cluster.logs()}"
        if status is None or status["phase"] != "running" or not self.tail.lines:
            return False
        ranked = [worker for worker in status["workers"] if worker["rank"] is not None]
        is_whole = sorted(worker["slot"] for worker in ranked) == sorted(living) and len(ranked) == size
        # Not so where it was asked to regroup for a worker that has left again since: it will, at its next boundary.
        has_entered = all(worker["state"] == "active" for worker in ranked) and status["reason"].endswith(" trains")
        return is_whole and has_entered and self.tail.lines[-1]["generation"] == status["generation"]

    # How it came through.

    def wait(self, holds: Callable[[], bool], timeout: float, what: str) -> None:
        """Wait until something holds, reading what is witnessed meanwhile."""

        def looks() -> bool:
            self.tail.catch_up()
            return holds()

        self.cluster.wait_until(looks, timeout, f"{what} [{self.folder}]")

    def await_fault(self, count: int = 1) -> float:
        """Wait until faults that were armed have happened. Returns when the last one did."""
        before = len(self.cluster.happened())
        return self.await_faults_after(before, count)

    def await_faults_after(self, before: int, count: int = 1) -> float:
        """Wait until `count` more than `before` faults have happened. Returns when the last one did."""
        self.wait(lambda: len(self.cluster.happened()) >= before + count, PATIENCE_SECONDS, "the fault happens")
        return float(max(fault["time"] for fault in self.cluster.happened()[before:]))

    def recovers(self, cell: str, victim: str, moment: float, bound: float) -> float:
        """Wait for the first commit that was not under way at `moment`, and check the bound. Returns when it was."""
        found: list[float] = []

        def committed() -> bool:
            update, generation = self.tail.before(moment)
            # Update u + 1 may have been on its way when u was witnessed; u + 2 was not.
            found[:] = [
                line["time"]
                for line in self.tail.lines
                if line["time"] > moment and (line["update"] >= update + 2 or line["generation"] > generation)
            ]
            return bool(found)

        self.wait(committed, bound + PATIENCE_SECONDS, f"a commit after {cell} of {victim}")
        seconds = min(found) - moment
        recovery = Recovery(cell=cell, victim=victim, job=self.job, seconds=round(seconds, 3), bound=round(bound, 2))
        self.recoveries.append(recovery)
        assert seconds <= bound, f"{recovery}\n{self.cluster.logs()}"
        return min(found)

    def finish(self) -> Verdict:
        """Train to the end and check what is left."""
        self.cluster.hurry()
        if not self.living():
            self.start_worker()
        coordinator = self.cluster.coordinator
        assert coordinator is not None
        self.cluster.wait_until_finished(PATIENCE_SECONDS)
        self.living()
        assert coordinator.wait(40) == 0, self.cluster.logs()
        job = self.cluster.course.elastic_job
        repeated = check_witnesses(
            self.cluster.witnessed(),
            num_samples=len(cast(Sized, job.dataset())),
            seed=SEED,
            end=job.end,
            micro_batch_size=MICRO_BATCH,
        )
        assert read_run_ledger(self.cluster.run_dir).ranges == [(0, job.end)]
        expected = _reference(self.job, self.updates)
        difference = max(largest_difference(state, expected) for state in self.cluster.end_states())
        assert difference <= 1e-9, f"the end state is off by {difference}"
        return Verdict(recoveries=self.recoveries, difference=difference, repeated=repeated)


def after_loss(detect: float, *, formings: int = 1) -> float:
    """Seconds until the next commit after a worker is lost: noticed, come out, formed, trained."""
    return detect + CONFIG.gather + formings * CONFIG.form + UPDATE_SECONDS


def monotonic() -> float:
    """Now, on the witnesses' clock."""
    return time.monotonic()
