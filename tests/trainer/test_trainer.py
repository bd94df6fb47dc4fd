"""The loop: how a run ends, what evaluation gives, and which mistakes are caught."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import training
from support.jobs import END, NUM_SAMPLES, TOKENS, TokenModel
from support.reference import largest_difference
from support.training import Plan, make_trainer
from support.worlds import run_world

from elastic_batch import EMA, Trainer
from elastic_batch.checkpoint import CheckpointStore
from elastic_batch.engines import FixedWorld, SoloEngine
from elastic_batch.errors import (
    InvalidSetting,
    MisusedTrainer,
    NonFinite,
    RunDirectoryUsed,
    UnsavableState,
)
from elastic_batch.rundir import read_summary

_PLAN = Plan(TOKENS, num_updates=10)


def _trainer(**options: Any) -> Trainer:
    return make_trainer(Plan(TOKENS, owns_loop=True, options=options), FixedWorld(SoloEngine()))


def _losing_loop(trainer: Trainer) -> Iterator[Any]:
    for update in trainer.updates():
        for batch in update:
            loss, weight = TOKENS.loss_fn(trainer.model, batch)
            update.backward(loss, weight)
        update.step()
        yield update


def test_the_run_ends_at_the_schedule_s_end_with_every_sample_used() -> None:
    with _trainer() as trainer:
        updates = list(_losing_loop(trainer))
        assert trainer.finished
        assert trainer.position == END
        assert trainer.num_updates == len(updates) == 100
        assert trainer.stop_reason is None
        assert sum(update.ends_epoch for update in updates) == END // NUM_SAMPLES


def test_stop_on_one_worker_stops_all_after_the_same_update() -> None:
    results = run_world(3, training.stop_on_one_worker, _PLAN, 1, 7)
    assert {num_updates for num_updates, _ in results} == {8}
    assert [reason for _, reason in results] == ["another worker asked for it", "enough", "another worker asked for it"]


def test_a_run_that_was_stopped_can_go_on() -> None:
    with _trainer() as trainer:
        for update in _losing_loop(trainer):
            if update.index == 1:
                trainer.stop("a pause")
        assert trainer.num_updates == 3
        for update in _losing_loop(trainer):
            if update.index == 5:
                break
        assert trainer.num_updates == 6


def test_a_stop_that_was_asked_for_in_a_loop_that_was_left_is_not_forgotten() -> None:
    with _trainer() as trainer:
        for update in _losing_loop(trainer):
            if update.index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if update.index == 2:
                break  # such as a loop for each epoch: nobody was told of the stop
        list(_losing_loop(trainer))
        assert (trainer.num_updates, trainer.stop_reason) == (4, "SIGTERM")


def test_break_on_every_worker_hangs_nobody_and_evaluation_still_works() -> None:
    assert run_world(3, training.break_off, _PLAN, 5) == [5, 5, 5]


def test_evaluation_is_the_same_on_any_number_of_workers() -> None:
    alone = training.evaluate_tokens(SoloEngine(), _PLAN)
    assert alone["samples"] == pytest.approx(NUM_SAMPLES / math.ceil(NUM_SAMPLES / 7))
    for means in run_world(3, training.evaluate_tokens, _PLAN):
        assert means["loss"] == pytest.approx(alone["loss"], rel=1e-12)


def test_workers_without_samples_take_part_in_an_evaluation() -> None:
    alone = training.evaluate_few(SoloEngine(), _PLAN, 2)
    for means in run_world(3, training.evaluate_few, _PLAN, 2):
        assert means["loss"] == pytest.approx(alone["loss"], rel=1e-12)


def test_a_measure_that_fails_on_one_worker_fails_on_all() -> None:
    texts = run_world(3, training.evaluate_with_trouble, _PLAN, 2)
    pattern = r"the evaluation failed: worker 2: ValueError: no such measure \(.*/support/training\.py:\d+\)"
    assert re.fullmatch(pattern, texts[0])
    assert texts == [texts[0]] * 3


def test_an_evaluation_whose_collective_fails_is_repeated_in_the_next_world() -> None:
    expected = training.evaluate_tokens(SoloEngine(), _PLAN)
    for means, num_worlds in run_world(2, training.evaluate_through_a_failure, _PLAN):
        assert num_worlds == 2
        assert means["loss"] == pytest.approx(expected["loss"], rel=1e-12)


@pytest.mark.parametrize("size", [1, 2])
def test_a_world_that_breaks_in_an_evaluation_inside_an_update_has_the_update_come_again(size: int) -> None:
    plan = Plan(TOKENS, num_updates=6, owns_loop=True, options={"check_loss": False})
    expected = training.train(SoloEngine(), plan)
    for state, outcomes in run_world(size, training.evaluate_inside_an_update, plan):
        assert outcomes == [f"{index} {outcome}" for index in range(6) for outcome in ("repeated", "committed")]
        assert largest_difference(state, expected) < 1e-12


def test_a_world_may_break_in_an_evaluation_before_passes_have_a_width() -> None:
    options = {"num_workers": 1, "micro_batches_per_pass": 2}
    for means, _ in run_world(2, training.evaluate_through_a_failure, Plan(TOKENS, options=options)):
        assert means["loss"] > 0


def test_workers_that_differ_are_named() -> None:
    texts = run_world(3, training.disturb_one_worker, Plan(TOKENS, options={"check_every": 5}), 1)
    for text in texts:
        assert "after update 4 the parameters of worker 1 differ" in text


def test_rank_0_s_initial_weights_win() -> None:
    expected = training.train(SoloEngine(), _PLAN)
    for state in run_world(2, training.train_from_different_weights, _PLAN):
        assert largest_difference(state, expected) < 1e-12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_the_update_with_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with _trainer(run_dir=tmp_path / "run") as trainer:
        for update in _losing_loop(trainer):
            if update.index == 3:
                os.kill(os.getpid(), number)
        assert trainer.num_updates == 5
        assert trainer.stop_reason == number.name
    with _trainer(run_dir=tmp_path / "run", resume="auto") as trainer:
        trainer.start()
        assert trainer.num_updates == 5
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers


def test_a_loss_that_is_not_finite_stops_the_run_and_names_update_and_checkpoint(tmp_path: Path) -> None:
    with _trainer(run_dir=tmp_path / "run", checkpoint_every="100sp", check_loss=False) as trainer:
        before: dict[str, torch.Tensor] = {}

        def train_into_the_error() -> None:
            for update in trainer.updates():
                before.update({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
                for batch in update:
                    loss, weight = TOKENS.loss_fn(trainer.model, batch)
                    update.backward(loss * (math.nan if update.index == 14 else 1), weight)
                update.step()

        with pytest.raises(NonFinite, match=r"the loss of update 14 .* last good checkpoint is 0*224-g0-") as raised:
            train_into_the_error()
        assert largest_difference(trainer.model.state_dict(), before) == 0
    assert raised.value.checkpoint == CheckpointStore(tmp_path / "run" / "checkpoints").manifests()[0].name
    assert read_summary(tmp_path / "run")["reason"] == "an error"


def test_fp16_gradients_that_are_never_finite_stop_the_run() -> None:
    with _trainer(precision="fp16", check_loss=False) as trainer:
        next(iter(trainer.model.parameters())).register_hook(lambda gradient: gradient * math.inf)
        with pytest.raises(NonFinite, match=r"the gradient of update \d+ is not finite"):
            list(_losing_loop(trainer))


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (math.nan, NonFinite, "the weight of update 0 is not finite.*Look at what is given as weight"),
        (math.inf, NonFinite, "the weight of update 0 is not finite"),
        (-1.0, MisusedTrainer, "the weights of update 0 sum to -4"),
    ],
)
def test_weights_that_count_nothing_stop_the_run(weight: float, error: type[Exception], message: str) -> None:
    with _trainer(check_loss=False) as trainer:
        update = next(trainer.updates())
        for batch in update:
            update.backward(TOKENS.loss_fn(trainer.model, batch)[0], weight)
        with pytest.raises(error, match=message):
            update.step()


def test_updates_that_are_not_finite_can_be_skipped() -> None:
    with _trainer(on_non_finite="skip", check_loss=False) as trainer:
        skipped = []
        for update in trainer.updates():
            for batch in update:
                loss, weight = TOKENS.loss_fn(trainer.model, batch)
                update.backward(loss * (math.inf if update.index == 2 else 1), weight)
            assert update.step()
            skipped.append(update.was_skipped)
            if update.index == 4:
                break
        assert skipped == [False, False, True, False, False]
        assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_no_checkpoint_is_made_of_a_half_applied_update(tmp_path: Path) -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.param_groups[0]["params"][0].data.add_(1)
            raise MemoryError("no memory for the velocity")

    model = TokenModel(torch.float64)
    dataset = TOKENS.dataset(torch.float64)
    trainer = Trainer(
        model, Failing(model.parameters(), lr=0.1), dataset, training.SCHEDULE, micro_batch_size=4, run_dir=tmp_path
    )
    with trainer, pytest.raises(MemoryError):
        list(_losing_loop(trainer))
    assert not list((tmp_path / "checkpoints").glob("*.json"))


def test_a_state_that_cannot_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    class Tracker:
        def state_dict(self) -> dict[str, Any]:
            return {"best": np.zeros(1)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    with _trainer(run_dir=tmp_path) as trainer, pytest.raises(UnsavableState, match=r"\['tracker'\]\['best'\]"):
        trainer.attach(tracker=Tracker())


def test_a_state_for_which_a_later_script_has_no_object_stays_with_the_run(tmp_path: Path) -> None:
    class Count:
        value = 0

        def after_update(self, num_samples: int) -> None:
            self.value += 1

        def state_dict(self) -> dict[str, Any]:
            return {"value": np.int64(self.value)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]

    counts = [Count(), None, Count()]
    for number, count in enumerate(counts):
        with _trainer(run_dir=tmp_path, resume="auto" if number else "never") as trainer:
            if count is not None:
                trainer.attach(count=count)
            next(_losing_loop(trainer))
    assert [count and count.value for count in counts] == [1, None, 2]


def test_a_tracker_that_fails_ends_nothing(tmp_path: Path) -> None:
    class Down:
        def log(self, record: Mapping[str, Any]) -> None:
            raise OSError("the tracker is down")

        def close(self) -> None:
            raise OSError("the tracker is down")

    with _trainer(run_dir=tmp_path, loggers=[Down()]) as trainer:
        list(_losing_loop(trainer))
        assert trainer.finished


def test_a_state_is_whole_though_its_record_could_not_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no room")

    with _trainer(run_dir=tmp_path) as trainer:
        loop = _losing_loop(trainer)
        next(loop)
        monkeypatch.setattr(trainer._recorder, "update", fail)
        with pytest.raises(OSError, match="no room"):
            next(loop)
    (manifest,) = CheckpointStore(tmp_path / "checkpoints").manifests()
    assert manifest.update == 2


def test_a_metrics_port_that_an_earlier_lead_still_has_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_batch.trainer.outlets._PORT_SECONDS", 0.0)
    with _trainer(run_dir=tmp_path) as trainer:
        next(_losing_loop(trainer))
    with socket.create_server(("127.0.0.1", 0)) as earlier:
        port = earlier.getsockname()[1]
        fresh = _trainer(run_dir=tmp_path / "other", metrics_port=port)
        with fresh as trainer, pytest.raises(InvalidSetting, match="metrics_port"):
            trainer.start()
        with _trainer(run_dir=tmp_path, resume="auto", metrics_port=port) as trainer:
            loop = _losing_loop(trainer)
            next(loop)
            earlier.close()
            next(loop)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
                assert b"elastic_batch_updates_total" in reply.read()


def test_attached_objects_are_saved_and_restored(tmp_path: Path) -> None:
    with _trainer(run_dir=tmp_path / "run") as trainer:
        ema = EMA(trainer.model, horizon=200)
        trainer.attach(ema=ema)
        for update in _losing_loop(trainer):
            if update.index == 5:
                trainer.stop("for now")
        average = ema.state_dict()
        assert largest_difference(average, trainer.model.state_dict()) > 1e-6
    with _trainer(run_dir=tmp_path / "run", resume="auto") as trainer:
        late = EMA(trainer.model, horizon=200)
        trainer.start()
        trainer.attach(ema=late)
        assert largest_difference(late.state_dict(), average) == 0


@pytest.mark.parametrize("before", [True, False])
def test_the_measurement_of_noise_may_be_switched_between_starts(before: bool, tmp_path: Path) -> None:
    for measures, resume in ((before, "never"), (not before, "auto")):
        with _trainer(run_dir=tmp_path / "run", measure_noise=measures, resume=resume) as trainer:
            trainer.stop("for now")
            list(_losing_loop(trainer))
            assert trainer.num_updates == (1 if resume == "never" else 2)


def test_a_used_run_directory_is_refused_unless_resumed(tmp_path: Path) -> None:
    with _trainer(run_dir=tmp_path) as trainer:
        next(_losing_loop(trainer))
    with _trainer(run_dir=tmp_path) as trainer, pytest.raises(RunDirectoryUsed) as refusal:
        next(trainer.updates())
    assert refusal.value.directory == str(tmp_path)


def test_another_run_s_checkpoints_are_not_written_over(tmp_path: Path) -> None:
    for directory, refused in (("a", nullcontext()), ("b", pytest.raises(RunDirectoryUsed, match="common"))):
        with _trainer(run_dir=tmp_path / directory, checkpoint_location=tmp_path / "common") as trainer, refused:
            next(_losing_loop(trainer))


def test_the_log_names_the_port_that_metrics_are_served_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "elastic_batch"), _trainer(metrics_port=0) as trainer:
        trainer.start()
    (address,) = [record.getMessage() for record in caplog.records if "metrics are served" in record.getMessage()]
    assert re.fullmatch(r"metrics are served at http://127\.0\.0\.1:\d+/metrics", address)
