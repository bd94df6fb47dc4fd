"""Logs of one object a line."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_batch.rundir.lines import LineWriter, read_line_at, read_lines


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def records(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_lines(path)]


def test_lines_reach_the_file_at_most_once_a_second_and_at_the_end(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "log"
    with LineWriter(path, clock=clock) as writer:
        writer.append({"update": 1})
        assert len(records(path)) == 1
        clock.seconds += 0.5
        writer.append({"update": 2})
        assert len(records(path)) == 1
        clock.seconds += 0.5
        writer.append({"update": 3})
        assert len(records(path)) == 3
        writer.append({"update": 4})
    assert [record["update"] for record in records(path)] == [1, 2, 3, 4]


def test_flushing_and_syncing_do_not_wait_for_the_second(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with LineWriter(path, clock=Clock()) as writer:
        writer.append({"update": 1})
        writer.append({"update": 2})
        writer.flush()
        assert len(records(path)) == 2
        writer.append({"update": 3})
        writer.sync()
        assert len(records(path)) == 3


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=8), min_size=1, max_size=5),
    cut=st.integers(0, 30),
    garbage=st.sampled_from([b"", b"\x00" * 50, b'{"text": ', b"17", b'{"text": "whole"}']),
)
def test_after_any_cut_a_new_writer_goes_on_behind_the_last_whole_line(
    texts: list[str], cut: int, garbage: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("lines") / "log"
    with LineWriter(path) as writer:
        for text in texts:
            writer.append({"text": text})
    content = path.read_bytes()
    path.write_bytes(content[: max(0, len(content) - cut)] + garbage)
    whole = records(path)
    with LineWriter(path) as writer:
        writer.append({"text": "after"})
    assert records(path) == [*whole, {"text": "after"}]
    assert all(line.startswith(b"{") for line in path.read_bytes().splitlines())


def test_a_torn_line_longer_than_a_block_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"a": 1}\n' + b'{"a": "' + b"x" * 200_000)
    LineWriter(path).close()
    assert path.read_bytes() == b'{"a": 1}\n'


def test_garbage_amid_the_lines_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"a": 1}\n\x00\x00\x00\n[1]\n{"a": 2}\n{"a": ')
    found = list(read_lines(path))
    assert [record for _, record in found] == [{"a": 1}, {"a": 2}]
    assert list(read_line_at(path, (offset for offset, _ in reversed(found)))) == [{"a": 2}, {"a": 1}]


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert records(tmp_path / "nothing") == []


def test_a_full_disk_is_told_once_a_minute_and_no_line_is_torn_or_doubled_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, path, room = Clock(), tmp_path / "log", 25
    write = os.write

    def limited(descriptor: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, bytes(data[:room]))
        room -= written
        return written

    monkeypatch.setattr(os, "write", limited)
    with caplog.at_level(logging.ERROR), LineWriter(path, clock=clock) as writer:
        for update in range(100):
            writer.append({"update": update})
            clock.seconds += 1
        assert caplog.text.count("No space left on device") == 2
        assert "training goes on" in caplog.text
        room = 1 << 20
    assert [record["update"] for record in records(path)] == list(range(100))


def test_what_waits_for_a_full_disk_is_bounded_and_what_is_dropped_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    with LineWriter(Path("/dev/full"), clock=clock, max_waiting_bytes=100) as writer:
        for update in range(50):
            writer.append({"update": update})
        clock.seconds += 61
        writer.append({"update": 50})
    assert "lines were dropped" in caplog.text
    assert "No space left on device" in caplog.text


def test_a_disk_that_cannot_sync_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with LineWriter(tmp_path / "log") as writer:
        writer.append({"update": 1})
        writer.sync()
    assert "Input/output error" in caplog.text


def test_a_file_that_is_taken_away_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log"
    with LineWriter(path) as writer:
        writer.append({"update": 1})
        writer.sync()
        assert not caplog.records
        path.rename(tmp_path / "elsewhere")
        for update in (2, 3):
            writer.append({"update": update})
            writer.sync()
    (record,) = caplog.records
    assert record.getMessage() == f"{path} was removed or moved while it was written to; its lines are not there"
    assert len(records(tmp_path / "elsewhere")) == 3
