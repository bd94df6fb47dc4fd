"""Processes that hold a run directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOLDER = """
import os, sys
from pathlib import Path
from elastic_batch.rundir import Hold
held = Hold(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    os.read(int(sys.argv[2]), 1)
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def other_process(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a directory, and has a child, which ends with the block."""
    end, held_open = os.pipe()
    try:
        with subprocess.Popen(
            [sys.executable, "-c", _HOLDER, str(directory), str(end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[end],
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
            process.kill()
            os.close(held_open)
            held_open = -1
    finally:
        os.close(end)
        if held_open >= 0:
            os.close(held_open)
