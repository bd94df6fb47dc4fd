"""The store through which the workers of one generation find each other: the coordinator's, over the session."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store

from elastic_batch.protocol import StoreReply

Ask = Callable[..., StoreReply]
"""Of a `StoreRequest`'s fields but `request`; blocks for the reply and raises RuntimeError where there is none."""


class SessionStore(Store):
    """What torch.distributed needs of a store, for one generation; withdrawn, every wait in it raises at once.

    The first `get` of a key after it was set or waited for here gives what it was then: keys of a rendezvous are
    written once. Of the round trips in which gloo meets its peers that leaves fewer than half.

    Args:
        ask: Sends a request of this generation.
        timeout: How long a wait lasts, unless torch wants a longer one: gloo gives what it waits for a connection.
    """

    def __init__(self, ask: Ask, timeout: timedelta) -> None:
        super().__init__()
        self._ask = ask
        self._timeout = timeout
        self._at_hand: dict[str, bytes] = {}

    @property
    def timeout(self) -> timedelta:
        return self._timeout

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout

    def set(self, key: str, value: Any) -> None:
        data = _to_bytes(value)
        self._change("set", key, value=_encode(data))
        self._at_hand[key] = data

    def get(self, key: str) -> bytes:
        found = self._at_hand.pop(key, None)
        return self._wait_for([key], self._timeout)[0] if found is None else found

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        missing = [key for key in keys if key not in self._at_hand]
        if missing:
            longest = max(timeout or self._timeout, self._timeout)
            self._at_hand.update(zip(missing, self._wait_for(missing, longest), strict=True))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        for key in keys:
            self._at_hand.pop(key, None)
        return self._wait_for(keys, self._timeout)

    def multi_set(self, keys: list[str], values: list[Any]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def add(self, key: str, amount: int) -> int:
        return self._change("add", key, amount=amount).number

    def append(self, key: str, value: Any) -> None:
        self._change("append", key, value=_encode(value))

    def check(self, keys: list[str]) -> bool:
        return bool(self._ask(operation="check", keys=tuple(keys)).number)

    def delete_key(self, key: str) -> bool:
        return bool(self._change("delete", key).number)

    def compare_set(self, key: str, expected: Any, value: Any) -> bytes:
        reply = self._change("compare_set", key, expected=_encode(expected), value=_encode(value))
        return b64decode(reply.values[0])

    def _change(self, operation: str, key: str, **fields: Any) -> StoreReply:
        self._at_hand.pop(key, None)
        return self._ask(operation=operation, keys=(key,), **fields)

    def _wait_for(self, keys: list[str], timeout: timedelta) -> list[bytes]:
        reply = self._ask(operation="get", keys=tuple(keys), wait_seconds=timeout.total_seconds())
        return [b64decode(value) for value in reply.values]


def _to_bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def _encode(value: Any) -> str:
    return b64encode(_to_bytes(value)).decode()
