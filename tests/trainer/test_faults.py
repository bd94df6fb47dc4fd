"""An update is a transaction: whatever fails, on whomever, nothing has changed and the repeated update is equal."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support.engines import FailingEngine, RecoveringMembership
from support.jobs import FIRST_BATCH, IMAGES, TOKENS
from support.reference import largest_difference
from support.training import (
    Plan,
    ScriptedTrouble,
    count_collectives,
    evaluate_after_a_break,
    make_trainer,
    run,
    train,
    train_through_failures,
    train_with_trouble,
    troubled,
)
from support.worlds import run_world

from elastic_batch.engines import FixedWorld, SoloEngine
from elastic_batch.errors import WorkerFailed

_SHORT = Plan(IMAGES, num_updates=4, options={"check_loss": False, "check_every": 2})
_MICRO_BATCHES = 4 * 4


def _assert_equal(state: dict[str, Any], expected: dict[str, Any]) -> None:
    assert largest_difference(state, expected) == 0


@pytest.mark.parametrize("at", ["launch", "wait"])
def test_a_failure_of_any_collective_leaves_no_trace(at: str) -> None:
    before, in_all, expected = count_collectives(SoloEngine(), _SHORT)
    assert in_all - before >= 4
    for state in train_through_failures(SoloEngine(), _SHORT, list(range(before, in_all)), at):
        _assert_equal(state, expected)


def test_a_failure_of_any_collective_leaves_no_trace_on_two_workers() -> None:
    undisturbed = run_world(2, count_collectives, _SHORT)
    before, in_all, _ = undisturbed[0]
    assert in_all - before >= 2 * 4
    numbers = list(range(before, in_all))
    results = run_world(2, train_through_failures, _SHORT, numbers, "wait", timeout_seconds=100)
    for states, (_, _, expected) in zip(results, undisturbed, strict=True):
        for state in states:
            _assert_equal(state, expected)


@pytest.mark.parametrize("broken_at", [1, 3])
def test_a_worker_that_got_an_update_from_the_others_evaluates_alone_until_the_next(broken_at: int) -> None:
    options = {"check_loss": False, "check_every": 1}
    plan = Plan(TOKENS, owns_loop=True, options=options, end=4 * FIRST_BATCH)
    expected, state = evaluate_after_a_break(SoloEngine(), plan, None)
    assert len(expected) == 2 * 3 + 1
    for found, end in run_world(2, evaluate_after_a_break, plan, broken_at):
        assert found == pytest.approx(expected, rel=1e-12)
        assert largest_difference(end, state) < 1e-12


@pytest.mark.parametrize("where", ["data", "loss", "backward"])
def test_a_passing_error_at_any_micro_batch_leaves_no_trace(where: str) -> None:
    expected = train(SoloEngine(), _SHORT)
    calls_each = 4 if where == "data" else 1
    for number in range(_MICRO_BATCHES):
        error = torch.OutOfMemoryError("scripted") if number % 2 else ValueError("scripted")
        at = frozenset({number * calls_each})
        raised, state = train_with_trouble(SoloEngine(), _SHORT, where, error, at, 0)
        assert raised == ""
        _assert_equal(state, expected)


def test_nothing_has_changed_between_the_failure_and_the_repetition() -> None:
    job = troubled(IMAGES, ScriptedTrouble(ValueError("scripted"), frozenset({13})), "data")
    with make_trainer(Plan(job, owns_loop=True, options={"check_loss": False}), FixedWorld(SoloEngine())) as trainer:
        for update in trainer.updates():
            before = (random.getstate(), torch.get_rng_state(), trainer.position, _copy(trainer.model.state_dict()))
            for batch in update:
                update.backward(IMAGES.loss_fn(trainer.model, batch))
            committed = update.step()
            after = (random.getstate(), torch.get_rng_state(), trainer.position, _copy(trainer.model.state_dict()))
            assert after[0] == before[0]
            assert torch.equal(after[1], before[1])
            if not committed:
                assert after[2] == before[2]
                _assert_equal(after[3], before[3])
                return
    pytest.fail("the scripted error did not show")


def test_nobody_computes_on_for_a_world_that_is_over() -> None:
    engine = FailingEngine(SoloEngine(), None)
    plan = Plan(IMAGES, num_updates=4, owns_loop=True, options={"check_loss": False})
    num_batches = []
    with make_trainer(plan, RecoveringMembership(engine)) as trainer:
        for update in trainer.updates():
            num_batches.append(0)
            for batch in update:
                num_batches[-1] += 1
                update.backward(IMAGES.loss_fn(trainer.model, batch))
                if len(num_batches) == 2:
                    engine.abort()
            if update.step() and trainer.num_updates == plan.num_updates:
                break
        state = _copy(trainer.model.state_dict())
    assert num_batches == [4, 1, 4, 4, 4]
    with make_trainer(plan, FixedWorld(SoloEngine())) as undisturbed:
        run(undisturbed, plan)
        _assert_equal(state, undisturbed.model.state_dict())


def _copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("where", ["data", "loss", "backward"])
def test_an_error_that_recurs_stops_every_worker_with_that_worker_s_error(where: str) -> None:
    at = frozenset(range(20, 10_000))
    results = run_world(3, train_with_trouble, Plan(TOKENS, 40), where, ValueError("no such sample"), at, 1)
    for raised, state in results:
        assert "worker 1: " in raised
        assert "no such sample" in raised
        assert largest_difference(state, results[0][1]) == 0


def test_no_memory_even_for_one_micro_batch_says_what_to_do() -> None:
    job = troubled(IMAGES, ScriptedTrouble(torch.OutOfMemoryError("2 GiB"), frozenset(range(3, 99))), "loss")
    with (
        make_trainer(Plan(job), FixedWorld(SoloEngine())) as trainer,
        pytest.raises(WorkerFailed, match="single micro-batch in a pass; lower micro_batch_size"),
    ):
        run(trainer, Plan(job))


def test_out_of_memory_in_a_wide_pass_goes_on_with_single_micro_batches() -> None:
    plan = Plan(IMAGES, num_updates=4, options={"micro_batches_per_pass": 4})
    job = troubled(IMAGES, ScriptedTrouble(torch.OutOfMemoryError("scripted"), frozenset({5})), "loss")
    expected = train(SoloEngine(), Plan(IMAGES, num_updates=4))
    with make_trainer(Plan(job, options=plan.options), FixedWorld(SoloEngine())) as trainer:
        state = run(trainer, plan)
    assert largest_difference(state, expected) < 1e-12
