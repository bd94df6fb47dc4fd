"""A run directory: what a run leaves on the disk for its resumption, its report and its readers.

`run.json` marks it, `job.yaml` is the job as resolved, `metrics.jsonl` and `ledger.jsonl` grow, `checkpoints/` holds
the state, `summary.json` tells the outcome.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from elastic_batch.durable import make_directory, write_file
from elastic_batch.errors import RunDirectoryMissing, RunDirectoryUsed
from elastic_batch.job import format_yaml, parse_yaml
from elastic_batch.rundir.ledger import Commit, Ledger, LedgerReader
from elastic_batch.rundir.lines import LineWriter, read_line_at, read_lines
from elastic_batch.strict_json import to_json

logger = logging.getLogger(__name__)

VERSION = 1
_MARKER, _JOB, _METRICS, _LEDGER, _SUMMARY = "run.json", "job.yaml", "metrics.jsonl", "ledger.jsonl", "summary.json"
_CHECKPOINTS = "checkpoints"
_END_BYTES = 128 << 10
"""What is read of a ledger to see what it lacks: more than a thousand lines, and a few milliseconds."""


class RunDirectory:
    """A run directory open for writing, by one worker; made by `create` or `resume`.

    Attributes:
        path: The directory.
        run_id: The run's name for ever; the same after each resume.
    """

    def __init__(self, path: Path, run_id: str, clock: Callable[[], float]) -> None:
        self.path, self.run_id = path, run_id
        self._metrics = LineWriter(path / _METRICS, clock=clock)
        self._ledger = LineWriter(path / _LEDGER, clock=clock)
        self._ledger_reader = LedgerReader(path / _LEDGER)
        self._reading = threading.Lock()

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], job: Mapping[str, Any], *, clock: Callable[[], float] = time.monotonic
    ) -> RunDirectory:
        """Begin a run in a directory that holds none; other files in it stay.

        Args:
            path: The directory; made if it is not there.
            job: The job as resolved, plain values; written to `job.yaml`.
            clock: Monotonic seconds.

        Raises:
            RunDirectoryUsed: There is a run in it.
            OSError: It cannot be written to.
        """
        directory = Path(path)
        if is_used(directory):
            raise RunDirectoryUsed(str(directory))
        make_directory(directory)
        _write_job(directory, job)
        return cls(directory, _mark(directory), clock)

    @classmethod
    def resume(
        cls, path: str | os.PathLike[str], job: Mapping[str, Any], *, clock: Callable[[], float] = time.monotonic
    ) -> RunDirectory:
        """Go on with the run in a directory; logs are appended to, `job.yaml` is replaced (workers, say, may change).

        Raises:
            RunDirectoryMissing: There is no run in it.
            OSError: It cannot be written to.
        """
        directory = Path(path)
        if not is_used(directory):
            raise RunDirectoryMissing(str(directory))
        try:
            run_id = read_run_id(directory)
        except RunDirectoryMissing:
            run_id = _mark(directory)
        _write_job(directory, job)
        return cls(directory, run_id, clock)

    @property
    def checkpoints(self) -> Path:
        """The default place of the run's checkpoints."""
        return self.path / _CHECKPOINTS

    def record(self, record: Mapping[str, Any]) -> None:
        """Append a line to the metrics log: an update or an evaluation, told by its `kind`."""
        self._metrics.append(record)

    def commit(self, commit: Commit) -> None:
        """Append a line to the ledger."""
        self._ledger.append(asdict(commit))

    def complete(self, commits: Iterable[Commit]) -> None:
        """Append those of the newest commits that the ledger does not have: a writer that was killed may owe some."""
        self._ledger.flush()
        end = LedgerReader(self.path / _LEDGER, last_bytes=_END_BYTES).read()
        known_from = end.ranges[0][0] if end.ranges else 0
        for each in commits:
            if each.start >= known_from and end.lost(each.stop) > end.lost(each.start):
                end.add(each.update, each.start, each.stop)
                self.commit(each)

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Replace the summary, all or nothing; a full disk is logged and ends nothing."""
        try:
            write_file(self.path / _SUMMARY, (to_json(summary, indent=2) + "\n").encode())
        except OSError as error:
            logger.error("cannot write the summary to %s: %s. Make room on the disk", self.path, error)

    def lost_samples(self, position: int) -> int:
        """Samples before `position` that the ledger on the disk does not have; 0 in a sound run.

        Safe to call from another thread, such as one that serves metrics.
        """
        self._ledger.flush()
        with self._reading:
            return self._ledger_reader.read().lost(position)

    def flush(self) -> None:
        """Hand all lines to the kernel: they survive the end of this process."""
        self._metrics.flush()
        self._ledger.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk; to be called before a checkpoint that they must cover is saved."""
        self._metrics.sync()
        self._ledger.sync()

    def close(self) -> None:
        """Write what waits and close the logs."""
        self._metrics.close()
        self._ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def is_used(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a run, or what is left of one."""
    directory = Path(path)
    traces = [directory / name for name in (_MARKER, _METRICS, _LEDGER, _SUMMARY)]
    return any(trace.exists() for trace in traces) or any((directory / _CHECKPOINTS).glob("*.json"))


def read_run_id(path: str | os.PathLike[str]) -> str:
    """The name of the run in a directory; a worker that joins compares it with what it was told.

    Raises:
        RunDirectoryMissing: There is no run in it, or this machine does not see it.
    """
    try:
        return str(json.loads((Path(path) / _MARKER).read_bytes())["run_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryMissing(os.fspath(path)) from error


def read_job(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The job of the run in a directory; empty if none was written.

    Raises:
        InvalidSetting: Somebody has written something else there.
    """
    file = Path(path) / _JOB
    try:
        job = parse_yaml(file.read_text(encoding="utf-8"), "job file", str(file))
    except FileNotFoundError:
        return {}
    return job if isinstance(job, dict) else {}


def read_summary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The outcome of the run in a directory; empty before it ended once."""
    try:
        summary = json.loads((Path(path) / _SUMMARY).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def read_metrics(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The updates' records of the run in a directory, by ascending update; only offsets are held in memory.

    After a resume from an earlier position updates are done again: of several lines of one update the last one counts.
    """
    log = Path(path) / _METRICS
    offsets: dict[int, int] = {}
    for offset, record in read_lines(log):
        update = record.get("update")
        if record.get("kind") == "update" and isinstance(update, int):
            offsets[update] = offset
    if offsets:
        yield from read_line_at(log, (offsets[update] for update in sorted(offsets)))


def read_evaluations(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The evaluations' records of the run in a directory, by ascending update.

    Several evaluations at one place, of the model and then of its average, say, are one record with the metrics of all;
    of several values of one metric the last one counts.
    """
    found: dict[int, dict[str, Any]] = {}
    for _, record in read_lines(Path(path) / _METRICS):
        update = record.get("update")
        if record.get("kind") == "evaluation" and isinstance(update, int):
            before = found.get(update)
            if before is not None and before.get("position") == record.get("position"):
                record = {**record, "metrics": {**before["metrics"], **record["metrics"]}}
            found[update] = record
    for update in sorted(found):
        yield found[update]


def has_updates(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a run that has done an update."""
    log = Path(path) / _METRICS
    return log.is_file() and any(record.get("kind") == "update" for _, record in read_lines(log))


def open_run_ledger(path: str | os.PathLike[str]) -> LedgerReader:
    """The ledger of the run in a directory, which may still grow, or is not there yet."""
    return LedgerReader(Path(path) / _LEDGER)


def read_run_ledger(path: str | os.PathLike[str]) -> Ledger:
    """The committed ranges of the run in a directory."""
    return open_run_ledger(path).read()


def _write_job(directory: Path, job: Mapping[str, Any]) -> None:
    text = format_yaml(dict(job)).encode()
    path = directory / _JOB
    if not path.exists() or path.read_bytes() != text:  # a disk may take long, and other workers wait for a new lead
        write_file(path, text)


def _mark(directory: Path) -> str:
    run_id = secrets.token_hex(8)
    marker = {"version": VERSION, "run_id": run_id, "created_seconds": time.time()}
    write_file(directory / _MARKER, (to_json(marker, indent=2) + "\n").encode())
    return run_id
