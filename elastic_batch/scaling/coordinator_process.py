"""The coordinator as a process of this machine: started, and started again when it dies."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from elastic_batch.scaling.output import OutputLog, Show
from elastic_batch.scaling.processes import end_process, read_output, start_python
from elastic_batch.scaling.restarts import EXIT_IMPOSSIBLE, EXIT_STOPPED, growing_delay

_CODE = (
    "import os; from elastic_batch.scaling.lifeline import end_with_parent; end_with_parent(int(sys.argv.pop(1))); "
    "sys.argv[0] = 'elastic-batch'; from elastic_batch.cli.main import console; console()"
)
_LAST_WORDS = (0, EXIT_STOPPED, EXIT_IMPOSSIBLE)
"""Exit codes after which it is not started again."""
_MAX_STARTS_IN_A_ROW = 5
_LONGEST_DELAY_SECONDS = 30.0
_SILENT_SECONDS = 30.0
"""A living coordinator that has answered and then does not for so long hangs."""
_GRACE_SECONDS = 5.0


class CoordinatorProcess:
    """Keeps a coordinator alive until the run is over.

    Args:
        arguments: Of `elastic-batch`, beginning with `coordinator`.
        show: Takes lines to show.
        log_dir: Where its output is kept.
        is_needed: Whether workers train, who do so without it too: then it is never given up.
    """

    def __init__(self, arguments: Sequence[str], show: Show, log_dir: Path, is_needed: Callable[[], bool]) -> None:
        self._arguments = arguments
        self._show = show
        self._is_needed = is_needed
        self._log = OutputLog("coordinator", show, log_dir / "coordinator.log")
        self._process: asyncio.subprocess.Process | None = None
        self._position = self._position_at_start = -1
        self._answered_at: float | None = None

    def answered(self, position: int) -> None:
        """It answered, and says that the job has committed so many samples."""
        self._position, self._answered_at = position, asyncio.get_running_loop().time()

    def unanswered(self) -> None:
        """It did not answer; if it hangs it is killed, and so started again."""
        if self._process is None or self._process.returncode is not None or self._answered_at is None:
            return
        if asyncio.get_running_loop().time() - self._answered_at > _SILENT_SECONDS:
            self._show(f"the coordinator has not answered for {_SILENT_SECONDS:.0f} s and is killed")
            self._process.kill()

    async def run(self) -> int:
        """Run it until the run is over or it fails for good; returns its exit code."""
        starts_in_a_row = 0
        while True:
            try:
                code = await self._run_once()
            except OSError as error:  # no process, no descriptor is left
                how = f"cannot be started now ({error})"
            else:
                if code in _LAST_WORDS:
                    return code
                how = f"ended with code {code}"
            starts_in_a_row = 1 if self._position != self._position_at_start else starts_in_a_row + 1
            self._position_at_start = self._position
            # What is trained while it is down nobody says; but the workers that trained live.
            if starts_in_a_row > _MAX_STARTS_IN_A_ROW and not self._is_needed():
                self._show(f"the coordinator {how}, as often before, and nothing was trained meanwhile")
                return 1
            self._show(f"the coordinator {how}; starting it again, training goes on")
            await asyncio.sleep(min(_LONGEST_DELAY_SECONDS, growing_delay(starts_in_a_row)))

    async def end(self) -> None:
        """End it, whatever it is at."""
        if self._process is not None:
            await end_process(self._process, _GRACE_SECONDS)

    def close(self) -> None:
        """Close its log."""
        self._log.close()

    async def _run_once(self) -> int:
        self._answered_at = None
        ours, theirs = os.pipe()
        try:
            self._process = await start_python(_CODE, [str(os.getpid()), *self._arguments], output=theirs)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        await read_output(ours, self._log.take)
        self._log.end_line()
        return await self._process.wait()
