"""Checkpoints in an object store, through fsspec (`s3://`, `gs://`, `memory://`, ...).

Such a store makes one put visible whole or not at all, so there is nothing to rename: the payload is written to a local
temporary file, put, and the manifest is put after it.
"""

from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from elastic_batch.checkpoint.storage import Payload
from elastic_batch.durable import PendingFile
from elastic_batch.errors import InvalidSetting


class ObjectStorage:
    """Files under a URL that fsspec understands.

    Raises:
        InvalidSetting: fsspec, or its driver for this kind of URL, is not installed or does not know it.
        OSError: The store cannot be used; from every method. Whatever else a driver raises becomes one.
    """

    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/")
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise InvalidSetting(
                "checkpoint.location", url, "needs the package fsspec", "Run: pip install 'elastic-batch[store]'"
            ) from error
        try:
            self._files, self._root = url_to_fs(self.location)
        except (ImportError, ValueError) as error:
            raise InvalidSetting("checkpoint.location", url, f"cannot be opened by fsspec: {error}") from error
        except Exception as error:
            raise self._as_os_error(error) from error

    def names(self) -> list[str]:
        """The names of all objects there."""
        try:
            with self._driving():
                self._files.invalidate_cache(self._root)
                return sorted(posixpath.basename(str(path)) for path in self._files.ls(self._root, detail=False))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        """The content of a small object."""
        with self._driving():
            return bytes(self._files.cat_file(self._at(name)))

    def write(self, name: str, data: bytes, *, before_rename: Callable[[], None] | None = None) -> None:
        """Put a small object."""
        with self._driving():
            self._files.makedirs(self._root, exist_ok=True)
        if before_rename is not None:
            before_rename()
        with self._driving():
            self._files.pipe_file(self._at(name), data)

    @contextmanager
    def payload(self, generation: int) -> Iterator[PendingFile]:
        """A local temporary file."""
        with (
            tempfile.TemporaryDirectory(prefix="elastic-batch-") as directory,
            PendingFile(Path(directory, f"payload-g{generation}")) as pending,
        ):
            yield pending

    def publish(self, payload: Payload, name: str) -> None:
        """Put a payload."""
        with self._driving():
            self._files.makedirs(self._root, exist_ok=True)
            self._files.put_file(str(payload.path), self._at(name))

    @contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        """A local copy."""
        with tempfile.TemporaryDirectory(prefix="elastic-batch-") as directory:
            local = Path(directory, name)
            with self._driving():
                self._files.get_file(self._at(name), str(local))
            yield local

    def delete(self, names: list[str]) -> None:
        """Remove objects; that one is gone already is no error."""
        for name in names:
            try:
                with self._driving():
                    self._files.rm_file(self._at(name))
            except FileNotFoundError:
                continue

    def temporary_generation(self, name: str) -> int | None:
        """None: an object store shows no unfinished puts."""
        return None

    def is_being_written(self, name: str) -> bool:
        """False: nothing in an object store tells; within one generation only one process writes."""
        return False

    @contextmanager
    def _driving(self) -> Iterator[None]:
        """Drivers have errors of their own: for credentials that are missing, say."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise self._as_os_error(error) from error

    def _as_os_error(self, error: Exception) -> OSError:
        return OSError(f"{self.location} cannot be used: {type(error).__name__}: {error}")

    def _at(self, name: str) -> str:
        return posixpath.join(self._root, name)
