"""Page faults of a process that allocates and frees as an update does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from elastic_batch.trainer.heap import keep_freed_memory

def update():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(2**20) for _ in range(8)]  # of 4 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory()
print(kept, [update() for _ in range(6)][-1])
"""


def run(**environment: str) -> tuple[bool, int]:
    """Whether memory is kept, and the page faults of a later update."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        (sys.executable, "-c", PROGRAM), env=given | environment, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="another C library")
def test_memory_that_an_update_frees_is_there_for_the_next_one() -> None:
    kept, faults = run()
    assert kept
    assert faults < 100


def test_what_the_environment_chooses_stays() -> None:
    assert run(MALLOC_MMAP_THRESHOLD_="65536")[0] is False
