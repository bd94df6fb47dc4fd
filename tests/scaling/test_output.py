"""What workers print."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_batch.scaling.output import OutputLog, unfailing


def shown_of(*pieces: bytes) -> list[str]:
    shown: list[str] = []
    log = OutputLog("local-2", shown.append, None)
    for piece in pieces:
        log.take(piece)
    log.close()
    return shown


def test_lines_have_their_slots_name_however_they_arrive() -> None:
    assert shown_of(b"a\nb", b"c\n", b"\n", b"end") == ["[local-2] a", "[local-2] bc", "[local-2] ", "[local-2] end"]


def test_a_progress_bar_is_shown_as_it_was_last() -> None:
    assert shown_of(b"10 %\r20 %\r100 %\r\n") == ["[local-2] 100 %"]


def test_bytes_that_are_no_text_are_shown_somehow() -> None:
    assert shown_of(b"\xff!\n") == ["[local-2] �!"]


def test_a_line_without_end_does_not_fill_the_memory() -> None:
    assert [len(line) for line in shown_of(b"x" * 70_000, b"y\n")] == [70_010, 11]


def test_everything_is_kept_as_it_came_and_appended(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "local-2.log"
    for text in (b"one\n", b"two\r2\xff"):
        log = OutputLog("local-2", lambda _: None, path)
        log.take(text)
        log.close()
    assert path.read_bytes() == b"one\ntwo\r2\xff"


def test_the_last_lines_are_remembered() -> None:
    log = OutputLog("local-2", lambda _: None, None)
    log.take(b"".join(b"%d\n" % number for number in range(100)))
    assert list(log.last_lines) == [str(number) for number in range(80, 100)]


def test_a_full_disk_ends_the_log_and_nothing_else() -> None:
    shown: list[str] = []
    log = OutputLog("local-2", shown.append, Path("/dev/full"))
    log.take(b"a\n")
    log.take(b"b\n")
    assert [shown[0][:35], *shown[1:]] == ["[local-2] its log is no longer kept", "[local-2] a", "[local-2] b"]


@pytest.mark.parametrize(
    ("error", "is_told"),
    [
        (OSError(28, "No space left on device"), True),
        (UnicodeEncodeError("ascii", "\u2026", 0, 1, "not in range"), True),
        (BrokenPipeError(), False),
    ],
)
def test_what_cannot_be_shown_is_complained_of_once_and_reading_goes_on(
    error: Exception, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    shown: list[str] = []

    def fail_twice(line: str) -> None:
        if not line.endswith("c"):
            raise error
        shown.append(line)

    OutputLog("local-2", unfailing(fail_twice), None).take(b"a\nb\nc\n")
    assert shown == ["[local-2] c"]
    assert len(caplog.records) == is_told
