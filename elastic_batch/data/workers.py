"""Batches from data workers: torch's DataLoader over tasks, with processes that outlive a change of plan."""

from __future__ import annotations

import multiprocessing
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from elastic_batch.data.fetch import Fetcher
from elastic_batch.data.finish import Finisher
from elastic_batch.data.local import next_request
from elastic_batch.data.process import WorkerInit
from elastic_batch.data.source import PassRequest
from elastic_batch.data.tasks import Delivery, Plan, TaskReader
from elastic_batch.errors import DataError

_POLL_SECONDS = 0.2  # how soon a dead worker is noticed
_GRACE_SECONDS = 2.0  # for workers to finish their sample when the source is closed


def iterate(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over a DataLoader such that a worker's death is noticed at the next batch, and never before.

    Torch handles the signal that a child has ended, for all DataLoaders of a process. It raises in the middle of
    anything, of a commit say, if a worker that it was told of has died.
    """
    iterator = iter(loader)
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False  # or it would remove them at its end
    return iterator


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """How data workers are run.

    Args:
        num_workers: Processes, at least 1.
        prefetch_factor: Passes that each process has under way or ready, at least 1.
        start_method: `fork`, `spawn` or `forkserver`; None: the platform's default.
        worker_init_fn: Called in each process with its number, before it reads.
    """

    num_workers: int
    prefetch_factor: int = 2
    start_method: str | None = None
    worker_init_fn: Callable[[int], None] | None = None


class WorkerSource:
    """A `BatchSource` whose batches are made by data workers, a bounded number ahead.

    The workers start with the first `start`. A new plan reaches them at once: they drop what is out of date.

    Args:
        fetcher: Makes the batches, in the workers.
        finisher: Brings them onto the device, here.
        settings: How the workers are run.
    """

    def __init__(self, fetcher: Fetcher, finisher: Finisher, settings: WorkerSettings) -> None:
        self._fetcher = fetcher
        self._finisher = finisher
        self._settings = settings
        self._context = multiprocessing.get_context(settings.start_method)
        self._plan = Plan(self._context)
        self._pool: _Pool | None = None

    def start(self, requests: Iterator[PassRequest]) -> None:
        self._plan.replace(requests)
        self._plan.look_ahead(self._settings.num_workers * self._settings.prefetch_factor)
        if self._pool is not None and not self._pool.is_whole:
            self._discard()
        if self._pool is None:
            reader = TaskReader(self._fetcher, self._plan.number)
            pinned = self._finisher.device.type == "cuda"
            self._pool = _Pool(reader, self._plan, self._settings, self._context.get_start_method(), pinned)

    def next(self) -> Any:
        if self._pool is None:
            return next_request(None)
        while True:
            self._plan.look_ahead(1)
            if self._plan.unserved is None:
                return next_request(iter(()))
            delivery = self._receive(self._pool)
            if self._plan.is_current(delivery.task):
                break
        request = self._plan.issued.popleft()
        if isinstance(delivery.opened, DataError):
            delivery.opened.add_note(delivery.opened.traceback_text)
            raise delivery.opened
        return self._finisher.finish(request, delivery.opened)

    def close(self) -> None:
        self._plan.replace(iter(()))
        self._discard()

    def _receive(self, pool: _Pool) -> Delivery:
        try:
            return pool.receive()
        except Exception as error:  # of the DataLoader, of a worker's start, or of unpickling what a dead one left
            last_line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            reason, traceback_text = f"{pool.obituary()} ({last_line})", "".join(traceback.format_exception(error))
        except BaseException:
            self._discard()  # interrupted in the middle of the DataLoader's bookkeeping
            raise
        self._discard()
        request = self._plan.unserved
        assert request is not None
        stop = request.start + request.num_micro_batches * self._fetcher.micro_batch_size
        indices = self._fetcher.stream.indices(request.start, stop).tolist()
        raise DataError(request.start, indices, reason, traceback_text)

    def _discard(self) -> None:
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.stop()


class _Pool:
    """The processes, and the endless iteration of the DataLoader that feeds them."""

    def __init__(
        self, reader: TaskReader, plan: Plan, settings: WorkerSettings, start_method: str, pinned: bool
    ) -> None:
        loader: DataLoader[Delivery] = DataLoader(
            reader,
            batch_size=None,
            sampler=plan,  # any iterable will do; its items are what the data set takes
            num_workers=settings.num_workers,
            prefetch_factor=settings.prefetch_factor,
            collate_fn=_as_it_is,
            pin_memory=pinned,
            timeout=_POLL_SECONDS,
            worker_init_fn=WorkerInit.here(start_method, settings.worker_init_fn),
            multiprocessing_context=start_method,
            generator=torch.Generator(),  # or it would draw from the global one
            persistent_workers=True,
        )
        others = set(multiprocessing.active_children())
        self._iterator: Iterator[Delivery] | None = iterate(loader)
        self._processes = [child for child in multiprocessing.active_children() if child not in others]
        # Runs when the interpreter exits, before multiprocessing waits for children that ignore its signal.
        self._at_exit = Finalize(self, _kill, args=(self._processes,), exitpriority=100)

    @property
    def is_whole(self) -> bool:
        """Whether every worker lives."""
        return not self._dead()

    def receive(self) -> Delivery:
        """Wait for the next delivery, however long its samples take."""
        assert self._iterator is not None
        while True:
            try:
                return next(self._iterator).open()
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out") or not self.is_whole:
                    raise

    def obituary(self) -> str:
        """Why nothing more can be received."""
        dead = self._dead(_POLL_SECONDS)
        if not dead:
            return "a data worker failed"
        causes = ", ".join(f"pid {process.pid}, exit code {process.exitcode}" for process in dead)
        return (
            f"a data worker died ({causes}): memory may have run out (lower num_workers or prefetch_factor), or the "
            "data set crashed the process (try num_workers=0)"
        )

    def stop(self) -> None:
        """Let the workers finish the sample they are at, then end those that take too long."""
        # The DataLoader stops its workers when the iteration is collected. It waits for them in turn, and for a lock
        # that a killed worker may have held: so it does that aside.
        stopping = threading.Thread(target=self._drop_iteration, daemon=True)
        stopping.start()
        stopping.join(_GRACE_SECONDS)
        self._at_exit()
        stopping.join(_GRACE_SECONDS)

    def _dead(self, seconds: float = 0.0) -> list[BaseProcess]:
        """Workers that have ended, or do so within the time if none has."""
        gone = wait([process.sentinel for process in self._processes], seconds)
        dead = [process for process in self._processes if process.sentinel in gone]
        for process in dead:
            process.join(_GRACE_SECONDS)  # its files close a moment before it has an exit code
        return dead

    def _drop_iteration(self) -> None:
        self._iterator = None


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(_GRACE_SECONDS)


def _as_it_is(delivery: Any) -> Any:
    return delivery
