"""What lead workers write down, also for those that could not."""

from __future__ import annotations

from pathlib import Path

from support.jobs import IMAGES
from support.training import Plan, make_trainer, run

from elastic_batch.engines import FixedWorld, SoloEngine
from elastic_batch.rundir import read_run_ledger


def test_a_lead_that_missed_a_commit_of_the_others_writes_it_down_in_the_next_world(tmp_path: Path) -> None:
    plan = Plan(IMAGES, num_updates=3, options={"run_dir": tmp_path / "run"})
    with make_trainer(plan, FixedWorld(SoloEngine())) as trainer:
        run(trainer, plan)
        recorder, position = trainer._recorder, trainer.position
        recorder.committed_elsewhere(f"[[4, {position}, {position + 32}, 0], [5, {position + 32}, {position + 64}, 0]]")
        trainer._progress.position += 32  # the second one came to nothing: its world was lost
        recorder.enter(1, True, trainer._progress, is_new=False)
        assert read_run_ledger(tmp_path / "run").ranges == [(0, position + 32)]


def test_what_others_lack_is_told_them(tmp_path: Path) -> None:
    plan = Plan(IMAGES, num_updates=3, options={"run_dir": tmp_path / "run"})
    with make_trainer(plan, FixedWorld(SoloEngine())) as told, make_trainer(plan, FixedWorld(SoloEngine())) as teller:
        run(teller, plan)
        told._recorder.committed_elsewhere(teller._recorder.commits_after(0))
        everything = told._recorder.commits_after(0)
        assert everything == teller._recorder.commits_after(0)
        assert everything.count("[") == 1 + 3
        assert told._recorder.commits_after(teller.position) == "[]"
