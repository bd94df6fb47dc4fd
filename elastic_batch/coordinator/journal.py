"""What outlives the coordinator: generations, decisions, progress, in one SQLite file that one process holds."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastic_batch.errors import ElasticBatchError

logger = logging.getLogger(__name__)

FILE = "journal.sqlite"
VERSION = 1
_KEPT_DECISIONS, _KEPT_GENERATIONS = 10_000, 100
_BUSY_SECONDS = 3.0
"""How long a coordinator that ends may still hold the file."""
_SHARED_FILE_SYSTEMS = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "gpfs", "ceph", "beegfs", "gluster", "virtiofs")
"""Kinds of file systems that other hosts may see too; SQLite's WAL is for local ones."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS generations (
    generation INTEGER PRIMARY KEY, at REAL NOT NULL, members TEXT NOT NULL, reason TEXT NOT NULL, is_over INTEGER
);
CREATE TABLE IF NOT EXISTS decisions (
    number INTEGER PRIMARY KEY, at REAL NOT NULL, generation INTEGER NOT NULL, kind TEXT NOT NULL, reason TEXT NOT NULL
);
"""


class JournalUnusable(ElasticBatchError):
    """The journal cannot be used: damaged, of a newer version, or held by another coordinator."""


@dataclass(frozen=True, slots=True)
class Member:
    """A worker of a world, as the journal knows it.

    Args:
        name: As in its `Hello`, like the rest.
        slot: What is started again when it dies.
        host: Where it runs.
        pid: Its process there.
        address: Where the other workers reach it.
    """

    name: str
    slot: str
    host: str
    pid: int
    address: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided.

    Args:
        at: Seconds since 1970.
        generation: The newest world's, then.
        kind: `form world`, `end world`, `regroup`, `evict` or `end`.
        reason: Why.
    """

    at: float
    generation: int
    kind: str
    reason: str


class Journal:
    """The journal, open until `close`; nobody else can open it meanwhile.

    Args:
        path: The file; made if it is not there.

    Raises:
        JournalUnusable: It is damaged, newer, or another coordinator has it.
        OSError: It cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        is_new = not path.exists()
        try:
            if is_new:
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            self._database = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
            self._open()
        except sqlite3.Error as error:
            raise _unusable(path, error) from error

    def _open(self) -> None:
        execute = self._database.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute(f"PRAGMA journal_mode = {'DELETE' if _is_shared(self.path) else 'WAL'}")
        execute("PRAGMA synchronous = FULL")
        execute("BEGIN EXCLUSIVE")
        [version] = execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise JournalUnusable(
                f"{self.path} is of format {version}, this version knows {VERSION}: a newer elastic-batch wrote it. "
                "Install that one, or move the file away to have it made anew from what the workers report"
            )
        [found] = execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        for statement in _SCHEMA.split(";"):
            execute(statement)
        execute(f"PRAGMA user_version = {VERSION}")
        execute("COMMIT")

    def fact(self, name: str) -> Any:
        """A plain value that was kept; None: there is none."""
        row = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def keep(self, name: str, value: Any, *, durable: bool = True) -> None:
        """Keep a plain value.

        Args:
            name: Its name.
            value: Anything that JSON can hold.
            durable: Whether to wait until it is on the disk; if not, a crash of the machine may lose it.
        """
        with self._writing(durable=durable) as database:
            database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def begin_world(self, generation: int, members: Sequence[Member], reason: str) -> None:
        """Enter a world, durably; to be called before anybody hears of it."""
        row = (generation, time.time(), json.dumps([asdict(member) for member in members]), reason, 0)
        with self._writing(durable=True) as database:
            database.execute("INSERT OR REPLACE INTO generations VALUES (?, ?, ?, ?, ?)", row)
            database.execute("DELETE FROM generations WHERE generation < ?", (generation - _KEPT_GENERATIONS,))

    def world_is_over(self, generation: int) -> None:
        """Note that certainly nobody trains in a world any more."""
        with self._writing(durable=True) as database:
            database.execute("UPDATE generations SET is_over = 1 WHERE generation = ?", (generation,))

    def decided(self, decisions: Sequence[Decision]) -> None:
        """Note what was decided, durably; all of it or, on a full disk, nothing."""
        rows = [(each.at, each.generation, each.kind, each.reason) for each in decisions]
        with self._writing(durable=True) as database:
            database.executemany("INSERT INTO decisions (at, generation, kind, reason) VALUES (?, ?, ?, ?)", rows)
            database.execute(
                "DELETE FROM decisions WHERE number <= (SELECT MAX(number) FROM decisions) - ?", (_KEPT_DECISIONS,)
            )

    def last_world(self) -> tuple[int, list[Member], bool]:
        """The newest generation (0: none yet), its members, and whether certainly nobody trains in it any more."""
        row = self._database.execute(
            "SELECT generation, members, is_over FROM generations ORDER BY generation DESC LIMIT 1"
        ).fetchone()
        if row is None:
            return 0, [], True
        return row[0], [Member(**member) for member in json.loads(row[1])], bool(row[2])

    def decisions(self, limit: int = 100) -> list[Decision]:
        """The newest decisions, oldest first."""
        rows = self._database.execute(
            "SELECT at, generation, kind, reason FROM decisions ORDER BY number DESC LIMIT ?", (limit,)
        )
        return [Decision(*row) for row in rows][::-1]

    def close(self) -> None:
        """Give the file back."""
        self._database.close()

    @contextmanager
    def _writing(self, *, durable: bool) -> Iterator[sqlite3.Connection]:
        """One transaction."""
        database = self._database
        try:
            database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise JournalUnusable(f"cannot write {self.path}: {error}. Make room on the disk") from error


def _unusable(path: Path, error: sqlite3.Error) -> JournalUnusable:
    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
        return JournalUnusable(
            f"another coordinator holds {path}. One run has one coordinator: end that one, or use another run directory"
        )
    if isinstance(error, sqlite3.OperationalError):
        return JournalUnusable(f"cannot open {path}: {error}. Check the disk and the permissions of its directory")
    return JournalUnusable(
        f"{path} is damaged: {error}. Move it away (with {path.name}-wal, if there is one): the coordinator makes it "
        "anew from what the workers report; without workers the run goes on from its newest checkpoint"
    )


def _is_shared(path: Path) -> bool:
    """Whether a file lies on a file system that other hosts may see, as far as the kernel tells."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    place, best, kind = os.path.realpath(path), "", ""
    for line in lines:
        before, _, after = line.partition(" - ")
        mount = before.split()[4].encode().decode("unicode_escape")
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, after.split()[0]
    return kind.startswith(_SHARED_FILE_SYSTEMS)
