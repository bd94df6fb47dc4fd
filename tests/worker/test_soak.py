"""Every fault at every stage at least three times, 300 in all: `make soak`, which goes on where it was interrupted."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from support.soak import NUM_FAULTS, Soak, table

ROOT = Path(__file__).parents[2]
MINUTES = float(os.environ.get("ELASTIC_BATCH_SOAK_MINUTES", "25"))


@pytest.mark.soak
@pytest.mark.timeout(60 * (MINUTES + 5))
def test_every_fault_at_every_stage_changes_nothing() -> None:
    soak = Soak(ROOT / "runs" / "soak")
    is_done = soak.run(time.monotonic() + 60 * MINUTES)
    if not is_done:
        found = f"{len(soak.recoveries)} of {NUM_FAULTS} faults in {MINUTES:g} minutes"
        pytest.skip(f"{found}, all survived; `make soak` goes on from here")
    results = ROOT / "docs" / "results"
    (results / "elastic-faults.md").write_text(table(soak))
    (results / "elastic-faults.json").write_text(json.dumps(soak.trials, indent=1) + "\n")
    assert len(soak.recoveries) >= NUM_FAULTS
