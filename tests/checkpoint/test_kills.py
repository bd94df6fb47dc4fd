"""SIGKILL at every moment of writing a checkpoint; see kill_trial.py for what is checked after each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_a_writer_killed_at_any_moment_leaves_the_newest_acknowledged_checkpoint_and_a_run_that_goes_on(
    tmp_path: Path,
) -> None:
    trial = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_trial.py")), str(tmp_path), "15"],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert trial.returncode == 0, trial.stderr
    counts = json.loads(trial.stdout)
    assert counts["moments"] >= 100
    assert counts["background_moments"] >= 25
    assert counts["timed"] >= 10
