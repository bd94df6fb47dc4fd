"""The engine on torch.distributed: gloo on CPU, NCCL on GPU."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store
from torch.distributed.rendezvous import rendezvous

from elastic_batch.engines.formation import Formation
from elastic_batch.engines.meeting import MeetingStore
from elastic_batch.engines.protocol import Handle
from elastic_batch.engines.sockets import (
    ANY_PORT,
    Address,
    Descriptors,
    any_ended,
    listening,
    open_sockets,
    opened_since,
    shut_down,
)
from elastic_batch.errors import WorldBroken
from elastic_batch.launchers import LaunchedWorld

DEFAULT_TIMEOUT = timedelta(minutes=10)
"""How long a collective may take before the world counts as broken; a worker's compute may be that much later than
another's."""
_LOOK_AROUND = timedelta(seconds=0.05)
"""How often a wait looks whether the world was aborted, for 0.2 ms of a core. It ends by itself, at once, when
connections do, but gloo may lose an operation whose connection breaks while it is handed on: its wait would last for
the whole timeout."""
_GLOO_PATIENCE = 5
"""As many of its timeouts gloo waits for a first connection."""
_ENDING_SECONDS = 0.1
"""How long the collectives of an aborted world may take to end before they are left to themselves."""


class DistributedEngine:
    """One world on a process group of its own.

    Args:
        group: The process group or backend of torch.distributed, for this engine alone.
        backend: gloo or nccl.
        generation: Which world this is.
        sockets: The group's connections; `abort` shuts them down.
    """

    def __init__(self, group: Any, backend: str, generation: int, sockets: Descriptors | None = None) -> None:
        self._group = group
        self._backend = backend
        self._sockets = sockets or {}
        self._aborted = False
        self._works: deque[dist.Work] = deque()  # those that may be pending, and the last one
        self.generation = generation
        self.rank = group.rank()
        self.size = group.size()

    @classmethod
    def join(
        cls, world: LaunchedWorld | None, device: torch.device, *, timeout: timedelta = DEFAULT_TIMEOUT
    ) -> DistributedEngine:
        """Join the world that a launcher describes. Blocks until every worker is here and all are connected.

        Args:
            world: What the launcher says; None where the script has made torch's default process group itself.
            device: Where the model lives: NCCL for CUDA, else gloo.
            timeout: How long to wait for the others, here and in each collective.

        Raises:
            WorldBroken: The others did not come within `timeout`.
        """
        backend = "nccl" if device.type == "cuda" else "gloo"

        def connect() -> DistributedEngine:
            before = open_sockets()
            if not dist.is_initialized():
                assert world is not None
                store, _, _ = next(rendezvous(world.init_method, world.rank, world.size, timeout=timeout))
                dist.init_process_group(
                    backend,
                    # torchrun's agents keep the store over a restart: a dead world's addresses are still in it.
                    store=PrefixStore(f"attempt {world.attempt}", store),
                    rank=world.rank,
                    world_size=world.size,
                    timeout=timeout,
                    device_id=device if backend == "nccl" else None,
                )
            group = dist.new_group(backend=backend, timeout=timeout)
            assert isinstance(group, dist.ProcessGroup)
            dist.all_reduce(torch.zeros(1, device=device), group=group)
            return cls(group, backend, generation=0, sockets=opened_since(before))

        return cls._made_by(connect, Formation(), 0, device, timeout)

    @classmethod
    def form(
        cls,
        store: Store,
        formation: Formation,
        *,
        rank: int,
        size: int,
        generation: int,
        device: torch.device,
        address: str,
        forming_timeout: timedelta,
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> DistributedEngine:
        """Form a world in a living process. Blocks until all workers are connected; nothing uses the store afterwards.

        Args:
            store: Where the workers of this generation, and no others, meet.
            formation: Lets another thread break the forming off.
            rank: This worker's place.
            size: Number of workers.
            generation: Which world this is.
            device: Where the model lives: NCCL for CUDA, else gloo.
            address: This host's, as the others can reach it.
            forming_timeout: How long to wait until the world has formed.
            timeout: How long to wait in each collective.

        Raises:
            WorldBroken: The forming was broken off, the store was withdrawn, or a worker did not come or died.
        """
        backend = "nccl" if device.type == "cuda" else "gloo"

        def connect() -> DistributedEngine:
            here = _hosts(address) if backend == "nccl" else _gloo_device(address)[1]
            meeting = MeetingStore(store, here)
            formation.expect(here, meeting.peers)
            if backend == "nccl":
                meeting.introduce(rank, size)
                group = _nccl_group(store, rank, size, device, forming_timeout)
            else:
                group = _gloo_group(meeting, rank, size, address, forming_timeout)
            engine = cls(group, backend, generation, formation.sockets())
            try:
                if formation.is_aborted:  # these connections may be younger than the abort
                    engine.abort()
                engine.all_reduce(torch.zeros(1, device=device)).wait()  # NCCL connects at the first collective
                group._set_default_timeout(timeout)
            except BaseException:
                _undo(engine)
                raise
            return engine

        return cls._made_by(connect, formation, generation, device, forming_timeout)

    @classmethod
    def _made_by(
        cls,
        connect: Callable[[], DistributedEngine],
        formation: Formation,
        generation: int,
        device: torch.device,
        timeout: timedelta,
    ) -> DistributedEngine:
        current = torch.cuda.current_device() if device.type == "cuda" else None

        def connect_on_device() -> DistributedEngine:
            if current is not None:
                torch.cuda.set_device(current)  # each thread has one of its own
            return connect()

        try:
            return formation.run(connect_on_device, undo=_undo, timeout=timeout)
        except (RuntimeError, ValueError, OSError, WorldBroken) as error:
            # Who comes too late, or is still waited for, must not meet the next world.
            _gloo_device.cache_clear()
            raise WorldBroken(f"the world could not be formed: {_first_line(error)}", generation) from None

    def all_reduce(self, tensor: Tensor) -> Handle:
        return self._launch("allreduce", tensor, dist.AllreduceOptions())

    def broadcast(self, tensor: Tensor, source: int) -> Handle:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        return self._launch("broadcast", tensor, options)

    def abort(self) -> None:
        self._aborted = True
        group = self._group
        if self._backend == "nccl" and group is not None:
            group.abort()
            return
        # gloo has no abort that wakes pending collectives: they end when their connections do.
        shut_down(self._sockets)

    def probe(self) -> None:
        if any_ended(self._sockets):
            self.abort()

    def close(self) -> None:
        group, self._group, self._sockets = self._group, None, {}
        if self._aborted and self._backend == "gloo" and (lost := self._still_pending()):
            # The group's end would wait for them.
            threading.Thread(target=_outlive, args=(group, lost), name="elastic-batch lost world", daemon=True).start()
            return
        # A group made by `form` is in none of torch's registries: it ends with its last reference.
        if isinstance(group, dist.ProcessGroup):
            with suppress(RuntimeError, ValueError, AssertionError):
                dist.destroy_process_group(group)

    def check(self) -> None:
        if self._aborted:
            raise WorldBroken("aborted", self.generation)

    def _launch(self, collective: str, tensor: Tensor, options: object) -> Handle:
        self.check()
        try:
            work = getattr(self._group, collective)([tensor], options)
        except RuntimeError as error:
            raise WorldBroken(_first_line(error), self.generation) from None
        self._works.append(work)
        return _Pending(self, work, tensor.device)

    def wait_for(self, work: dist.Work, device: torch.device) -> None:
        """Wait for a collective on `device`; raises RuntimeError if it failed."""
        if self._backend != "gloo":
            work.wait()
            # That only orders streams. An abort ends a running collective as if it were done, so that only a check
            # which comes after its end cannot miss the abort.
            torch.cuda.current_stream(device).synchronize()
        else:
            while not work.is_completed():
                with suppress(RuntimeError):  # its time is up, or it failed, which the wait below tells
                    work.wait(_LOOK_AROUND)
                self.check()
            work.wait()
        self._forget_completed()

    def _forget_completed(self) -> None:
        """Let go of tensors whose collectives are over.

        The last one stays as long as the engine. With it stay the connections, whose end the other workers would take
        for a loss: they may be at that collective still.
        """
        while len(self._works) > 1 and self._works[0].is_completed():
            self._works.popleft()

    def _still_pending(self) -> list[dist.Work]:
        deadline = time.monotonic() + _ENDING_SECONDS
        while pending := [work for work in self._works if not work.is_completed()]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
        self._works.clear()
        return pending


class _Pending:
    """The handle of a collective that torch.distributed carries."""

    def __init__(self, engine: DistributedEngine, work: dist.Work, device: torch.device) -> None:
        self._engine, self._work, self._device = engine, work, device

    def wait(self) -> None:
        try:
            self._engine.wait_for(self._work, self._device)
        except RuntimeError as error:
            # The cause is dropped on purpose: its traceback would keep the process group, hence its connections, alive.
            raise WorldBroken(_first_line(error), self._engine.generation) from None
        self._engine.check()


def _outlive(group: object, works: list[dist.Work]) -> None:
    """Keep a group until its last collectives are over."""
    for work in works:
        with suppress(RuntimeError):
            work.wait()


def _undo(engine: DistributedEngine) -> None:
    engine.abort()
    engine.close()


def _first_line(error: BaseException) -> str:
    return error.reason if isinstance(error, WorldBroken) else str(error).partition("\n")[0]


def _hosts(address: str) -> list[Address]:
    """NCCL listens at ports that it keeps for itself."""
    return [(str(host), ANY_PORT) for *_, (host, *_) in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)]


def _gloo_group(store: Store, rank: int, size: int, address: str, timeout: timedelta) -> Any:
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in torch's stubs
    options._timeout = timeout / _GLOO_PATIENCE
    options._devices = [_gloo_device(address)[0]]
    group = ProcessGroupGloo(store, rank, size, options)
    group._set_default_timeout(timeout)
    return group


@cache
def _gloo_device(address: str) -> tuple[Any, list[Address]]:
    """One for each address until a forming fails, since it has a thread of its own; and where it listens."""
    before = open_sockets()
    device = ProcessGroupGloo.create_device(hostname=address)
    return device, listening(opened_since(before))


def _nccl_group(store: Store, rank: int, size: int, device: torch.device, timeout: timedelta) -> Any:
    # Else torch's watchdog ends the process when a collective fails or is late: here the engine aborts the group.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    group = dist.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group
