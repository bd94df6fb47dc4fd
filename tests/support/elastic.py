"""An elastic job of real processes: a coordinator, workers forked from one warm process, and what they leave behind."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from support.elastic_jobs import MICRO_BATCH, SEED, ElasticJob, elastic_jobs
from support.reference import state_of
from support.worlds import warm_context

from elastic_batch import Trainer, failpoints
from elastic_batch.engines import FixedWorld, Membership, SoloEngine

FAULTS, HURRY = "faults.jsonl", "hurry"
"""Files of the run's directory: the faults that happened; that user code takes no time any more."""


@dataclass(frozen=True)
class Course:
    """How a worker trains.

    Args:
        job: Name of an elastic job.
        pace: Seconds that user code sleeps after each update.
        options: Of the trainer.
        end: Another length of the job, in samples.
        phases: Other phases of the job.
        evaluates_every: Updates between evaluations in the user's loop; 0: none.
        seed: Of the trainer.
    """

    job: str = "digits"
    pace: float = 0.01
    options: dict[str, Any] = field(default_factory=lambda: {"num_workers": 2})
    end: int | None = None
    phases: str | None = None
    evaluates_every: int = 0
    seed: int = SEED

    @property
    def elastic_job(self) -> ElasticJob:
        """What is trained."""
        job = elastic_jobs()[self.job]
        return replace(job, end=self.end or job.end, phases=self.phases or job.phases)


def train_alone(course: Course) -> dict[str, Any]:
    """The state at the end of an undisturbed run of one worker."""
    job = course.elastic_job
    model, optimizer, dataset = job.make()
    with Trainer(
        model,
        optimizer,
        dataset,
        job.schedule,
        loss_fn=job.loss_fn,
        membership=FixedWorld(SoloEngine()),
        micro_batch_size=MICRO_BATCH,
        seed=course.seed,
    ) as trainer:
        for _ in trainer:
            pass
    return state_of(model, optimizer)


def train_as_worker(course: Course, run_dir: str, slot: str, membership: Membership | None = None) -> None:
    """Train to the end, leaving a witness's line for each commit and the state at the end."""
    job = course.elastic_job
    model, optimizer, dataset = job.make()
    hurry = Path(run_dir) / HURRY
    witness = Path(run_dir) / "witness" / f"{slot}-{os.getpid()}.jsonl"
    # The check of the loss would yield the first batch three times more, and the witness take it for trained.
    own = {"micro_batch_size": MICRO_BATCH, "seed": course.seed, "resume": "auto", "check_loss": False}
    options = {**own, **course.options}
    with (
        Trainer(model, optimizer, dataset, job.schedule, run_dir=run_dir, membership=membership, **options) as trainer,
        witness.open("a", buffering=1) as lines,
    ):
        for update in trainer.updates():
            generation = trainer.generation
            digests = []
            for batch in update:
                digests.append(zlib.crc32(job.numbers(batch).numpy().tobytes()))
                loss = job.loss_fn(model, batch)
                if isinstance(loss, tuple):
                    update.backward(loss[0], weight=loss[1])
                else:
                    update.backward(loss)
            if update.step():
                line = {
                    "update": update.index,
                    "generation": generation,
                    "start": update.plan.start,
                    "stop": update.plan.stop,
                    "digests": digests,
                    "time": time.monotonic(),
                }
                lines.write(json.dumps(line) + "\n")
                if course.evaluates_every and trainer.num_updates % course.evaluates_every == 0:
                    trainer.evaluate(dataset, job.count, batch_size=64)
                if not hurry.exists():
                    time.sleep(course.pace)
        torch.save(state_of(model, optimizer), Path(run_dir) / "ends" / f"{slot}-{os.getpid()}.pt")


def _await_plans(plans: Connection) -> None:
    with contextlib.suppress(EOFError):
        while True:
            failpoints.plan(plans.recv())


