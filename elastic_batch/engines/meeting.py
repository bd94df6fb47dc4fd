"""How the workers of a group that forms learn where the others listen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store

from elastic_batch.engines.sockets import Address


class MeetingStore(Store):
    """A group's store, in which each worker's values also say where it listens.

    A key of its own for that would cost two more round trips to the coordinator; gloo takes two between two workers.

    Args:
        store: What carries keys and values.
        here: Where this worker listens.

    Attributes:
        peers: Where those listen whose values were read.
    """

    def __init__(self, store: Store, here: Sequence[Address]) -> None:
        super().__init__()
        self.peers: set[Address] = set()
        self._store = store
        self._head = json.dumps(here).encode() + b"\n"

    def introduce(self, rank: int, size: int) -> None:
        """Meet all the others, for a group that may not read their values."""
        self.set(f"here/{rank}", b"")
        self.multi_get([f"here/{each}" for each in range(size) if each != rank])

    def set(self, key: str, value: Any) -> None:
        self._store.set(key, self._head + bytes(value))  # type: ignore[arg-type]  # torch's stubs know only text

    def get(self, key: str) -> bytes:
        return self._heard(self._store.get(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self._heard(value) for value in self._store.multi_get(keys)]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._store.wait(keys, *(() if timeout is None else (timeout,)))

    def check(self, keys: list[str]) -> bool:
        return self._store.check(keys)

    def _heard(self, value: bytes) -> bytes:
        head, _, rest = value.partition(b"\n")
        self.peers.update((host, port) for host, port in json.loads(head))
        return rest
