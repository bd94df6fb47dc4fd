"""The world that a launcher describes in the environment: torchrun's variables, or those of a Slurm step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_FIRST_PORT, _NUM_PORTS = 20_000, 12_000
"""Below the range from which systems hand out ports of their own."""


@dataclass(frozen=True, slots=True)
class LaunchedWorld:
    """This process's place among the processes that were started together.

    Args:
        rank: In [0, size).
        size: Number of processes.
        init_method: Where they meet, as torch.distributed understands it.
        attempt: How often the launcher had started these processes before, if they are all on this host: torchrun's
            agents on several hosts each have a count of their own.
    """

    rank: int
    size: int
    init_method: str
    attempt: int = 0


def launched_world(environ: Mapping[str, str]) -> LaunchedWorld | None:
    """The world that this process was started in; None if it was started alone.

    Inside a Slurm allocation only processes that `srun` started count: a script that runs `python` directly is alone,
    though Slurm describes the whole allocation to it.

    >>> launched_world({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    LaunchedWorld(rank=1, size=4, init_method='env://', attempt=0)
    >>> launched_world({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
    ...                 "SLURM_STEP_NODELIST": "gpu[03-04,9]"})
    LaunchedWorld(rank=3, size=8, init_method='tcp://gpu03:20007', attempt=0)
    >>> launched_world({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is launched_world({}) is None
    True
    """
    if int(environ.get("WORLD_SIZE", "1")) > 1:
        is_one_host = environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"]
        attempt = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if is_one_host else 0
        return LaunchedWorld(int(environ["RANK"]), int(environ["WORLD_SIZE"]), "env://", attempt)
    if "RANK" not in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        host = environ.get("MASTER_ADDR") or _first_host(environ["SLURM_STEP_NODELIST"])
        number = int(environ["SLURM_JOB_ID"]) + 101 * int(environ["SLURM_STEP_ID"])
        port = environ.get("MASTER_PORT") or _FIRST_PORT + number % _NUM_PORTS
        return LaunchedWorld(int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"]), f"tcp://{host}:{port}")
    return None


def _first_host(nodes: str) -> str:
    """The first name of a Slurm list of nodes, where Slurm puts rank 0.

    >>> [_first_host(nodes) for nodes in ("a1", "a1,b2", "gpu[03-04,9]", "rack[1-2]n[5-6],c", "n[7]-ib")]
    ['a1', 'a1', 'gpu03', 'rack1n5', 'n7-ib']
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else nodes)