def _worker_main(
    course: Course, run_dir: str, slot: str, plans: Connection, faults: str, prepare: Callable[[], None] | None
) -> None:
    log = os.open(f"{run_dir}/logs/{slot}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was started by hand

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    os.environ.update(ELASTIC_BATCH_RUN_DIR=run_dir, ELASTIC_BATCH_SLOT=slot)
    os.environ[failpoints.RECORD] = f"{run_dir}/{FAULTS}"
    if prepare is not None:
        prepare()
    failpoints.plan(faults)
    threading.Thread(target=_await_plans, args=(plans,), daemon=True).start()
    code = 0
    try:
        train_as_worker(course, run_dir, slot)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


class Cluster:
    """A coordinator and its workers; all are gone at the end.

    Args:
        run_dir: The run's directory, made here.
        course: How workers train.
        min_workers: As the coordinator's.
        max_workers: As the coordinator's.
        options: Further words of the coordinator's command line.
    """

    def __init__(
        self,
        run_dir: Path,
        course: Course,
        *,
        min_workers: int = 1,
        max_workers: int = 4,
        options: tuple[str, ...] = (),
    ) -> None:
        self.run_dir = run_dir
        self.course = course
        self.workers: dict[str, BaseProcess] = {}
        self._plans: dict[str, Connection] = {}
        self.others: list[subprocess.Popen[bytes]] = []
        self.coordinator: subprocess.Popen[bytes] | None = None
        self._words = ("--min-workers", str(min_workers), "--max-workers", str(max_workers), *options)
        for name in ("witness", "ends", "logs"):
            (run_dir / name).mkdir(parents=True, exist_ok=True)

    def start_coordinator(self, faults: str = "") -> None:
        """Start it, or start it again when it has ended, and wait until it answers."""
        if self.coordinator is not None:
            self.coordinator.wait(10)
        with (self.run_dir / "logs" / "coordinator.log").open("ab") as log:
            self.coordinator = subprocess.Popen(
                (sys.executable, "-m", "elastic_batch", "coordinator", "--run-dir", str(self.run_dir), *self._words),
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    failpoints.VARIABLE: faults,
                    failpoints.RECORD: str(self.run_dir / FAULTS),
                },
                start_new_session=True,
            )
        self.wait_until(lambda: self.status() is not None, 20, "the coordinator answers")

    def start_worker(self, slot: str, faults: str = "", prepare: Callable[[], None] | None = None) -> BaseProcess:
        """Start a warm worker; `prepare`, importable, is called in it first."""
        theirs, self._plans[slot] = warm_context().Pipe(duplex=False)
        process = warm_context().Process(
            target=_worker_main, args=(self.course, str(self.run_dir), slot, theirs, faults, prepare), daemon=False
        )
        process.start()
        theirs.close()
        self.workers[slot] = process
        return process

    def arm(self, slot: str, faults: str) -> None:
        """Give a living worker another plan of faults; its counts start anew."""
        with contextlib.suppress(OSError):
            self._plans[slot].send(faults)

    def hurry(self) -> None:
        """From now on user code takes no time."""
        (self.run_dir / HURRY).touch()

    def happened(self) -> list[dict[str, Any]]:
        """The faults that failpoints have made, by time."""
        path = self.run_dir / FAULTS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def kill(self, slot: str, number: int = signal.SIGKILL) -> None:
        """Send a worker a signal."""
        pid = self.workers[slot].pid
        assert pid is not None
        os.kill(pid, number)

    def kill_coordinator(self) -> None:
        """End it without a word."""
        assert self.coordinator is not None
        self.coordinator.kill()
        self.coordinator.wait()

    def status(self) -> dict[str, Any] | None:
        """What the coordinator says; None if it does not answer."""
        try:
            door = json.loads((self.run_dir / "coordinator.json").read_bytes())
            request = urllib.request.Request(
                f"{door['url']}/status", headers={"Authorization": f"Bearer {door['token']}"}
            )
            with urllib.request.urlopen(request, timeout=2) as reply:
                found: dict[str, Any] = json.loads(reply.read())
                return found
        except (OSError, ValueError, KeyError):
            return None

    def witnessed(self) -> list[dict[str, Any]]:
        """Every line of every witness, by time."""
        lines = [
            {**json.loads(text), "worker": path.stem}
            for path in (self.run_dir / "witness").glob("*.jsonl")
            for text in path.read_text().splitlines(keepends=True)
            if text.endswith("\n")  # a worker may have been killed in the middle of the last
        ]
        return sorted(lines, key=lambda line: line["time"])

    def last_update(self) -> int:
        """The newest update that anybody committed; -1 before the first."""
        return max((line["update"] for line in self.witnessed()), default=-1)

    def wait_for_update(self, update: int, timeout: float = 60) -> None:
        self.wait_until(lambda: self.last_update() >= update, timeout, f"update {update} commits")

    def wait_until(self, holds: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not holds():
            if time.monotonic() > deadline:
                self._dump_stacks()
                raise AssertionError(f"not within {timeout} s: {what}\n{self.logs()}")
            time.sleep(0.01)

    def _dump_stacks(self) -> None:
        """Let each worker write to its log where it is."""
        for slot in [slot for slot, process in self.workers.items() if _lives(process)]:
            self.kill(slot, signal.SIGUSR2)
        time.sleep(0.5)

    def end_states(self) -> list[dict[str, Any]]:
        """The state that each finished worker ended with."""
        return [torch.load(path) for path in sorted((self.run_dir / "ends").glob("*.pt"))]

    def wait_until_finished(self, timeout: float = 90) -> None:
        """Wait until a worker has trained to the end and all have gone."""
        self.wait_until(
            lambda: bool(list((self.run_dir / "ends").glob("*.pt"))) and not any(map(_lives, self.workers.values())),
            timeout,
            "the job finishes",
        )

    def logs(self, lines: int = 30) -> str:
        """The end of every log."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
            for path in sorted((self.run_dir / "logs").iterdir())
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for process in self.workers.values():
            if _lives(process):
                process.kill()
            process.join()
        for other in (*self.others, self.coordinator):
            if other is not None:
                other.kill()
                other.wait()


def _lives(process: BaseProcess) -> bool:
    return process.is_alive()
