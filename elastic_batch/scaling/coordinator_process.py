"""The coordinator as a process of this machine: started, and started again when it dies."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from elastic_batch.scaling.output import OutputLog, Show
from elastic_batch.scaling.processes import end_process, read_output, start_python
from elastic_batch.scaling.restarts import EXIT_IMPOSSIBLE, EXIT_STOPPED

_CODE = (
    "import os; from elastic_batch.scaling.lifeline import end_with_parent; end_with_parent(int(sys.argv.pop(1))); "
    "sys.argv[0] = 'elastic-batch'; from elastic_batch.cli.main import console; console()"
)
_LAST_WORDS = (0, EXIT_STOPPED, EXIT_IMPOSSIBLE)
"""Exit codes after which it is not started again."""
_MAX_STARTS_IN_A_ROW = 5
_FIRST_DELAY_SECONDS = 0.1
_GRACE_SECONDS = 5.0


class CoordinatorProcess:
    """Keeps a coordinator alive until the run is over.

    Args:
        arguments: Of `elastic-batch`, beginning with `coordinator`.
        show: Takes lines to show.
        log_dir: Where its output is kept.
    """

    def __init__(self, arguments: Sequence[str], show: Show, log_dir: Path) -> None:
        self._arguments = arguments
        self._show = show
        self._log = OutputLog("coordinator", show, log_dir / "coordinator.log")
        self._process: asyncio.subprocess.Process | None = None
        self._position = self._position_at_start = -1

    def progressed(self, position: int) -> None:
        """The job has committed so many samples."""
        self._position = position

    async def run(self) -> int:
        """Run it until the run is over or it fails for good; returns its exit code."""
        starts_in_a_row = 0
        while True:
            code = await self._run_once()
            if code in _LAST_WORDS:
                return code
            starts_in_a_row = 1 if self._position != self._position_at_start else starts_in_a_row + 1
            self._position_at_start = self._position
            if starts_in_a_row > _MAX_STARTS_IN_A_ROW:
                self._show(f"the coordinator ended {starts_in_a_row} times and nothing was trained meanwhile")
                return 1
            self._show(f"the coordinator ended with code {code}; starting it again, training goes on")
            await asyncio.sleep(_FIRST_DELAY_SECONDS * 2 ** (starts_in_a_row - 1))

    async def end(self) -> None:
        """End it, whatever it is at."""
        if self._process is not None:
            await end_process(self._process, _GRACE_SECONDS)

    def close(self) -> None:
        """Close its log."""
        self._log.close()

    async def _run_once(self) -> int:
        ours, theirs = os.pipe()
        try:
            self._process = await start_python(_CODE, [str(os.getpid()), *self._arguments], output=theirs)
        finally:
            os.close(theirs)
        await read_output(ours, self._log.take)
        self._log.end_line()
        return await self._process.wait()
