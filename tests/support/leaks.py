"""Changes of a world, one after another, and what a process holds meanwhile."""

from __future__ import annotations

import os
import signal
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from support.elastic import Cluster

SURVIVOR = "survivor"
CHANGES_OF_A_ROUND = 4


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process holds at one moment.

    Attributes:
        threads: How many.
        descriptors: How many are open.
        children: How many processes it has started and not ended.
        memory: Resident bytes that are no file's: a library's pages come when its code is first used, and cost nothing.
    """

    threads: int
    descriptors: int
    children: int
    memory: int

    @classmethod
    def of(cls, pid: int) -> Holdings:
        """Of a living process."""
        folder = Path("/proc", str(pid))
        tasks = list((folder / "task").iterdir())
        children = 0
        for task in tasks:
            with suppress(OSError):  # the thread has ended
                children += len((task / "children").read_text().split())
        [memory] = (line for line in (folder / "status").read_text().splitlines() if line.startswith("RssAnon:"))
        return cls(len(tasks), len(os.listdir(folder / "fd")), children, int(memory.split()[1]) * 1024)


def median(found: Sequence[Holdings]) -> Holdings:
    """Each of the numbers' median: a single look may meet a connection that is just being made."""
    return Holdings(
        *(
            int(statistics.median(getattr(each, name) for each in found))
            for name in ("threads", "descriptors", "children", "memory")
        )
    )


class ChangingWorld:
    """Brings a world of two through change after change; one of its workers lives through all.

    Args:
        cluster: With a coordinator, without workers, for at most two in a world.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._names = (f"partner-{number}" for number in count())
        cluster.start_worker(SURVIVOR)
        self._await(SURVIVOR)
        self._partner = self._start()
        self._await(SURVIVOR, self._partner)

    def rounds(self) -> Iterator[None]:
        """Without an end; yields after each `CHANGES_OF_A_ROUND` changes, when a world of two trains."""
        while True:
            self._cluster.kill(self._partner)  # nobody is there to take its place
            self._await(SURVIVOR)
            self._partner = self._start()
            self._await(SURVIVOR, self._partner)
            self._replace(signal.SIGTERM)
            self._replace(signal.SIGKILL)
            yield

    @property
    def holdings(self) -> tuple[Holdings, Holdings]:
        """The survivor's and the coordinator's."""
        survivor, coordinator = self._cluster.workers[SURVIVOR].pid, self._cluster.coordinator
        assert survivor is not None
        assert coordinator is not None
        return Holdings.of(survivor), Holdings.of(coordinator.pid)

    def _replace(self, number: int) -> None:
        """A standby worker takes the place of one that gets a signal."""
        standby = self._start()
        self._cluster.wait_until(lambda: standby in self._slots("standby"), 30, f"{standby} stands by")
        self._cluster.kill(self._partner, number)
        self._partner = standby
        self._await(SURVIVOR, standby)

    def _start(self) -> str:
        name = next(self._names)
        self._cluster.start_worker(name)
        return name

    def _await(self, *slots: str) -> None:
        """Wait until just these train."""
        self._cluster.wait_until(lambda: self._slots("active") == set(slots), 30, f"{' and '.join(slots)} train")

    def _slots(self, condition: str) -> set[str]:
        status = self._cluster.status()
        if status is None or status["phase"] != "running":
            return set()
        return {worker["slot"] for worker in status["workers"] if worker["state"] == condition}
