"""What workers do in tests of the trainer: train a small job and return its state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from support import jobs
from support.jobs import SmallJob
from support.reference import state_of

from elastic_batch import Trainer
from elastic_batch.engines import Engine, FixedWorld, Membership
from elastic_batch.schedule import StepsSchedule

SCHEDULE = StepsSchedule(
    strategy="steps",
    steps=f"0:{jobs.FIRST_BATCH} {jobs.MILESTONE}sp:{jobs.SECOND_BATCH}",
    max_duration=f"{jobs.END}sp",
)


@dataclass(frozen=True)
class Plan:
    """How far a worker trains, and how.

    Args:
        job: What to train.
        num_updates: It stops after so many.
        owns_loop: Whether the test's own loop drives the updates, or the trainer owns the step.
        options: Further keyword arguments of the trainer.
    """

    job: SmallJob
    num_updates: int = 100
    owns_loop: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def make_trainer(plan: Plan, membership: Membership) -> Trainer:
    model = plan.job.model(plan.job.dtype)
    return Trainer(
        model,
        jobs.sgd(model),
        plan.job.dataset(plan.job.dtype),
        SCHEDULE,
        loss_fn=None if plan.owns_loop else plan.job.loss_fn,
        membership=membership,
        **{
            "micro_batch_size": jobs.MICRO_BATCH,
            "ghost_batch_size": jobs.GHOST,
            "seed": jobs.SEED,
            "batch_transform": plan.job.batch_transform,
            "check_every": 20,
            **plan.options,
        },
    )


def run(trainer: Trainer, plan: Plan) -> dict[str, Any]:
    """Train to `plan.num_updates` and return parameters, buffers and optimizer state by name."""
    if plan.owns_loop:
        for update in trainer.updates():
            for batch in update:
                loss = plan.job.loss_fn(trainer.model, batch)
                if isinstance(loss, tuple):
                    update.backward(loss[0], weight=loss[1])
                else:
                    update.backward(loss)
            if update.step() and trainer.num_updates == plan.num_updates:
                trainer.stop("far enough")
                break
    else:
        for _ in trainer:
            if trainer.num_updates == plan.num_updates:
                break
    return state_of(trainer.model, trainer._optimizer.optimizer)


def train(engine: Engine, plan: Plan) -> dict[str, Any]:
    """Train on a world that stays as it is."""
    with make_trainer(plan, FixedWorld(engine)) as trainer:
        return run(trainer, plan)


def train_in_two_halves(engine: Engine, plan: Plan, run_dir: str, stop_after: int) -> tuple[int, dict[str, Any]]:
    """Train to `stop_after` updates if nothing is there yet, else to the end. Returns the position too."""
    options = {**plan.options, "run_dir": run_dir, "resume": "auto"}
    half = Plan(plan.job, stop_after, plan.owns_loop, options)
    with make_trainer(half, FixedWorld(engine)) as trainer:
        return trainer.position, run(trainer, half)


def first_gradient(engine: Engine, plan: Plan) -> torch.Tensor:
    """The first update's divided gradient, flat, in float64."""
    with make_trainer(plan, FixedWorld(engine)) as trainer:
        for _ in trainer:
            break
        gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
        return torch.cat([gradient.double().flatten() for gradient in gradients])
