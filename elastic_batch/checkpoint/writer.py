"""Writes checkpoints in the background, so that training waits for a copy in memory and never for the disk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from elastic_batch.checkpoint.manifest import CheckpointInfo, Manifest
from elastic_batch.checkpoint.state import HostMemory, Snapshot, check_state
from elastic_batch.checkpoint.store import CheckpointStore
from elastic_batch.errors import ElasticBatchError, MisusedTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WriterEvents:
    """Who is told what happens; called on the writer's thread, `superseded` on the submitting one.

    Args:
        before_save: Called before each save, say to bring a ledger to the disk that must cover the checkpoint.
        saved: Gets the manifest and the seconds that saving took.
        failed: Gets the error and what was to be saved. Training goes on; the error is logged in any case.
        superseded: Gets what will not be written, since a newer state was submitted before its turn came.
    """

    before_save: Callable[[], None] = lambda: None
    saved: Callable[[Manifest, float], None] = lambda manifest, seconds: None
    failed: Callable[[Exception, CheckpointInfo], None] = lambda error, info: None
    superseded: Callable[[CheckpointInfo], None] = lambda info: None


@dataclass(frozen=True, eq=False)
class _Job:
    state: dict[str, Any]
    info: CheckpointInfo
    future: Future[Manifest]
    snapshot: Snapshot | None

    def release(self) -> None:
        if self.snapshot is not None:
            self.snapshot.release()


class CheckpointWriter:
    """One background thread that saves states to a store, started by the first submission.

    At most one state is being written and at most one waits. A newer one takes the place of the one that waits: the
    newest state is worth most, and training never stops for a slow disk. So at most two copies of the state exist.
    Call it from one thread. The thread does not keep the process alive: `close` (or leave the `with` block) at the end.

    Args:
        store: Where to.
        events: Who is told what happens.
    """

    def __init__(self, store: CheckpointStore, events: WriterEvents | None = None) -> None:
        self.store = store
        self._events = events or WriterEvents()
        self._memory = HostMemory()
        self._changed = threading.Condition()
        self._waiting: _Job | None = None
        self._writing: _Job | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def copy_and_submit(self, state: dict[str, Any], info: CheckpointInfo) -> Future[Manifest]:
        """Copy a live state to host memory that is used again and again, and have the copy saved.

        Returns when the copy is complete; training may go on.

        Raises:
            UnsavableState: Something in the state could not be read back without running code.
        """
        with self._changed:
            if self._waiting is not None:
                # Its memory is what the new copy goes to; so it goes, unless the new state cannot be saved anyway.
                check_state(state)
                self._drop_waiting()
            snapshot = Snapshot(state, self._memory)
        return self._enqueue(_Job(snapshot.state, info, Future(), snapshot))

    def submit(self, state: dict[str, Any], info: CheckpointInfo) -> Future[Manifest]:
        """Have a state saved that nobody changes any more (see `snapshot`).

        Returns a future: the manifest, the error, or cancelled if a newer state took its place.
        """
        return self._enqueue(_Job(state, info, Future(), None))

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until everything submitted is saved or has failed; False if the time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is self._writing is None, timeout_seconds)

    def close(self) -> None:
        """Finish what was submitted and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _enqueue(self, job: _Job) -> Future[Manifest]:
        with self._changed:
            if self._closed:
                raise MisusedTrainer("this checkpoint writer is closed; submit before close()")
            self._drop_waiting()
            self._waiting = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return job.future

    def _drop_waiting(self) -> None:
        job, self._waiting = self._waiting, None
        if job is None:
            return
        job.release()
        job.future.cancel()
        logger.warning(
            "the checkpoint of update %d was not written: the one before it is still on its way to %s. "
            "Save less often, or to a faster place",
            job.info.update,
            self.store.location,
        )
        _tell(self._events.superseded, job.info)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                job, self._waiting = self._waiting, None
                if job is None:
                    return
                self._writing = job
            if job.future.set_running_or_notify_cancel():
                self._save(job)
            with self._changed:
                job.release()
                self._writing = None
                self._changed.notify_all()

    def _save(self, job: _Job) -> None:
        """Save; whatever goes wrong is logged, told and kept in the future, and training goes on."""
        started = time.monotonic()
        try:
            self._events.before_save()
            manifest = self.store.save(job.state, job.info)
        except Exception as error:
            logger.error(
                "the checkpoint of update %d could not be written to %s; training goes on without it: %s",
                job.info.update,
                self.store.location,
                error,
                exc_info=not isinstance(error, ElasticBatchError | OSError),
            )
            _tell(self._events.failed, error, job.info)
            job.future.set_exception(error)
        else:
            seconds = time.monotonic() - started
            _tell(self._events.saved, manifest, seconds)
            job.future.set_result(manifest)


def _tell(listener: Callable[..., None], *what: object) -> None:
    """Call a listener; its error is its own and must not end the writer."""
    try:
        listener(*what)
    except Exception:
        logger.exception("a listener of the checkpoint writer failed")
