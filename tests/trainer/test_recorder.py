"""What lead workers write down, also for those that could not."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import IMAGES
from support.training import Plan, make_trainer, run
from torch import nn
from torch.utils.data import TensorDataset

from elastic_batch.checkpoint import CheckpointStore
from elastic_batch.engines import Engine, FixedWorld, SoloEngine
from elastic_batch.errors import CheckpointNotSaved, InvalidSetting
from elastic_batch.rundir import read_run_ledger, read_summary
from elastic_batch.schedule import MilestoneSchedule
from elastic_batch.trainer import Trainer


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


def test_the_summary_compares_a_raised_schedule_with_plain_decay_from_where_nothing_is_raised(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    schedule = MilestoneSchedule.of(
        strategy="grow-batch",
        global_batch_size=8,
        max_duration="1ep",
        milestones=(),
        factor=2,
        raised={"learning_rate": 0.2},
        max_global_batch_size=16,
    )
    data = TensorDataset(torch.ones(64, 2), torch.ones(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Trainer(
        model, optimizer, data, schedule, micro_batch_size=8, loss_fn=_mse, run_dir=tmp_path / "run"
    ) as trainer:
        assert len(list(trainer)) == 4
    summary = read_summary(tmp_path / "run")
    assert (summary["updates"], summary["baseline_updates"]) == (4, 8)


def _mse(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def test_the_summary_has_every_evaluation_after_the_last_update(tmp_path: Path) -> None:
    plan = Plan(IMAGES, num_updates=2, options={"run_dir": tmp_path / "run"})
    with make_trainer(plan, FixedWorld(SoloEngine())) as trainer:
        trainer._recorder.enter(0, True, trainer._progress, is_new=True)
        lead = trainer._recorder.lead
        assert lead is not None
        for num_updates, metrics in ((1, {"old": 1.0}), (2, {"accuracy": 0.5}), (2, {"ema": 0.6})):
            lead.evaluation(metrics, 8 * num_updates, num_updates)
        lead.finish(None, 16, 2, "far enough")
    assert read_summary(tmp_path / "run")["metrics"] == {"accuracy": 0.5, "ema": 0.6}


def _fail_to_save(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Have the disk be full for the next so many checkpoints."""
    save, failures = CheckpointStore.save, iter(range(times))

    def save_or_fail(self: CheckpointStore, *args: Any, **named: Any) -> Any:
        if next(failures, None) is not None:
            raise OSError(28, "No space left on device")
        return save(self, *args, **named)

    monkeypatch.setattr(CheckpointStore, "save", save_or_fail)


def test_the_last_state_is_saved_at_the_second_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_to_save(monkeypatch, 1)
    plan = Plan(IMAGES, num_updates=3, options={"run_dir": tmp_path, "checkpoint_every": None})
    with make_trainer(plan, FixedWorld(SoloEngine())) as trainer:
        run(trainer, plan)
    (saved,) = CheckpointStore(tmp_path / "checkpoints").manifests()
    assert saved.update == 3


def test_a_run_whose_last_state_could_not_be_saved_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_to_save(monkeypatch, 99)
    plan = Plan(IMAGES, end=64, options={"run_dir": tmp_path})
    with make_trainer(plan, FixedWorld(SoloEngine())) as trainer, pytest.raises(CheckpointNotSaved, match="No space"):
        list(trainer)
    assert trainer.finished
    assert (read_summary(tmp_path)["finished"], read_summary(tmp_path)["reason"]) == (False, "the state was not saved")


def test_a_state_that_could_not_be_saved_is_said_with_the_checkpoint_that_the_run_was_resumed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_trainer(Plan(IMAGES, end=64, options={"run_dir": tmp_path}), FixedWorld(SoloEngine())) as trainer:
        list(trainer)
        name = trainer._recorder.last_checkpoint
    _fail_to_save(monkeypatch, 99)
    plan = Plan(IMAGES, end=128, options={"run_dir": tmp_path, "resume": "auto"})
    with make_trainer(plan, FixedWorld(SoloEngine())) as trainer, pytest.raises(CheckpointNotSaved) as caught:
        list(trainer)
    assert name is not None
    assert name in str(caught.value)


