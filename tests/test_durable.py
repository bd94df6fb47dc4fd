"""Files that survive a crash."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from elastic_batch.durable import (
    PendingFile,
    is_being_written,
    make_directory,
    remove_if_there,
    sync_directory,
    temporary_beside,
    write_file,
)


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_refusal_before_the_rename_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def refuse() -> None:
        raise RuntimeError("not any more")

    with pytest.raises(RuntimeError, match="not any more"):
        write_file(path, b"new", before_rename=refuse)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_pending_file_counts_and_digests_what_is_written(tmp_path: Path) -> None:
    with PendingFile(tmp_path / "pending") as pending:
        pending.write(b"ab")
        pending.write(memoryview(bytearray(b"c")))
        pending.flush()
        assert pending.num_bytes == 3
        assert pending.digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with PendingFile(tmp_path / "pending") as pending:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            pending.write(b"ab")
        assert pending.error is not None
        assert pending.error.errno == errno.ENOSPC


def test_only_a_file_that_is_open_for_writing_counts_as_being_written(tmp_path: Path) -> None:
    path = tmp_path / "pending"
    assert not is_being_written(path)
    with PendingFile(path) as pending:
        assert is_being_written(path)
        pending.publish(tmp_path / "file")
        assert is_being_written(tmp_path / "file")
    assert not is_being_written(tmp_path / "file")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EIO])
def test_without_locks_nobody_knows_what_is_being_written(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    with PendingFile(tmp_path / "pending") as pending:
        assert is_being_written(pending.path) is None
        assert is_being_written(tmp_path / "nothing") is False


def test_where_an_exclusive_lock_takes_a_descriptor_for_writing_a_writer_is_still_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def as_on_nfs(descriptor: int, operation: int) -> None:
        may_write = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if operation & fcntl.LOCK_EX and not may_write:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    with PendingFile(tmp_path / "pending") as pending:
        assert is_being_written(pending.path) is True
        pending.publish(tmp_path / "file")
    assert is_being_written(tmp_path / "file") is False


def test_a_file_that_cannot_be_opened_may_be_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "pending").touch()
    monkeypatch.setattr(os, "open", fail)
    assert is_being_written(tmp_path / "pending") is None


def test_directories_are_made_with_their_parents_and_again(tmp_path: Path) -> None:
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_directory(tmp_path / "file")


def test_a_directory_that_cannot_be_synced_is_no_error_but_a_failing_disk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = errno.EINVAL

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    sync_directory(tmp_path)
    code = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        sync_directory(tmp_path)


def test_a_directory_is_made_in_one_that_may_be_written_but_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    make_directory(tmp_path / "a")
    assert (tmp_path / "a").is_dir()


def test_removing_what_is_gone_is_no_error(tmp_path: Path) -> None:
    remove_if_there(tmp_path / "gone")


def test_temporary_names_are_hidden_and_never_the_same(tmp_path: Path) -> None:
    first, second = (temporary_beside(tmp_path / "file.json") for _ in range(2))
    assert first != second
    assert first.parent == tmp_path
    assert first.name.startswith(".file.json.")
    assert first.suffix == ".tmp"
