"""Places where a fault may be made to happen: they do nothing, at next to no cost, unless the environment has a plan.

`ELASTIC_BATCH_FAULTS="reduce.header:3=kill;form.start:1=stop,5"` kills the process when it reaches `reduce.header` for
the third time, and stops it for five seconds when it reaches `form.start` for the first time. Where
`ELASTIC_BATCH_FAULTS_RECORD` names a file, each fault is noted there, with its time, before it happens.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from elastic_batch.errors import InvalidSetting, UnknownName

VARIABLE, RECORD = "ELASTIC_BATCH_FAULTS", "ELASTIC_BATCH_FAULTS_RECORD"

PLACES = {
    "join.ready": "a worker is about to say that it waits for a world",
    "form.start": "it is told to form a world",
    "form.done": "it is connected to the others",
    "sync.start": "the workers of a new world are about to say where they are",
    "transfer.tensor": "a tensor of the state is about to be sent or received",
    "sync.done": "all workers have one state",
    "compute.pass": "a micro-batch's backward is about to run",
    "reduce.start": "a worker's share is done",
    "reduce.header": "the gradients are launched, the header is not",
    "commit.start": "the header says that the update commits",
    "commit.done": "the update is applied, and not yet recorded",
    "checkpoint.start": "a checkpoint is about to be copied",
    "leave.start": "a worker is about to leave at a boundary",
    "coordinator.decision": "the coordinator is about to carry a decision out",
    "coordinator.form": "a new generation is in the journal, and nobody was told",
}
"""Place -> when a process reaches it."""

ACTIONS = ("kill", "stop", "leave", "slow", "partition")
"""SIGKILL; SIGSTOP for a time; SIGTERM; sleep; cut off from the coordinator for a time."""

_FAULT = re.compile(r"(?P<place>[\w.]+):(?P<count>\d+)=(?P<action>\w+)(?:,(?P<seconds>[\d.]+))?")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a plan.

    Args:
        place: Where.
        count: At which time that the process reaches the place, from 1.
        action: What happens.
        seconds: How long a stop, a sleep or a partition lasts.
    """

    place: str
    count: int
    action: str
    seconds: float = 1.0

    def __str__(self) -> str:
        return f"{self.place}:{self.count}={self.action},{self.seconds:g}"

    @classmethod
    def parse(cls, text: str) -> Fault:
        """A fault as `VARIABLE` has it.

        Raises:
            InvalidSetting: The text is not of the form PLACE:COUNT=ACTION[,SECONDS].
            UnknownName: There is no such place or action.

        >>> str(Fault.parse("commit.start:2=stop,0.5"))
        'commit.start:2=stop,0.5'
        """
        if (match := _FAULT.fullmatch(text.strip())) is None:
            raise InvalidSetting(VARIABLE, text, "must be PLACE:COUNT=ACTION[,SECONDS], separated by semicolons")
        fault = cls(match["place"], int(match["count"]), match["action"], float(match["seconds"] or 1))
        if fault.place not in PLACES:
            raise UnknownName("failpoint", fault.place, PLACES)
        if fault.action not in ACTIONS:
            raise UnknownName("fault", fault.action, ACTIONS)
        return fault


class FaultPlan:
    """The faults that await this process.

    Args:
        text: As in `VARIABLE`.
    """

    def __init__(self, text: str) -> None:
        self._waiting = {(fault.place, fault.count): fault for fault in map(Fault.parse, filter(None, text.split(";")))}
        self._reached: Counter[str] = Counter()

    def reach(self, place: str) -> None:
        """Let happen what awaits the process here."""
        self._reached[place] += 1
        fault = self._waiting.pop((place, self._reached[place]), None)
        if fault is not None:
            _happen(fault)


_plan: FaultPlan | None = FaultPlan(os.environ[VARIABLE]) if VARIABLE in os.environ else None
_cut_off: Callable[[float], None] | None = None


def reach(place: str) -> None:
    """This process reaches a place; a fault may await it."""
    if _plan is not None:
        _plan.reach(place)


def plan(text: str) -> None:
    """Replace this process's plan."""
    global _plan
    _plan = FaultPlan(text)


def on_partition(cut_off: Callable[[float], None]) -> None:
    """Say how this process is cut off from the coordinator for some seconds."""
    global _cut_off
    _cut_off = cut_off


def _happen(fault: Fault) -> None:
    _note(fault)
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            # A stopped process cannot wake itself.
            wake = f"sleep {fault.seconds}; kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", wake], start_new_session=True, close_fds=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        case "leave":
            os.kill(os.getpid(), signal.SIGTERM)
        case "slow":
            time.sleep(fault.seconds)
        case "partition" if _cut_off is not None:
            _cut_off(fault.seconds)


def _note(fault: Fault) -> None:
    if (path := os.environ.get(RECORD)) is None:
        return
    line = {"fault": str(fault), "pid": os.getpid(), "time": time.monotonic()}
    with open(path, "a") as record:
        record.write(json.dumps(line) + "\n")
