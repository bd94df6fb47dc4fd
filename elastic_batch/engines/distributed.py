"""The engine on torch.distributed: gloo on CPU, NCCL on GPU."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_batch.engines.launchers import LaunchedWorld
from elastic_batch.engines.protocol import Handle
from elastic_batch.errors import WorldBroken

DEFAULT_TIMEOUT = timedelta(minutes=10)
"""How long a collective may take before the world counts as broken; a worker's compute may be that much later than
another's."""


class DistributedEngine:
    """One world on a process group of its own.

    Args:
        group: The process group, for this engine alone.
        generation: Which world this is.
        sockets: Descriptors that were opened while the group formed; `abort` shuts them down.
    """

    def __init__(self, group: dist.ProcessGroup, generation: int, sockets: Iterable[int] = ()) -> None:
        self._group = group
        self._sockets = tuple(sockets)
        self._aborted = False
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
        before = _open_sockets()
        try:
            if not dist.is_initialized():
                assert world is not None
                dist.init_process_group(
                    backend,
                    init_method=world.init_method,
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
        return cls(group, generation=0, sockets=_open_sockets() - before)

    def all_reduce(self, tensor: Tensor) -> Handle:
        return self._launch(dist.all_reduce, tensor, group=self._group)

    def broadcast(self, tensor: Tensor, source: int) -> Handle:
        return self._launch(dist.broadcast, tensor, group=self._group, group_src=source)

    def abort(self) -> None:
        self._aborted = True
        if dist.get_backend(self._group) == "nccl":
            self._group.abort()
            return
        # gloo has no abort: a pending collective ends when its connections do.
        for descriptor in self._sockets:
            _shut_down(descriptor)

    def close(self) -> None:
        with suppress(RuntimeError, ValueError, AssertionError):
            dist.destroy_process_group(self._group)

    def check(self) -> None:
        """Raise `WorldBroken` after an abort."""
        if self._aborted:
            raise WorldBroken("aborted", self.generation)

    def _launch(self, collective: Any, tensor: Tensor, **where: Any) -> Handle:
        self.check()
        try:
            return _Pending(self, collective(tensor, async_op=True, **where))
        except RuntimeError as error:
            raise WorldBroken(_first_line(error), self.generation) from None


class _Pending:
    """The handle of a collective that torch.distributed carries."""

    def __init__(self, engine: DistributedEngine, work: dist.Work) -> None:
        self._engine, self._work = engine, work

    def wait(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            # The cause is dropped on purpose: its traceback would keep the process group, hence its connections, alive.
            raise WorldBroken(_first_line(error), self._engine.generation) from None
        self._engine.check()


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _open_sockets() -> set[int]:
    """Descriptors of this process that are sockets."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.add(int(name))
    return found


def _shut_down(descriptor: int) -> None:
    """Shut the connection behind `descriptor` down without closing the descriptor, which is its owner's."""
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
        # gloo ends the process when its listening socket fails.
        if not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            connection.shutdown(socket.SHUT_RDWR)
