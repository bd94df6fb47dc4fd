"""Worlds of real processes for tests: forked from one warm process, connected by gloo, each bounded in time."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from elastic_batch.engines import DistributedEngine, Engine, Formation

_context = multiprocessing.get_context("forkserver")
# Names that resolve without this process's sys.path, which the server does not get; it skips silently what it cannot
# import.
_context.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "torch.distributed",
        "torch.utils.data",
        "elastic_batch.trainer",
        "elastic_batch.worker",
        "sklearn.datasets",
    ]
)


def warm_context() -> ForkServerContext:
    """Starts processes by forking one that has imported everything."""
    return _context


class WorldFailed(AssertionError):
    """A worker raised; the message has its traceback."""


Connect = Callable[[int, int, str], Engine]
"""Of (rank, size, folder): the engine of a worker of a world that meets in a folder."""


def run_world(
    size: int, work: Callable[..., Any], *args: Any, timeout_seconds: float = 60, connect: Connect | None = None
) -> list[Any]:
    """Call `work(engine, *args)` in `size` processes and return what each returned, by rank.

    `work` must be importable (defined in `support`) and its result picklable. All processes are gone at the end.
    Without `connect` the world is one of a fixed size.

    Raises:
        WorldFailed: One of them raised, died, or the time ran out.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_main, args=(theirs, rank, size, folder, connect or join_fixed, work, args), daemon=False
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, timeout_seconds)
        finally:
            for process in processes:
                process.join(0.5)
                if process.is_alive():
                    process.kill()
                    process.join()
                process.close()


def _collect(pipes: list[Connection], timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    open_pipes = dict(enumerate(pipes))
    while open_pipes:
        ready = wait(list(open_pipes.values()), timeout_seconds)
        if not ready:
            raise WorldFailed(f"workers {sorted(open_pipes)} did not end within {timeout_seconds} s")
        for rank, pipe in list(open_pipes.items()):
            if pipe not in ready:
                continue
            del open_pipes[rank]
            try:
                succeeded, value = pipe.recv()
                value = pickle.loads(value) if succeeded else value
            except EOFError:
                succeeded, value = False, "died without a word"
            (results if succeeded else failures)[rank] = value
            pipe.close()
    if failures:
        raise WorldFailed("\n".join(f"worker {rank}: {text}" for rank, text in sorted(failures.items())))
    return [results[rank] for rank in range(len(pipes))]


def _main(
    pipe: Connection,
    rank: int,
    size: int,
    folder: str,
    connect: Connect,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    engine = connect(rank, size, folder)
    try:
        # Pickled here: the pipe's own way shares tensors' memory, which would be gone with this process.
        pipe.send((True, pickle.dumps(work(engine, *args))))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
    # Without the interpreter's shutdown, in which process groups wait for peers that may be gone.
    os._exit(0)


def form_elastic(rank: int, size: int, folder: str) -> Engine:
    """Form a gloo world as elastic workers do, on a store in a folder."""
    return DistributedEngine.form(
        FileStore(os.path.join(folder, "store"), size),
        Formation(),
        rank=rank,
        size=size,
        generation=0,
        device=torch.device("cpu"),
        address="127.0.0.1",
        forming_timeout=timedelta(seconds=20),
    )


def join_fixed(rank: int, size: int, folder: str) -> Engine:
    """Join a gloo world of a fixed size that meets in a folder."""
    store = FileStore(os.path.join(folder, "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
    return DistributedEngine.join(None, torch.device("cpu"))
