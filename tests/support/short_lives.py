"""A worker that dies in the middle of forming a world: its fellows know where it listened, and it never connects."""

from __future__ import annotations

import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch._C._distributed_c10d import FileStore, Store

from elastic_batch.engines import DistributedEngine, Formation
from elastic_batch.errors import WorldBroken

SIZE = 2
LISTENS, CONNECTS = "127.0.0.1", "127.0.0.2"
"""Of each pair, gloo lets the one with the greater address connect to the other."""


class LastWords(Store):
    """Takes what a worker says of itself, and kills it when it asks what the others said."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def set(self, key: str, value: Any) -> None:
        self._store.set(key, value)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._die()

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._die()

    def get(self, key: str) -> bytes:
        self._die()

    def _die(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def form(store: Store, formation: Formation, rank: int, address: str, seconds: float) -> DistributedEngine:
    """A world of two."""
    return DistributedEngine.form(
        store,
        formation,
        rank=rank,
        size=SIZE,
        generation=0,
        device=torch.device("cpu"),
        address=address,
        forming_timeout=timedelta(seconds=seconds),
    )


def die_before_connecting(meeting: Path) -> None:
    """As rank 1 of a world that meets in a file."""
    form(LastWords(FileStore(str(meeting), SIZE)), Formation(), 1, CONNECTS, 30)


def end_while_a_forming_is_stuck(meeting: Path) -> None:
    """As rank 0, beside one that died: break the forming off and leave the process as any other."""
    formation = Formation()
    threading.Timer(0.3, formation.abort).start()
    try:
        form(FileStore(str(meeting), SIZE), formation, 0, LISTENS, 30)
    except WorldBroken as error:
        sys.stdout.write(str(error))


if __name__ == "__main__":
    end_while_a_forming_is_stuck(Path(sys.argv[1]))
