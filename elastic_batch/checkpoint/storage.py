"""Where the files of checkpoints lie: a directory. The same few steps for an object store are in `objects`."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from elastic_batch.durable import (
    PendingFile,
    is_being_written,
    make_directory,
    remove_if_there,
    sync_directory,
    write_file,
)

# What a killed process can leave: a payload, a manifest, a fence that had not yet got its name.
_UNFINISHED = re.compile(r"\.(payload-g(\d+)-|\d{12,}-g(\d+)-[0-9a-f]{12}\.json\.|fence\.)[0-9a-f]{8}\.tmp")


class Payload(Protocol):
    """A payload on its way: a file to write to, which `publish` puts in its place."""

    path: Path
    num_bytes: int
    error: OSError | None

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes so far, hexadecimal."""

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append bytes."""

    def flush(self) -> None:
        """Hand the bytes to the kernel."""

    def sync(self) -> None:
        """Wait until they last."""


class Storage(Protocol):
    """A flat set of files; all that a checkpoint store needs to do with them."""

    location: str

    def names(self) -> list[str]:
        """The names of all files there; empty where nothing was ever written."""

    def read(self, name: str) -> bytes:
        """The content of a small file; FileNotFoundError if there is none."""

    def write(self, name: str, data: bytes, *, before_rename: Callable[[], None] | None = None) -> None:
        """Replace a small file, all or nothing; `before_rename` may refuse at the last moment by raising."""

    def payload(self, generation: int) -> AbstractContextManager[Payload]:
        """A fresh payload; while the `with` block runs, no other process takes it for a leftover."""

    def publish(self, payload: Payload, name: str) -> None:
        """Put a synced payload in its place."""

    def fetch(self, name: str) -> AbstractContextManager[Path]:
        """The file as a local one, for as long as the `with` block runs; FileNotFoundError if there is none."""

    def delete(self, names: list[str]) -> None:
        """Remove files; when this returns, their absence lasts."""

    def temporary_generation(self, name: str) -> int | None:
        """Which generation left this unfinished file; None if it is not one."""

    def is_being_written(self, name: str) -> bool | None:
        """Whether a living process still writes this file; None where that cannot be known."""


class DirectoryStorage:
    """Files in a directory, made when first written to."""

    def __init__(self, directory: Path) -> None:
        self.location = str(directory)
        self._directory = directory

    def names(self) -> list[str]:
        """The names of all files there."""
        try:
            return sorted(path.name for path in self._directory.iterdir())
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        return (self._directory / name).read_bytes()

    def write(self, name: str, data: bytes, *, before_rename: Callable[[], None] | None = None) -> None:
        """Replace a small file: written beside, synced, renamed, directory synced."""
        make_directory(self._directory)
        write_file(self._directory / name, data, before_rename=before_rename)

    @contextmanager
    def payload(self, generation: int) -> Iterator[PendingFile]:
        """A hidden file beside the finished ones."""
        make_directory(self._directory)
        temporary = self._directory / f".payload-g{generation}-{secrets.token_hex(4)}.tmp"
        with PendingFile(temporary) as pending:
            yield pending

    def publish(self, payload: Payload, name: str) -> None:
        """Rename a payload of this storage."""
        assert isinstance(payload, PendingFile)
        payload.publish(self._directory / name)

    @contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        """The file itself."""
        path = self._directory / name
        if not path.is_file():
            raise FileNotFoundError(str(path))
        yield path

    def delete(self, names: list[str]) -> None:
        """Remove files and sync the directory."""
        for name in names:
            remove_if_there(self._directory / name)
        if names:
            sync_directory(self._directory)

    def temporary_generation(self, name: str) -> int | None:
        """Which generation left this unfinished file; 0 for a fence, which says none."""
        match = _UNFINISHED.fullmatch(name)
        return int(match[2] or match[3] or 0) if match else None

    def is_being_written(self, name: str) -> bool | None:
        """Whether a process that shares this file system's locks has it open for writing; None: it knows none."""
        return is_being_written(self._directory / name)
