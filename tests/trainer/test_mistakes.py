"""Mistakes in a user's script: each gets one clear error, and leaves the other workers no riddle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import training
from support.jobs import IMAGES, TOKENS, TokenModel, sgd
from support.training import Plan, make_trainer
from support.worlds import run_world
from torch import nn
from torch.nn.parallel import DataParallel
from torch.utils.data import IterableDataset

from elastic_batch import Trainer
from elastic_batch.engines import FixedWorld, SoloEngine
from elastic_batch.errors import InvalidSetting, MisusedTrainer, UnknownName

_PLAN = Plan(TOKENS, num_updates=10)


def _trainer(**options: Any) -> Trainer:
    return make_trainer(Plan(TOKENS, owns_loop=True, options=options), FixedWorld(SoloEngine()))


def _answer(update: Any, trainer: Trainer) -> None:
    for batch in update:
        update.backward(*TOKENS.loss_fn(trainer.model, batch))


def _direct_backward(trainer: Trainer) -> None:
    for update in trainer.updates():
        for batch in update:
            TOKENS.loss_fn(trainer.model, batch)[0].backward()


def _cleared_gradients(trainer: Trainer) -> None:
    for update in trainer.updates():
        for batch in update:
            update.backward(*TOKENS.loss_fn(trainer.model, batch))
        trainer.model.zero_grad()
        update.step()


def _no_step(trainer: Trainer) -> None:
    for update in trainer.updates():
        for batch in update:
            update.backward(*TOKENS.loss_fn(trainer.model, batch))


def _two_steps(trainer: Trainer) -> None:
    for update in trainer.updates():
        for batch in update:
            update.backward(*TOKENS.loss_fn(trainer.model, batch))
        update.step()
        update.step()


def _no_backward(trainer: Trainer) -> None:
    for update in trainer.updates():
        for batch in update:
            TOKENS.loss_fn(trainer.model, batch)
        update.step()


def _twice_over_the_batches(trainer: Trainer) -> None:
    for update in trainer.updates():
        for _ in range(2):
            for batch in update:
                update.backward(*TOKENS.loss_fn(trainer.model, batch))
        update.step()


def _step_too_early(trainer: Trainer) -> None:
    for update in trainer.updates():
        for batch in update:
            update.backward(*TOKENS.loss_fn(trainer.model, batch))
            break
        update.step()


def _vector_loss(trainer: Trainer) -> None:
    for update in trainer.updates():
        for batch in update:
            update.backward(trainer.model(batch["tokens"]).mean(dim=0))


def _own_learning_rate(trainer: Trainer) -> None:
    for update in trainer.updates():
        _answer(update, trainer)
        update.step()
        trainer._optimizer.optimizer.param_groups[0]["lr"] *= 0.1


def _own_learning_rate_in_an_update(trainer: Trainer) -> None:
    for update in trainer.updates():
        trainer._optimizer.optimizer.param_groups[0]["lr"] = 0.1 / (1 + update.index)
        _answer(update, trainer)
        update.step()


def _own_step(trainer: Trainer) -> None:
    for update in trainer.updates():
        _answer(update, trainer)
        update.step()
        trainer._optimizer.optimizer.step()


def _loop_in_a_loop(trainer: Trainer) -> None:
    for _ in trainer.updates():
        next(iter(trainer.updates()))


def _back_in_an_older_loop(trainer: Trainer) -> None:
    older = trainer.updates()
    update = next(older)
    _answer(update, trainer)
    update.step()
    for update in trainer.updates():
        _answer(update, trainer)
        update.step()
        next(older)


def _answer_to_a_batch_outside_the_loop(trainer: Trainer) -> None:
    for update in trainer.updates():
        batch = next(iter(update))
        update.backward(*TOKENS.loss_fn(trainer.model, batch))


def _further_after_half_a_step(trainer: Trainer) -> None:
    def fail(*_: object) -> None:
        raise OSError("amid a step")

    hook = trainer._optimizer.optimizer.register_step_post_hook(fail)
    update = next(iter(trainer.updates()))
    _answer(update, trainer)
    with pytest.raises(OSError, match="amid a step"):
        update.step()
    hook.remove()
    next(iter(trainer.updates()))


def _loss(value: Any, weight: Any = None) -> Callable[[Trainer], None]:
    def mistake(trainer: Trainer) -> None:
        for update in trainer.updates():
            for _ in update:
                update.backward(value, weight)

    return mistake


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (_direct_backward, r"call update.backward\(loss\)"),
        (_cleared_gradients, r"model.zero_grad\(\)"),
        (_no_step, r"update.step\(\) was not called"),
        (_two_steps, r"update.step\(\) was called twice"),
        (_no_backward, r"a batch got no update.backward\(loss\)"),
        (_twice_over_the_batches, "loop over it once"),
        (_step_too_early, "before every batch of the update was run"),
        (_vector_loss, r"the loss has shape \(7, 20\); it must be one number"),
        (_own_learning_rate, r"remove scheduler.step\(\)"),
        (_own_learning_rate_in_an_update, r"remove scheduler.step\(\)"),
        (_own_step, r"optimizer.step\(\) was called directly"),
        (_loop_in_a_loop, "while update 0 of another is under way"),
        (_back_in_an_older_loop, "another loop over the updates has begun since"),
        (_answer_to_a_batch_outside_the_loop, "inside the loop over the update"),
        (_further_after_half_a_step, "applied in part"),
        (_loss(None), "the loss is None; it must be one number"),
        (_loss(0.5), "the loss is a float"),
        (_loss([torch.ones(())]), "the loss is a list"),
        (_loss(torch.ones((), dtype=torch.complex64)), "the loss is complex"),
        (_loss(torch.ones(()), "3"), "the weight is a str"),
        (_loss(torch.ones(()), 3j), "the weight is a complex"),
        (_loss(torch.ones(()), torch.ones(2)), r"the weight has shape \(2,\)"),
        (list, "needs loss_fn"),
    ],
)
def test_mistakes_in_the_loop_are_caught(mistake: Callable[[Trainer], Any], message: str) -> None:
    with _trainer(check_loss=False) as trainer, pytest.raises(MisusedTrainer, match=message):
        mistake(trainer)


def test_a_loss_function_gives_a_loss_or_a_sum_and_its_weight() -> None:
    model = TokenModel(torch.float64)
    dataset = TOKENS.dataset(torch.float64)
    options: dict[str, Any] = {"micro_batch_size": 4, "loss_fn": lambda *_: (torch.ones(()), 1, 2)}
    with (
        Trainer(model, sgd(model), dataset, training.SCHEDULE, **options) as trainer,
        pytest.raises(MisusedTrainer, match="loss_fn gave 3 values; it must give a loss, or"),
    ):
        list(trainer)


def test_a_mistake_in_a_loss_function_is_named_also_where_passes_are_measured_first() -> None:
    job = replace(TOKENS, loss_fn=lambda model, batch: [model(batch["tokens"])])
    options = {"micro_batches_per_pass": "auto", "check_loss": False}
    with (
        make_trainer(Plan(job, options=options), FixedWorld(SoloEngine())) as trainer,
        pytest.raises(MisusedTrainer, match="the loss is a list"),
    ):
        next(iter(trainer))


def test_between_updates_the_model_takes_any_number_of_ghosts() -> None:
    plan = Plan(IMAGES, owns_loop=True, options={"check_loss": False})
    with make_trainer(plan, FixedWorld(SoloEngine())) as trainer:
        update = next(trainer.updates())
        for batch in update:
            update.backward(IMAGES.loss_fn(trainer.model, batch))
        update.step()
        assert trainer.model(torch.cat([batch[0], batch[0][:2]])).isfinite().all()


def test_after_a_loop_that_was_left_amid_an_update_another_may_begin() -> None:
    with _trainer(check_loss=False) as trainer:
        for update in trainer.updates():
            for batch in update:
                update.backward(*TOKENS.loss_fn(trainer.model, batch))
                break
            break
        for update in trainer.updates():
            _answer(update, trainer)
            assert update.step()
            break
        assert trainer.num_updates == 1


def test_a_loop_that_was_left_amid_reductions_is_not_begun_anew() -> None:
    for text in run_world(2, training.leave_amid_reductions, _PLAN):
        assert "MisusedTrainer: a loop over the updates begins while update 0 of another is under way" in text


@pytest.mark.parametrize(
    ("own", "name"),
    [({"seed": 5}, "seed"), ({"max_grad_norm": 1.0}, "max_grad_norm"), ({"check_every": 3}, "check_every")],
)
def test_workers_that_were_given_different_options_are_refused(own: dict[str, Any], name: str) -> None:
    first, second = run_world(2, training.train_with_own_options, _PLAN, {1: own})
    assert second.startswith("JobDiffers: ")
    assert f"{name}: " in second
    assert "the run of worker 0" in second
    assert first.startswith("WorkerFailed: the start failed: worker 1: the run of worker 0 belongs to another job")


def test_workers_whose_optimizers_have_another_order_are_refused() -> None:
    first, second = run_world(2, training.train_in_own_order, _PLAN)
    assert second.startswith("JobDiffers: ")
    assert first.startswith("WorkerFailed: the start failed: worker 1")


class _Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter([1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": DataParallel(nn.Linear(1, 1))}, "must be the bare model"),
        ({"train_set": _Endless()}, "must be a map-style data set"),
        ({"micro_batch_size": 0}, "micro_batch_size = 0: must be a whole number, at least 1"),
        ({"micro_batch_size": 5}, "32.*must be a multiple of.*5|must be"),
        ({"ghost_batch_size": 3}, "ghost_batch_size = 3: must divide micro_batch_size = 4"),
        ({"precision": "fp8"}, "must be float32, bf16 or fp16"),
        ({"max_grad_norm": 0.0}, "must be a number above 0"),
        ({"resume": "auto"}, "needs a place for checkpoints"),
        ({"checkpoint_every": "0ep"}, "checkpoint_every = '0ep': must be above 0"),
        ({"momentum": 0.5}, "optimizer.momentum = 0.5: must be the optimizer's own, 0.9"),
        ({"loss_fn": 3}, "loss_fn = 3: must be a function"),
        ({"momentum": 1.0}, "momentum = 1.0: must be from 0 to below 1"),
    ],
)
def test_what_cannot_be_trained_is_refused(change: dict[str, Any], message: str) -> None:
    model = change.pop("model", None) or TokenModel(torch.float64)
    train_set = change.pop("train_set", None) or TOKENS.dataset(torch.float64)
    options = {"micro_batch_size": 4, **change}
    with pytest.raises(InvalidSetting, match=message):
        Trainer(model, sgd(model), train_set, training.SCHEDULE, **options).start()


def _without_parameters() -> tuple[nn.Module, Any]:
    return nn.ReLU(), sgd(nn.Linear(1, 1))


def _lazy() -> tuple[nn.Module, Any]:
    model = nn.LazyLinear(1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def _frozen() -> tuple[nn.Module, Any]:
    model = nn.Linear(1, 1).requires_grad_(False)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def _with_a_criterion_outside() -> tuple[nn.Module, Any]:
    model, criterion = nn.Linear(1, 1), nn.Linear(2, 3)
    return model, torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_without_parameters, "must have parameters"),
        (_lazy, "lazy parameters without a shape. Run a batch through it before"),
        (_frozen, "all that the optimizer has are frozen"),
        (_with_a_criterion_outside, r"2 are not in it, of shape \(3, 2\) for one"),
    ],
)
def test_what_is_trained_is_the_model(make: Callable[[], tuple[nn.Module, Any]], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        Trainer(*make(), TOKENS.dataset(torch.float64), training.SCHEDULE, micro_batch_size=4)


def test_an_unknown_argument_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'micro_batch_size'"):
        _trainer(microbatch_size=4)
