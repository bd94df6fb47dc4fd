"""The store through which the workers of one generation find each other. Pure: replies go to a given function."""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass

from elastic_batch.protocol import StoreReply, StoreRequest

MAX_BYTES = 64 << 20
"""Keys and values of one generation."""
MAX_WAITING = 1 << 16
"""Requests of one generation that wait."""

Reply = Callable[[StoreReply], None]


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: StoreRequest
    owner: str
    deadline: float
    reply: Reply


class Store:
    """Keys and values of one generation.

    Args:
        generation: Which one; requests of others are refused.
        max_bytes: What all keys and values may take.
    """

    def __init__(self, generation: int, max_bytes: int = MAX_BYTES) -> None:
        self.generation = generation
        self._max_bytes = max_bytes
        self._values: dict[str, bytes] = {}
        self._num_bytes = 0
        self._waiting: list[_Waiting] = []
        self._withdrawn: str | None = None

    def ask(self, now: float, owner: str, request: StoreRequest, reply: Reply) -> None:
        """Answer a request, now or when the keys that it waits for are there.

        Args:
            now: Seconds.
            owner: Who asks; see `forget`.
            request: What is asked.
            reply: Called once with the answer.
        """
        if request.generation != self.generation or self._withdrawn is not None:
            reply(_error(request, self._withdrawn or f"generation {request.generation} is not the newest"))
        elif request.operation == "get":
            self._get(now, owner, request, reply)
        else:
            try:
                answer = self._change(request)
            except (ValueError, binascii.Error, MemoryError) as error:
                reply(_error(request, str(error)))
                return
            reply(answer)
            self._serve_waiting()

    def withdraw(self, reason: str) -> None:
        """Refuse everything from now on; what waits is refused at once."""
        self._withdrawn = reason
        waiting, self._waiting = self._waiting, []
        self._values.clear()
        for each in waiting:
            each.reply(_error(each.request, reason))

    def expire(self, now: float) -> None:
        """Refuse what has waited long enough."""
        if not any(each.deadline <= now for each in self._waiting):
            return
        late = [each for each in self._waiting if each.deadline <= now]
        self._waiting = [each for each in self._waiting if each.deadline > now]
        for each in late:
            missing = [key for key in each.request.keys if key not in self._values]
            each.reply(_error(each.request, f"{', '.join(missing[:3])} not set within {each.request.wait_seconds:g} s"))

    def forget(self, owner: str) -> None:
        """Drop what a worker waits for whose connection is gone."""
        self._waiting = [each for each in self._waiting if each.owner != owner]

    def _get(self, now: float, owner: str, request: StoreRequest, reply: Reply) -> None:
        if self._has(request):
            reply(self._read(request))
        elif request.wait_seconds <= 0:
            reply(_error(request, f"{', '.join(request.keys[:3])} is not set"))
        elif len(self._waiting) >= MAX_WAITING:
            reply(_error(request, "too many requests wait"))
        else:
            self._waiting.append(_Waiting(request, owner, now + request.wait_seconds, reply))

    def _serve_waiting(self) -> None:
        served = [each for each in self._waiting if self._has(each.request)]
        if not served:
            return
        self._waiting = [each for each in self._waiting if not self._has(each.request)]
        for each in served:
            each.reply(self._read(each.request))

    def _has(self, request: StoreRequest) -> bool:
        return all(key in self._values for key in request.keys)

    def _read(self, request: StoreRequest) -> StoreReply:
        values = tuple(b64encode(self._values[key]).decode() for key in request.keys)
        return StoreReply(request=request.request, values=values)

    def _change(self, request: StoreRequest) -> StoreReply:
        if request.operation == "check":
            return StoreReply(request=request.request, number=int(self._has(request)))
        if len(request.keys) != 1:
            raise ValueError(f"{request.operation} takes one key, not {len(request.keys)}")
        [key] = request.keys
        old = self._values.get(key)
        if request.operation == "delete":
            if old is not None:
                self._num_bytes -= len(key) + len(old)
                del self._values[key]
            return StoreReply(request=request.request, number=int(old is not None))
        if request.operation == "add":
            number = int(old or b"0") + request.amount
            self._put(key, str(number).encode())
            return StoreReply(request=request.request, number=number)
        value = b64decode(request.value, validate=True)
        if request.operation == "compare_set":
            return self._compare_set(request, old, value)
        self._put(key, (old or b"") + value if request.operation == "append" else value)
        return StoreReply(request=request.request)

    def _compare_set(self, request: StoreRequest, old: bytes | None, value: bytes) -> StoreReply:
        """As torch.distributed's stores do: a key that is not set equals an empty `expected`."""
        expected = b64decode(request.expected, validate=True)
        if (old or b"") == expected:
            self._put(request.keys[0], value)
            now = value
        else:
            now = old if old is not None else expected
        return StoreReply(request=request.request, values=(b64encode(now).decode(),))

    def _put(self, key: str, value: bytes) -> None:
        old = self._values.get(key)
        after = self._num_bytes + len(value) + (len(key) if old is None else -len(old))
        if after > self._max_bytes:
            raise MemoryError(f"the store of generation {self.generation} is full ({self._max_bytes} bytes)")
        self._values[key], self._num_bytes = value, after


def _error(request: StoreRequest, text: str) -> StoreReply:
    return StoreReply(request=request.request, error=text)