def test_a_setting_that_is_found_wrong_late_leaves_nothing_open(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = {"run_dir": tmp_path / "run", "checkpoint_every": "100tok", "metrics_port": port}
    trainer = make_trainer(Plan(IMAGES, options=options), FixedWorld(SoloEngine()))
    with pytest.raises(InvalidSetting, match="tokens_per_sample"):
        trainer.start()
    trainer.close()
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_the_summary_knows_what_came_before_this_worker_led(tmp_path: Path) -> None:
    plan = Plan(IMAGES, num_updates=3, options={"run_dir": tmp_path / "run"})
    with make_trainer(plan, FixedWorld(SoloEngine())) as trainer:
        run(trainer, plan)
        recorder, progress = trainer._recorder, trainer._progress
        assert recorder.lead is not None
        recorder.lead.evaluation({"accuracy": 0.5}, progress.position, 3)
        recorder.lead.evaluation({"accuracy": 0.9}, progress.position + 32, 4)  # of an update that was taken back
        recorder.enter(1, False, progress, is_new=False)
        recorder.enter(2, True, progress, is_new=False)
        recorder.lead.finish(None, progress.position, 3, "far enough")
    summary = read_summary(tmp_path / "run")
    assert (summary["metrics"], summary["world_size"]) == ({"accuracy": 0.5}, 1)


def test_a_lead_without_which_others_went_on_leaves_the_end_to_them(tmp_path: Path) -> None:
    plan = Plan(IMAGES, options={"run_dir": tmp_path})
    with make_trainer(plan, FixedWorld(SoloEngine())) as trainer:
        for _ in trainer:
            CheckpointStore(tmp_path / "checkpoints", generation=7).raise_fence()
            break
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("resume", ["never", "of another run"])
@pytest.mark.parametrize("comes", ["before", "after"])
def test_who_is_left_when_all_others_are_lost_goes_on_however_the_run_was_to_begin(
    comes: str, resume: str, tmp_path: Path
) -> None:
    def train(directory: str) -> None:
        plan = Plan(IMAGES, num_updates=3, options={"run_dir": tmp_path / directory})
        with make_trainer(plan, FixedWorld(SoloEngine())) as trainer:
            run(trainer, plan)

    class Standby(FixedWorld):
        is_elastic = True
        goes_on = comes == "after"

        def first(self, *given: Any) -> Engine:
            if comes == "before":
                train("run")
            return SoloEngine(9)

    if comes == "after":
        train("run")
    if resume != "never":
        other = Plan(IMAGES, num_updates=1, options={"run_dir": tmp_path / "other"})
        with make_trainer(other, FixedWorld(SoloEngine())) as trainer:
            run(trainer, other)
        resume = str(tmp_path / "other")
    plan = Plan(IMAGES, options={"run_dir": tmp_path / "run", "resume": resume})
    with make_trainer(plan, Standby(SoloEngine(9))) as trainer:
        trainer.start()
        assert trainer.num_updates == 3


def test_updates_that_are_skipped_one_after_the_other_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    plan = Plan(IMAGES, num_updates=12, owns_loop=True, options={"on_non_finite": "skip", "check_loss": False})
    with make_trainer(plan, FixedWorld(SoloEngine())) as trainer:
        for update in trainer.updates():
            for batch in update:
                update.backward(IMAGES.loss_fn(trainer.model, batch) * float("inf" if update.index else 1))
            update.step()
            if update.index == 12:
                break
    warnings = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert warnings == [
        "the last 10 updates were skipped, up to update 10: losses or gradients are not finite, or nothing in the "
        "batches counts"
    ]
