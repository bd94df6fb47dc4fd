"""What an engine makes of collectives that never end."""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from elastic_batch.engines import DistributedEngine
from elastic_batch.engines.distributed import _nccl_group
from elastic_batch.errors import WorldBroken


class LostWork:
    """A collective that is lost: it neither ends nor fails before its own timeout."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def is_completed(self) -> bool:
        return self.over.is_set()

    def wait(self, timeout: timedelta | None = None) -> None:
        if not self.over.wait(None if timeout is None else timeout.total_seconds()):
            raise RuntimeError("Operation timed out!")


class GroupThatLosesWork:
    def __init__(self) -> None:
        self.work: LostWork = LostWork()

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def allreduce(self, _: list[torch.Tensor], options: Any) -> LostWork:
        return self.work


def test_abort_ends_the_wait_for_a_lost_collective() -> None:
    group = GroupThatLosesWork()
    engine = DistributedEngine(group, "gloo", generation=3)
    handle = engine.all_reduce(torch.zeros(1))
    threading.Timer(0.1, engine.abort).start()
    since = time.monotonic()
    with pytest.raises(WorldBroken):
        handle.wait()
    engine.close()
    assert time.monotonic() - since < 1.5
    group.work.over.set()


class LateWork(LostWork):
    """A collective that ends, well or badly, just after a wait for it has given up."""

    def __init__(self, error: str | None) -> None:
        super().__init__()
        self.error = error

    def wait(self, timeout: timedelta | None = None) -> None:
        if not self.over.is_set():
            self.over.set()
            raise RuntimeError("Operation timed out!")
        if self.error is not None:
            raise RuntimeError(self.error)


@pytest.mark.parametrize("error", [None, "Connection closed by peer"])
def test_a_collective_that_ends_just_when_a_wait_gives_up_ends_as_it_did(error: str | None) -> None:
    group = GroupThatLosesWork()
    group.work = LateWork(error)
    handle = DistributedEngine(group, "gloo", generation=3).all_reduce(torch.zeros(1))
    with nullcontext() if error is None else pytest.raises(WorldBroken, match=error):
        handle.wait()


class GroupOfManyWorks(GroupThatLosesWork):
    """Its collectives end when the test says so; each is kept alive by whoever launched it."""

    def allreduce(self, _: list[torch.Tensor], options: Any) -> LostWork:
        return LostWork()


def test_of_the_collectives_that_are_over_only_the_last_one_is_kept() -> None:
    engine = DistributedEngine(GroupOfManyWorks(), "gloo", generation=3)
    handles: list[Any] = [engine.all_reduce(torch.zeros(1)) for _ in range(100)]
    works = [weakref.ref(handle._work) for handle in handles]
    ends = [handle._work.over for handle in handles]
    for end in ends[:60]:
        end.set()
    handles[10].wait()
    last = handles[-1]
    handles.clear()
    assert [work() is None for work in works] == [True] * 60 + [False] * 40
    for end in ends:
        end.set()
    last.wait()
    del last
    assert [work() is None for work in works] == [True] * 99 + [False]


class NcclGroup(GroupThatLosesWork):
    """A group whose waits only order streams."""

    class Options:
        pass

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.work.over.set()
        self.error_handling = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")

    def eager_connect_single_device(self, device: torch.device) -> None:
        pass

    def abort(self) -> None:
        pass


def test_an_abort_while_a_collective_runs_on_a_gpu_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = DistributedEngine(NcclGroup(), "nccl", generation=3)
    # The stream gets to the collective's end because of the abort.
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=engine.abort))
    handle = engine.all_reduce(torch.zeros(1))
    with pytest.raises(WorldBroken, match="aborted"):
        handle.wait()


def test_torch_leaves_failures_of_formed_worlds_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(dist, "ProcessGroupNCCL", NcclGroup, raising=False)
    group = _nccl_group(Store(), 0, 2, torch.device("cuda"), timedelta(seconds=1))
    assert group.error_handling == "0"
