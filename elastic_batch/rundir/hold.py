"""One process at a time has a run directory: two that train in it would write over each other."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from elastic_batch.durable import make_directory
from elastic_batch.errors import RunDirectoryBusy

PATIENCE_SECONDS = 3.0
"""How long a process that ends may still have the directory."""
_FILE = "lock"
_POLL_SECONDS = 0.05


class Hold:
    """A run directory that is this process's until `close`, or until the process ends, however it does.

    A fixed world's lead worker holds it, an elastic one's coordinator. The lock belongs to the process alone: a child
    that outlives it holds nothing. On file systems without locks nobody is kept out.

    Args:
        directory: Made if it is not there.

    Raises:
        RunDirectoryBusy: Another process holds it, and did not end within `PATIENCE_SECONDS`.
        OSError: The directory cannot be made or written to.
    """

    def __init__(self, directory: Path) -> None:
        make_directory(directory)
        self._descriptor = os.open(directory / _FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            give_up_at = time.monotonic() + PATIENCE_SECONDS
            while not _try_lock(self._descriptor):
                if time.monotonic() > give_up_at:
                    raise RunDirectoryBusy(str(directory), os.pread(self._descriptor, 200, 0).decode(errors="replace"))
                time.sleep(_POLL_SECONDS)
        except BaseException:
            os.close(self._descriptor)
            raise
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def close(self) -> None:
        """Let others have the directory."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _try_lock(descriptor: int) -> bool:
    """Lock without waiting; False only if another process holds the lock."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Anything else means that this file system knows no locks: nobody can hold one.
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
