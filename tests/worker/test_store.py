"""The session's store: what torch.distributed asks of a store, with as few questions to the coordinator as it takes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from elastic_batch.coordinator.rendezvous import Store
from elastic_batch.protocol import StoreReply, StoreRequest
from elastic_batch.worker.store import SessionStore

SOON = timedelta(seconds=1)


class Coordinator:
    """The store of one generation, without a connection in between."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._store = Store(generation=3)

    def ask(self, **fields: Any) -> StoreReply:
        request = StoreRequest(request=len(self.asked), generation=3, **fields)
        self.asked.append(request.operation)
        replies: list[StoreReply] = []
        self._store.ask(0.0, "worker", request, replies.append)
        if not replies or replies[0].error is not None:
            raise RuntimeError(replies[0].error if replies else "would wait")
        return replies[0]


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator()


@pytest.fixture
def mine(coordinator: Coordinator) -> SessionStore:
    return SessionStore(coordinator.ask, SOON)


@pytest.fixture
def others(coordinator: Coordinator) -> SessionStore:
    return SessionStore(coordinator.ask, SOON)


def test_workers_read_what_others_wrote(mine: SessionStore, others: SessionStore) -> None:
    mine.set("a", b"one")
    mine.append("a", " two")
    assert others.get("a") == b"one two"
    assert others.add("n", 2) == 2
    assert mine.add("n", 3) == 5
    assert mine.compare_set("a", b"one two", b"three") == b"three"
    assert others.check(["a", "n"])
    assert others.multi_get(["a", "n"]) == [b"three", b"5"]
    assert mine.delete_key("a")
    assert not others.check(["a"])


def test_a_value_that_was_waited_for_is_not_asked_for_again(
    mine: SessionStore, others: SessionStore, coordinator: Coordinator
) -> None:
    mine.set("0", b"my address")
    others.set("1", b"theirs")
    coordinator.asked.clear()
    for key in ("0", "1"):
        mine.wait([key], SOON)
    assert (mine.get("0"), mine.get("1")) == (b"my address", b"theirs")
    assert coordinator.asked == ["get"]


def test_a_value_is_taken_from_memory_once(mine: SessionStore, others: SessionStore) -> None:
    mine.set("a", b"old")
    assert mine.get("a") == b"old"
    others.set("a", b"new")
    assert mine.get("a") == b"new"


@pytest.mark.parametrize(("wanted", "waited"), [(None, 1.0), (SOON / 5, 1.0), (3 * SOON, 3.0)])
def test_a_wait_lasts_at_least_as_long_as_the_store_was_told(wanted: timedelta | None, waited: float) -> None:
    asked: list[float] = []

    def ask(*, wait_seconds: float, **_: Any) -> StoreReply:
        asked.append(wait_seconds)
        return StoreReply(request=0, values=("",))

    SessionStore(ask, SOON).wait(["a"], wanted)
    assert asked == [waited]


@pytest.mark.parametrize("change", ["add", "append", "compare_set", "delete_key"])
def test_a_change_of_one_s_own_is_never_missed(mine: SessionStore, change: str) -> None:
    mine.set("a", b"1")
    arguments = {"add": ("a", 1), "append": ("a", b"1"), "compare_set": ("a", b"1", b"2"), "delete_key": ("a",)}
    getattr(mine, change)(*arguments[change])
    if change == "delete_key":
        with pytest.raises(RuntimeError):
            mine.get("a")
    else:
        assert mine.get("a") != b"1"
