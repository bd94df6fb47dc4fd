"""What outlives the coordinator, and what happens when it is damaged."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from elastic_batch.coordinator import journal as journal_module
from elastic_batch.coordinator.journal import Decision, Journal, JournalUnusable, Member

A, B = Member("a", "local-0", "here", 1), Member("b", "local-1", "there", 2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


def test_the_newest_world_comes_back_until_it_is_over(path: Path) -> None:
    with closing(Journal(path)) as journal:
        assert journal.last_world() == (0, [], True)
        journal.begin_world(1, [A], "first")
        journal.begin_world(2, [A, B], "b joined")
    with closing(Journal(path)) as journal:
        assert journal.last_world() == (2, [A, B], False)
        journal.world_is_over(2)
    with closing(Journal(path)) as journal:
        assert journal.last_world() == (2, [A, B], True)


def test_a_world_is_on_the_disk_when_it_is_entered(path: Path) -> None:
    with closing(Journal(path)) as journal:
        journal.begin_world(1, [A], "first")
        # What another process would find after this one was killed.
        copy = path.with_name("copy.sqlite")
        copy.write_bytes(path.read_bytes())
        log = path.with_name(path.name + "-wal")
        if log.exists():
            copy.with_name(copy.name + "-wal").write_bytes(log.read_bytes())
        with closing(Journal(copy)) as found:
            assert found.last_world() == (1, [A], False)


def test_facts_and_decisions_come_back(path: Path) -> None:
    decisions = [Decision(1.0, 1, "form world", "first"), Decision(2.0, 1, "evict", "worker a was lost")]
    with closing(Journal(path)) as journal:
        journal.keep("counters", {"updates": 3.0})
        journal.keep("counters", {"updates": 4.0}, durable=False)
        journal.decided(decisions)
    with closing(Journal(path)) as journal:
        assert journal.fact("counters") == {"updates": 4.0}
        assert journal.fact("unknown") is None
        assert journal.decisions() == decisions
        assert journal.decisions(1) == decisions[1:]


def test_the_journal_does_not_grow_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_KEPT_DECISIONS", 3)
    monkeypatch.setattr(journal_module, "_KEPT_GENERATIONS", 3)
    with closing(Journal(path)) as journal:
        for generation in range(1, 10):
            journal.begin_world(generation, [A], "again")
            journal.decided([Decision(0.0, generation, "form world", "again")])
        assert [each.generation for each in journal.decisions()] == [7, 8, 9]
        assert journal.last_world()[0] == 9


def test_nobody_but_the_owner_can_read_it(path: Path) -> None:
    with closing(Journal(path)):
        assert path.stat().st_mode & 0o077 == 0


def test_one_process_holds_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_BUSY_SECONDS", 0.05)
    with closing(Journal(path)), pytest.raises(JournalUnusable, match="another coordinator holds"):
        Journal(path)
    with closing(Journal(path)) as again:
        assert again.fact("x") is None


def test_a_damaged_journal_is_one_error_that_says_what_to_do(path: Path) -> None:
    path.write_bytes(b"these are not the bytes of a database " * 100)
    with pytest.raises(JournalUnusable, match=r"is damaged: .*Move it away .*what the workers report"):
        Journal(path)


def test_a_journal_with_damaged_pages_is_found_out_when_it_is_opened(path: Path) -> None:
    with closing(Journal(path)) as journal:
        journal.keep("job", {"padding": "x" * 50_000})
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))
    with pytest.raises(JournalUnusable, match="is damaged"):
        Journal(path)


def test_a_newer_journal_is_one_error_that_says_what_to_do(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(JournalUnusable, match="of format 99, this version knows 1: a newer elastic-batch wrote it"):
        Journal(path)


def test_a_disk_that_takes_nothing_is_an_error_and_the_journal_stays_usable(path: Path) -> None:
    with closing(Journal(path)) as journal:
        journal.begin_world(1, [A], "first")
        [pages] = journal._database.execute("PRAGMA page_count").fetchone()
        journal._database.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(JournalUnusable, match="Make room on the disk"):
            journal.keep("job", {"padding": "x" * 100_000})
        journal._database.execute("PRAGMA max_page_count = 100000")
        journal.keep("job", {"seed": 1})
        assert journal.last_world() == (1, [A], False)


def test_a_file_system_that_others_share_gets_a_rollback_journal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_is_shared", lambda _: True)
    with closing(Journal(path)) as journal:
        journal.begin_world(1, [A], "first")
        assert journal._database.execute("PRAGMA journal_mode").fetchone() == ("delete",)
