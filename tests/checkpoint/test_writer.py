"""Saving in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_batch.checkpoint import CheckpointInfo, CheckpointStore, CheckpointWriter, Manifest, WriterEvents
from elastic_batch.errors import MisusedTrainer, UnsavableState

Save = tuple[dict[str, Any], CheckpointInfo]
TIMEOUT_SECONDS = 20.0


class SlowStore(CheckpointStore):
    """A store whose disk answers only when told."""

    def __init__(self, location: Path) -> None:
        super().__init__(location, keep=10)
        self.started = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)

    def save(self, state: dict[str, Any], info: CheckpointInfo, *, clean: bool = True) -> Manifest:
        self.started.release()
        assert self.go_on.acquire(timeout=TIMEOUT_SECONDS)
        return super().save(state, info, clean=clean)


def at(position: int) -> CheckpointInfo:
    return CheckpointInfo(position=position, update=position)


def test_training_changes_the_state_while_its_copy_is_written(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    state = {"weight": torch.ones(5)}
    with CheckpointWriter(store) as writer:
        future = writer.copy_and_submit(state, at(1))
        state["weight"].zero_()
        store.go_on.release()
        manifest = future.result(TIMEOUT_SECONDS)
    assert store.load(manifest.name).state["weight"].tolist() == [1.0] * 5


def test_of_states_that_wait_only_the_newest_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = SlowStore(tmp_path)
    superseded: list[int] = []
    events = WriterEvents(superseded=lambda info: superseded.append(info.position))
    state = {"weight": torch.zeros(5)}
    with CheckpointWriter(store, events) as writer:
        futures = [writer.copy_and_submit(state, at(0))]
        assert store.started.acquire(timeout=TIMEOUT_SECONDS)
        for position in (1, 2, 3):
            state["weight"].fill_(position)
            futures.append(writer.copy_and_submit(state, at(position)))
        assert not writer.wait(0.01)
        store.go_on.release(2)
        assert writer.wait(TIMEOUT_SECONDS)
    assert superseded == [1, 2]
    assert "the checkpoint of update 2 was not written" in caplog.text
    for future in futures[1:3]:
        with pytest.raises(CancelledError):
            future.result(0)
    assert [manifest.position for manifest in store.manifests()] == [3, 0]
    for manifest in store.manifests():
        assert store.load(manifest.name).state["weight"].tolist() == [float(manifest.position)] * 5


def test_closing_finishes_what_was_submitted(tmp_path: Path, make_save: Callable[[int], Save]) -> None:
    writer = CheckpointWriter(CheckpointStore(tmp_path))
    futures = [writer.submit(*make_save(32))]
    writer.wait(TIMEOUT_SECONDS)
    futures.append(writer.submit(*make_save(64)))
    writer.close()
    writer.close()
    assert [future.result(0).position for future in futures] == [32, 64]
    with pytest.raises(MisusedTrainer, match="is closed"):
        writer.submit(*make_save(96))


def test_an_unused_writer_starts_no_thread_and_closes(tmp_path: Path) -> None:
    threads = threading.active_count()
    with CheckpointWriter(CheckpointStore(tmp_path)) as writer:
        assert writer.wait(0)
        assert threading.active_count() == threads


def test_listeners_are_told_in_order_and_their_own_errors_end_nothing(
    tmp_path: Path, make_save: Callable[[int], Save], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[object] = []

    def saved(manifest: Manifest, seconds: float) -> None:
        told.append((manifest.position, seconds >= 0))
        raise RuntimeError("the listener fails")

    with CheckpointWriter(
        CheckpointStore(tmp_path), WriterEvents(before_save=lambda: told.append("before"), saved=saved)
    ) as writer:
        for position in (32, 64):
            assert writer.submit(*make_save(position)).result(TIMEOUT_SECONDS).position == position
    assert told == ["before", (32, True), "before", (64, True)]
    assert caplog.text.count("RuntimeError: the listener fails") == 2


def test_an_unsavable_state_is_refused_where_it_is_submitted_and_the_one_waiting_stays(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    with CheckpointWriter(store) as writer:
        writer.copy_and_submit({"weight": torch.ones(2)}, at(1))
        assert store.started.acquire(timeout=TIMEOUT_SECONDS)
        waiting = writer.copy_and_submit({"weight": torch.ones(2)}, at(2))
        with pytest.raises(UnsavableState):
            writer.copy_and_submit({"weight": object()}, at(3))
        store.go_on.release(2)
        assert waiting.result(TIMEOUT_SECONDS).position == 2


def test_an_unsavable_state_that_is_found_late_is_reported_like_a_failing_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with CheckpointWriter(CheckpointStore(tmp_path)) as writer:
        future = writer.submit({"weight": object()}, at(3))
        assert isinstance(future.exception(TIMEOUT_SECONDS), UnsavableState)
    assert "the checkpoint of update 3 could not be written" in caplog.text


def test_a_cancelled_submission_is_not_written(tmp_path: Path, make_save: Callable[[int], Save]) -> None:
    store = SlowStore(tmp_path)
    with CheckpointWriter(store) as writer:
        writer.submit(*make_save(1))
        assert store.started.acquire(timeout=TIMEOUT_SECONDS)
        assert writer.submit(*make_save(2)).cancel()
        store.go_on.release()
    assert [manifest.position for manifest in store.manifests()] == [1]


def test_at_most_two_copies_of_the_state_are_ever_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, allocations = torch.empty_like, 0

    def counted(*arguments: Any, **settings: Any) -> torch.Tensor:
        nonlocal allocations
        allocations += 1
        return allocate(*arguments, **settings)

    monkeypatch.setattr(torch, "empty_like", counted)
    store = SlowStore(tmp_path)
    with CheckpointWriter(store) as writer:
        for position in range(3):
            writer.copy_and_submit({"weight": torch.ones(5)}, at(position))
            assert store.started.acquire(timeout=TIMEOUT_SECONDS)
            store.go_on.release()
            assert writer.wait(TIMEOUT_SECONDS)
        assert allocations == 1
        for position in range(3, 8):
            writer.copy_and_submit({"weight": torch.ones(5)}, at(position))
            # The first of these is being written all the time, of the others one waits.
            assert position > 3 or store.started.acquire(timeout=TIMEOUT_SECONDS)
        store.go_on.release(2)
    assert allocations == 2
