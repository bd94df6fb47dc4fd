"""One process at a time has a run directory: two that train in it would write over each other."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from elastic_batch.durable import make_directory
from elastic_batch.errors import RunDirectoryBusy

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 3.0
"""How long a process that ends may still have the directory."""
OTHER_HOST_PATIENCE_SECONDS = 100.0
"""The same on another host. If that host died, the server of a shared file system keeps its lock: NFSv4's for 90 s."""
_FILE = "lock"
_POLL_SECONDS = 0.05


class Hold:
    """A run directory that is this process's until `close`, or until the process ends, however it does.

    A fixed world's lead worker holds it, an elastic one's coordinator. The lock belongs to the process alone: a child
    that outlives it holds nothing, and a second holder in the same process shares it. On file systems without locks
    nobody is kept out.

    Args:
        directory: Made if it is not there.

    Raises:
        RunDirectoryBusy: Another process holds it, and did not end in time.
        OSError: The directory cannot be made or written to.
    """

    def __init__(self, directory: Path) -> None:
        make_directory(directory)
        path = directory / _FILE
        # The end of any descriptor of the file would end the process's lock: it is opened once.
        lock = _locks.get(_key(path.stat())) if path.exists() else None
        if lock is None:
            descriptor = _lock(directory, path)
            lock = _locks[_key(os.fstat(descriptor))] = _Lock(descriptor)
        lock.num_holders += 1
        self.close = weakref.finalize(self, _let_go, lock)
        self.close.atexit = False  # a forked child that ends has nothing to let go of

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(slots=True)
class _Lock:
    """A locked file of this process, and how many hold it."""

    descriptor: int
    num_holders: int = 0


_Key = tuple[int, int, int]
_locks: dict[_Key, _Lock] = {}


def _key(found: os.stat_result) -> _Key:
    """What is one lock: a forked child has none of its parent's."""
    return os.getpid(), found.st_dev, found.st_ino


def _let_go(lock: _Lock) -> None:
    lock.num_holders -= 1
    if not lock.num_holders:
        _locks.pop(_key(os.fstat(lock.descriptor)), None)
        os.close(lock.descriptor)


def _lock(directory: Path, path: Path) -> int:
    """A descriptor of the locked file."""
    here = socket.gethostname()
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        since, has_said = time.monotonic(), False
        while not _try_lock(descriptor):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace")
            patience = PATIENCE_SECONDS if holder.endswith(f" on {here}") else OTHER_HOST_PATIENCE_SECONDS
            if time.monotonic() - since > patience:
                raise RunDirectoryBusy(str(directory), holder)
            if not has_said:
                has_said = True
                logger.warning("%s is in use by %s: waiting up to %g s for its end", directory, holder, patience)
            time.sleep(_POLL_SECONDS)
    except BaseException:
        os.close(descriptor)
        raise
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {here}".encode(), 0)
    return descriptor


def _try_lock(descriptor: int) -> bool:
    """Lock without waiting; False only if another process holds the lock."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning("cannot lock the run directory (%s): see that no other process writes to it", error)
    return True
