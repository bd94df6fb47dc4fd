"""Files that survive a crash: written beside their place, synced, renamed, their directory synced.

Every effect on the disk is one call of `os`, so that a test can end the process between any two of them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_CANNOT_SYNC_DIRECTORIES = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}


class PendingFile:
    """A file being written, which has no name that a reader would look for before `publish` gives it one.

    While it is open it holds an advisory lock, by which `is_being_written` tells a write that goes on from one that was
    interrupted. Leaving the `with` block closes the file, and removes it if it was not published.

    Args:
        path: Where to write until then; must not exist, and must be on the file system of the final place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self.error: OSError | None = None
        self._digest = hashlib.sha256()
        self._published = False
        self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # some file systems know no locks
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def digest(self) -> str:
        """The SHA-256 of all bytes so far, hexadecimal."""
        return self._digest.hexdigest()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append all of `data`; the first error is kept in `error`, since callers in C may hide it."""
        view = memoryview(data).cast("B")
        written = 0
        try:
            while written < len(view):
                written += os.write(self._descriptor, view[written:])
        except OSError as error:
            self.error = self.error or error
            raise
        self._digest.update(view)
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing to do: each write goes to the kernel at once. torch.save asks for it."""

    def sync(self) -> None:
        """Wait until the bytes are on the disk."""
        os.fsync(self._descriptor)

    def publish(self, path: Path) -> None:
        """Give the file its name, durably; the caller has called `sync`."""
        os.replace(self.path, path)
        self._published = True
        sync_directory(path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        if not self._published:
            remove_if_there(self.path)


def write_file(path: Path, data: bytes, *, before_rename: Callable[[], None] | None = None) -> None:
    """Replace a small file by `data`, all or nothing.

    Args:
        path: The file.
        data: Its new content.
        before_rename: Called when the bytes are on the disk but not yet under the name; raising keeps the old content.

    Raises:
        OSError: The disk is full or cannot be written; the old content is still there.
    """
    with PendingFile(temporary_beside(path)) as pending:
        pending.write(data)
        pending.sync()
        if before_rename is not None:
            before_rename()
        pending.publish(path)


def temporary_beside(path: Path) -> Path:
    """A fresh hidden name in the directory of `path`; it starts with `.` and ends with `.tmp`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def is_being_written(path: Path) -> bool | None:
    """Whether a living process on a host that shares locks with this one has `path` open as a `PendingFile`.

    None: that cannot be known, for want of locks or for a fault of the file system.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        # An exclusive lock would need a descriptor for writing on NFS.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def remove_if_there(path: Path) -> None:
    """Remove a file; that it is gone already is no error."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def make_directory(path: Path) -> None:
    """Make a directory and its parents, durably; that it is there already is no error."""
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk.

    Some network file systems cannot, and do so anyway; and who may write to a directory may still not read it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC_DIRECTORIES:
            raise
