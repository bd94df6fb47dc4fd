"""What this machine has for workers: GPUs and cores; how many workers a command line asks for."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic_batch.errors import InvalidSetting

_GPUS = "CUDA_VISIBLE_DEVICES"
_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True)
class WorkerRange:
    """How many workers a job may have.

    Args:
        minimum: It starts with at least so many; at least 1.
        maximum: It never has more.
    """

    minimum: int
    maximum: int

    @classmethod
    def parse(cls, text: str) -> WorkerRange:
        """Read `MIN:MAX`, or `N` for exactly so many.

        Raises:
            InvalidSetting: It is neither.

        >>> WorkerRange.parse("1:4"), WorkerRange.parse("2")
        (WorkerRange(minimum=1, maximum=4), WorkerRange(minimum=2, maximum=2))
        """
        found = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
        if found is None:
            raise InvalidSetting("--workers", text, "must be MIN:MAX or N, as in 1:4")
        minimum, maximum = int(found[1]), int(found[2] or found[1])
        if minimum < 1:
            raise InvalidSetting("--workers", text, "must be at least 1")
        if minimum > maximum:
            raise InvalidSetting("--workers", text, "must be MIN:MAX, with MIN not above MAX")
        return cls(minimum, maximum)


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that processes of this user may take, as `CUDA_VISIBLE_DEVICES` names them; CUDA is not touched.

    Args:
        environ: Where `CUDA_VISIBLE_DEVICES` is read; without it the driver's tool is asked.
    """
    chosen = environ.get(_GPUS)
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    try:
        asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = asked.stdout.splitlines() if asked.returncode == 0 else []
    return [str(index) for index, _ in enumerate(line for line in lines if line.startswith("GPU "))]


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_gpu_each(num_workers: int, gpus: Sequence[str], setting: str) -> None:
    """Refuse more workers than GPUs, where there are any.

    Raises:
        InvalidSetting: Two workers would share a GPU.
    """
    if gpus and num_workers > len(gpus):
        raise InvalidSetting(
            setting,
            num_workers,
            f"must be at most {len(gpus)}, the number of GPUs that are visible: each worker has one of its own",
            f"Ask for fewer, or train on the CPU with {_GPUS}=''",
        )


def worker_settings(index: int, gpus: Sequence[str]) -> dict[str, str]:
    """What a worker's environment has of its own.

    Args:
        index: The worker's number on this machine, from 0.
        gpus: See `visible_gpus`.
    """
    return {_GPUS: gpus[index]} if gpus else {}


def shared_settings(environ: Mapping[str, str], num_workers: int) -> dict[str, str]:
    """What the environment of all workers has besides `environ`: the cores are divided, unless the user did that."""
    return {} if _THREADS in environ else {_THREADS: str(max(1, num_cores() // num_workers))}
