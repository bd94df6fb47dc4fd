"""Logs of one JSON object a line: appended without stopping for the disk, read though the writer was killed."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from elastic_batch.strict_json import to_json

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 65536


class LineWriter:
    """Appends objects to a file, one a line, at most once a second; a last line cut off by a kill is mended first.

    A disk that is full or fails never ends the caller: lines wait in memory, an error is logged once a minute, and
    writing goes on where it stopped. Beyond `max_waiting_bytes` new lines are dropped, and the log says how many.
    Safe to use from several threads.

    Args:
        path: The file; made if it is not there.
        flush_seconds: How long a line may wait for the ones after it.
        max_waiting_bytes: What may wait for a disk that does not take it.
        clock: Monotonic seconds.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        flush_seconds: float = 1.0,
        max_waiting_bytes: int = 64 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._clock = path, clock
        self._flush_seconds, self._max_waiting_bytes = flush_seconds, max_waiting_bytes
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._waiting = bytearray(_mend_end(self._descriptor))
        self._num_dropped = 0
        self._is_gone = False
        self._flushed_at = self._complained_at = -float("inf")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line; numbers that are not finite become null."""
        line = (to_json(record) + "\n").encode()
        with self._lock:
            if len(self._waiting) + len(line) > self._max_waiting_bytes:
                self._num_dropped += 1
            else:
                self._waiting += line
            if self._clock() - self._flushed_at >= self._flush_seconds:
                self._write()

    def flush(self) -> None:
        """Hand all lines to the kernel: from then on they survive the end of this process."""
        with self._lock:
            self._write()

    def sync(self) -> None:
        """Wait until all lines are on the disk: from then on they survive the end of the machine."""
        self.flush()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._complain(error)
        self._look_for_file()

    def close(self) -> None:
        """Write what waits and close the file."""
        with self._lock:
            self._write()
            os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self) -> None:
        self._flushed_at = self._clock()
        try:
            while self._waiting:
                # What a full disk did take is not written again: no line is ever torn or doubled.
                del self._waiting[: os.write(self._descriptor, self._waiting)]
        except OSError as error:
            self._complain(error)

    def _look_for_file(self) -> None:
        """Say so once if somebody has removed the file, or moved it away: lines still go there."""
        if self._is_gone:
            return
        try:
            self._is_gone = not os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            self._is_gone = True
        except OSError:  # a disk that fails is not a file that is gone
            return
        if self._is_gone:
            logger.error("%s was removed or moved while it was written to; its lines are not there", self._path)

    def _complain(self, error: OSError) -> None:
        if self._clock() - self._complained_at < 60:
            return
        self._complained_at = self._clock()
        logger.error(
            "cannot write to %s (%s); training goes on, %d bytes wait and %d lines were dropped. Make room on the disk",
            self._path,
            error,
            len(self._waiting),
            self._num_dropped,
        )


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a log with the byte offset of each, in order.

    Lines that are not whole objects are passed over: the last one of a writer that was killed or still writes, and
    what a machine's crash left of a block. A file that is not there has no lines.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        offset = 0
        for line in file:
            record = parse_line(line)
            if record is not None:
                yield offset, record
            offset += len(line)


def read_line_at(path: Path, offsets: Iterator[int]) -> Iterator[dict[str, Any]]:
    """The objects at given offsets, as `read_lines` told them."""
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            record = parse_line(file.readline())
            if record is not None:
                yield record


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object in a line; None if it is not a whole one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _mend_end(descriptor: int) -> bytes:
    """Cut off a last line that is not whole; gives the newline that a whole one may lack."""
    length = os.fstat(descriptor).st_size
    start, tail = length, b""
    while start > 0 and b"\n" not in tail:
        size = min(_CHUNK_BYTES, start)
        start -= size
        tail = os.pread(descriptor, size, start) + tail
    tail = tail.rpartition(b"\n")[2]
    if not tail:
        return b""
    if parse_line(tail) is not None:
        return b"\n"
    os.ftruncate(descriptor, length - len(tail))
    return b""
