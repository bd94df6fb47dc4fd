"""World after world in the same processes, and what they hold meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
from support.leaks import Holdings
from torch._C._distributed_c10d import PrefixStore, TCPStore

from elastic_batch.engines import DistributedEngine, Formation
from elastic_batch.engines.distributed import _gloo_group
from elastic_batch.engines.sockets import open_sockets, opened_since

WARM_UP = 20
TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Worlds:
    """What changes how often.

    Args:
        backend: gloo or nccl.
        devices: The device of each worker.
        changes: How many worlds.
    """

    backend: str
    devices: tuple[str, ...]
    changes: int

    def form(self, store: TCPStore, rank: int, generation: int) -> DistributedEngine:
        """This worker's engine in the next world."""
        meeting, size = PrefixStore(str(generation), store), len(self.devices)
        device = torch.device(self.devices[rank])
        before = open_sockets()
        if self.backend == "gloo" and device.type == "cuda":  # two NCCL workers cannot share a GPU
            group = _gloo_group(meeting, rank, size, "127.0.0.1", TIMEOUT)
            return DistributedEngine(group, "gloo", generation, opened_since(before))
        return DistributedEngine.form(
            meeting,
            Formation(),
            rank=rank,
            size=size,
            generation=generation,
            device=device,
            address="127.0.0.1",
            forming_timeout=TIMEOUT,
        )


def work(worlds: Worlds, rank: int, port: int, results: Connection) -> None:
    """One worker: in every world a sum, then it is left in good order or aborted in turn."""
    size, device = len(worlds.devices), torch.device(worlds.devices[rank])
    store = TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=TIMEOUT)

    def meet(place: str) -> None:
        store.set(f"{place}: {rank}", "here")
        store.wait([f"{place}: {each}" for each in range(size)])

    early = None
    for generation in range(worlds.changes):
        engine = worlds.form(store, rank, generation)
        numbers = torch.full((100_000,), rank + 1.0, device=device)
        engine.all_reduce(numbers).wait()
        assert numbers.sum().item() == 100_000 * size * (size + 1) / 2
        engine.probe()
        engine.check()  # nobody is missing
        if generation % 2:
            meet(f"through {generation}")  # an abort would end the others' sum
            engine.abort()
        engine.close()
        if generation == WARM_UP:
            early = Holdings.of(os.getpid())
    results.send((early, Holdings.of(os.getpid())))
    meet("all")
    if rank == 0:
        time.sleep(0.2)  # the store is this process's: the others have to have met too


def hold_on_through(worlds: Worlds) -> list[tuple[Holdings, Holdings]]:
    """What each worker held after the first worlds and after the last."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in worlds.devices]
    workers = [
        context.Process(target=work, args=(worlds, rank, port, sender), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    try:
        for worker in workers:
            worker.start()
        for _, sender in pipes:
            sender.close()
        for receiver, _ in pipes:
            assert receiver.poll(500), "not within 500 s"
        return [receiver.recv() for receiver, _ in pipes]
    finally:
        for worker in workers:
            worker.join(5)
            worker.kill()
