"""The store of one generation."""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Any

import pytest

from elastic_batch.coordinator.rendezvous import Store
from elastic_batch.protocol import StoreReply, StoreRequest


class Asking:
    """A store at generation 3 and what it answered."""

    def __init__(self, **settings: Any) -> None:
        self.store = Store(3, **settings)
        self.replies: list[StoreReply] = []

    def ask(self, operation: Any, *keys: str, now: float = 0.0, owner: str = "a", **fields: Any) -> StoreReply | None:
        """The answer, if it came at once."""
        for name in ("value", "expected"):
            if name in fields:
                fields[name] = b64encode(fields[name]).decode()
        request = StoreRequest(request=len(self.replies), **{"generation": 3, **fields}, operation=operation, keys=keys)
        before = len(self.replies)
        self.store.ask(now, owner, request, self.replies.append)
        return self.replies[-1] if len(self.replies) > before else None

    def read(self, *keys: str) -> list[bytes]:
        reply = self.ask("get", *keys)
        assert reply is not None
        assert reply.error is None
        return [b64decode(value) for value in reply.values]


def test_what_is_set_can_be_read() -> None:
    asking = Asking()
    asking.ask("set", "k", value=b"\x00\xff")
    asking.ask("set", "l", value=b"")
    assert asking.read("k", "l") == [b"\x00\xff", b""]


def test_add_counts_from_nothing_and_stores_digits_as_torch_does() -> None:
    asking = Asking()
    replies = [asking.ask("add", "k", amount=amount) for amount in (2, 3, -1)]
    assert [reply.number for reply in replies if reply is not None] == [2, 5, 4]
    assert asking.read("k") == [b"4"]


def test_append_check_and_delete() -> None:
    asking = Asking()
    asking.ask("append", "k", value=b"a")
    asking.ask("append", "k", value=b"b")
    assert asking.read("k") == [b"ab"]
    checks = [asking.ask("check", "k"), asking.ask("check", "k", "l")]
    deletions = [asking.ask("delete", "k"), asking.ask("delete", "k")]
    assert [reply.number for reply in (*checks, *deletions) if reply is not None] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("stored", "expected", "after"),
    [(None, b"", b"new"), (None, b"x", b"x"), (b"old", b"old", b"new"), (b"old", b"x", b"old")],
)
def test_compare_set_answers_as_torch_does(stored: bytes | None, expected: bytes, after: bytes) -> None:
    asking = Asking()
    if stored is not None:
        asking.ask("set", "k", value=stored)
    reply = asking.ask("compare_set", "k", expected=expected, value=b"new")
    assert reply is not None
    assert b64decode(reply.values[0]) == after


def test_a_wait_is_answered_when_the_last_key_is_set() -> None:
    asking = Asking()
    assert asking.ask("get", "k", "l", wait_seconds=10) is None
    asking.ask("set", "k", value=b"1")
    assert len(asking.replies) == 1
    asking.ask("set", "l", value=b"2")
    assert asking.replies[-1].values == ("MQ==", "Mg==")


def test_a_wait_ends_with_an_error_that_names_what_is_missing() -> None:
    asking = Asking()
    asking.ask("get", "k", "l", wait_seconds=10, now=5.0)
    asking.ask("set", "k", value=b"1")
    asking.store.expire(14.9)
    assert len(asking.replies) == 1
    asking.store.expire(15.0)
    assert asking.replies[-1].error == "l not set within 10 s"


def test_without_a_wait_a_missing_key_is_an_error_at_once() -> None:
    reply = Asking().ask("get", "k")
    assert reply is not None
    assert reply.error == "k is not set"


def test_withdrawn_everything_fails_at_once_and_later() -> None:
    asking = Asking()
    asking.ask("get", "k", wait_seconds=10)
    asking.ask("get", "l", wait_seconds=10, owner="b")
    asking.store.withdraw("generation 3 is over")
    assert [reply.error for reply in asking.replies] == ["generation 3 is over"] * 2
    later = asking.ask("set", "k", value=b"1")
    assert later is not None
    assert later.error == "generation 3 is over"


def test_another_generation_is_refused() -> None:
    reply = Asking().ask("set", "k", value=b"1", generation=2)
    assert reply is not None
    assert reply.error == "generation 2 is not the newest"


def test_the_waits_of_a_lost_worker_are_forgotten() -> None:
    asking = Asking()
    asking.ask("get", "k", wait_seconds=10, owner="lost")
    asking.store.forget("lost")
    asking.ask("set", "k", value=b"1")
    assert len(asking.replies) == 1  # that of the set


def test_the_store_is_bounded_and_room_comes_back() -> None:
    asking = Asking(max_bytes=10)
    asking.ask("set", "k", value=b"12345678")
    full = asking.ask("append", "k", value=b"ab")
    assert full is not None
    assert "is full" in (full.error or "")
    asking.ask("delete", "k")
    asking.ask("set", "l", value=b"123456789")
    assert asking.read("l") == [b"123456789"]


@pytest.mark.parametrize(
    ("operation", "keys", "fields"),
    [("set", ("k", "l"), {}), ("add", ("words",), {"amount": 1})],
)
def test_what_makes_no_sense_is_an_error(operation: str, keys: tuple[str, ...], fields: dict[str, Any]) -> None:
    asking = Asking()
    asking.ask("set", "words", value=b"abc")
    reply = asking.ask(operation, *keys, **fields)
    assert reply is not None
    assert reply.error
