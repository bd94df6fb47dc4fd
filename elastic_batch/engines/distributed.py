"""The engine on torch.distributed: gloo on CPU, NCCL on GPU."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store
from torch.distributed.rendezvous import rendezvous

from elastic_batch.engines.protocol import Handle
from elastic_batch.engines.sockets import Descriptors, Formation, any_ended, open_sockets, opened_since, shut_down
from elastic_batch.errors import WorldBroken
from elastic_batch.launchers import LaunchedWorld

DEFAULT_TIMEOUT = timedelta(minutes=10)
"""How long a collective may take before the world counts as broken; a worker's compute may be that much later than
another's."""
_LOOK_AROUND = timedelta(seconds=0.5)
"""How often a wait looks whether the world was aborted. It ends by itself, at once, when connections do, but gloo may
lose an operation whose connection breaks while it is handed on: its wait would last for the whole timeout."""
_ENDING_SECONDS = 0.1
"""How long the collectives of an aborted world may take to end before they are left to themselves."""


class DistributedEngine:
    """One world on a process group of its own.

    Args:
        group: The process group or backend of torch.distributed, for this engine alone.
        backend: gloo or nccl.
        generation: Which world this is.
        sockets: What was opened while the group formed; `abort` shuts it down.
    """

    def __init__(self, group: Any, backend: str, generation: int, sockets: Descriptors | None = None) -> None:
        self._group = group
        self._backend = backend
        self._sockets = sockets or {}
        self._aborted = False
        self._works: deque[dist.Work] = deque(maxlen=64)  # the last ones launched
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
        before = open_sockets()
        try:
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
        except (RuntimeError, ValueError) as error:
            raise WorldBroken(f"the world could not be formed: {_first_line(error)}", 0) from None
        return cls(group, backend, generation=0, sockets=opened_since(before))

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
            forming_timeout: How long to wait for each of the others while the world forms.
            timeout: How long to wait in each collective.

        Raises:
            WorldBroken: The forming was broken off, the store was withdrawn, or a worker did not come.
        """
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            if backend == "nccl":
                group = _nccl_group(store, rank, size, device, forming_timeout)
            else:
                group = _gloo_group(store, rank, size, address, forming_timeout)
            engine = cls(group, backend, generation, formation.sockets())
            if formation.is_aborted:
                engine.abort()
            engine.all_reduce(torch.zeros(1, device=device)).wait()  # NCCL connects at the first collective
            group._set_default_timeout(timeout)
        except (RuntimeError, ValueError, OSError) as error:
            raise WorldBroken(f"the world could not be formed: {_first_line(error)}", generation) from None
        return engine

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
            return
        while not work.is_completed():
            with suppress(RuntimeError):  # its time is up, or it failed, which the wait below tells
                work.wait(_LOOK_AROUND)
            self.check()
        work.wait()

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


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _gloo_group(store: Store, rank: int, size: int, address: str, timeout: timedelta) -> Any:
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in torch's stubs
    options._timeout = timeout
    options._devices = [_gloo_device(address)]
    return ProcessGroupGloo(store, rank, size, options)


@cache
def _gloo_device(address: str) -> Any:
    """One for each address in a process's life: it has a thread of its own."""
    return ProcessGroupGloo.create_device(hostname=address)


def _nccl_group(store: Store, rank: int, size: int, device: torch.device, timeout: timedelta) -> Any:
    # Else torch's watchdog ends the process when a collective fails or is late: here the engine aborts the group.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    group = dist.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group
