"""The world that a launcher describes in the environment: torchrun's variables, or those of a Slurm step.

Nothing here imports torch: the command line asks before it loads that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from elastic_batch.errors import InvalidSetting

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

    Raises:
        InvalidSetting: A variable is missing, or is no whole number.
    """
    size = launched_size(environ)
    rank = _read(environ, "RANK", default=None if size > 1 else 0)
    if rank >= size:
        remedy = "torchrun sets both; unset what is left of its variables to train on one worker"
        raise InvalidSetting("RANK", rank, f"must be below WORLD_SIZE, {size}", remedy)
    if size > 1:
        is_one_host = environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"]
        attempt = _read(environ, "TORCHELASTIC_RESTART_COUNT", default=0) if is_one_host else 0
        return LaunchedWorld(rank, size, "env://", attempt)
    if "RANK" not in environ and (size := _read(environ, "SLURM_STEP_NUM_TASKS", default=1)) > 1:
        host = environ.get("MASTER_ADDR") or _first_host(environ["SLURM_STEP_NODELIST"])
        number = _read(environ, "SLURM_JOB_ID") + 101 * _read(environ, "SLURM_STEP_ID")
        port = environ.get("MASTER_PORT") or _FIRST_PORT + number % _NUM_PORTS
        return LaunchedWorld(_read(environ, "SLURM_PROCID"), size, f"tcp://{host}:{port}")
    return None


def launched_size(environ: Mapping[str, str]) -> int:
    """How many processes torchrun has started; 1 without it.

    Raises:
        InvalidSetting: The variable is no whole number.
    """
    return _read(environ, "WORLD_SIZE", default=1)


def launched_rank(environ: Mapping[str, str]) -> int:
    """This process's rank as the launcher says it; 0 without one.

    Raises:
        InvalidSetting: The variable is no whole number.
    """
    return _read(environ, "RANK" if "RANK" in environ else "SLURM_PROCID", default=0)


def launched_local_rank(environ: Mapping[str, str]) -> int:
    """The same among the processes of this host.

    Raises:
        InvalidSetting: The variable is no whole number.
    """
    return _read(environ, "LOCAL_RANK" if "LOCAL_RANK" in environ else "SLURM_LOCALID", default=0)


def _read(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, None if default is None else str(default))
    if text is None or not text.isdecimal():
        launcher = "srun" if name.startswith("SLURM") else "torchrun"
        remedy = f"{launcher} sets it; unset what is left of its variables to train on one worker"
        raise InvalidSetting(name, text, "must be a whole number", remedy)
    return int(text)


def _first_host(nodes: str) -> str:
    """The first name of a Slurm list of nodes, where Slurm puts rank 0.

    >>> [_first_host(nodes) for nodes in ("a1", "a1,b2", "gpu[03-04,9]", "rack[1-2]n[5-6],c", "n[7]-ib")]
    ['a1', 'a1', 'gpu03', 'rack1n5', 'n7-ib']
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else nodes)
