"""Starting other Python processes of this package, in sessions of their own, ended when this one ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO

_PRELUDE = "import sys, json; sys.path[:] = json.loads(sys.argv.pop(1)); "


async def start_python(
    code: str,
    arguments: Sequence[str] = (),
    *,
    environ: Mapping[str, str] | None = None,
    output: IO[bytes] | int | None = None,
    keep: Sequence[int] = (),
) -> asyncio.subprocess.Process:
    """Start an interpreter that finds the same modules as this one. Ctrl-C in the terminal does not reach it.

    Args:
        code: What it runs.
        arguments: Its `sys.argv[1:]`.
        environ: Its environment; None: this one's.
        output: Where both its outputs go; None: to this process's.
        keep: File descriptors that it inherits.
    """
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _PRELUDE + code,
        json.dumps(sys.path),
        *arguments,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        env=environ,
        pass_fds=keep,
        start_new_session=True,
    )


async def end_process(process: asyncio.subprocess.Process, grace_seconds: float) -> None:
    """Ask a process to end, and kill it if it takes too long."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        process.send_signal(number)
        try:
            await asyncio.wait_for(process.wait(), grace_seconds)
        except TimeoutError:
            continue


async def read_output(descriptor: int, take: Callable[[bytes], None]) -> None:
    """Hand what comes through a pipe to `take` until its other ends are closed; closes the descriptor."""
    reader = asyncio.StreamReader()
    pipe = os.fdopen(descriptor, "rb", buffering=0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    try:
        while data := await reader.read(1 << 16):
            take(data)
    finally:
        transport.close()
