"""What workers do in tests of the trainer: train a small job and return its state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from support import jobs
from support.engines import FailingEngine, RecoveringMembership
from support.jobs import SmallJob
from support.reference import state_of
from torch.utils.data import Dataset, Subset

from elastic_batch import Trainer
from elastic_batch.engines import Engine, FixedWorld, Membership
from elastic_batch.errors import ElasticBatchError
from elastic_batch.noise import NoiseSums
from elastic_batch.schedule import StepsSchedule
from elastic_batch.trainer.loop import UpdateLoop

SCHEDULE = StepsSchedule.of(
    strategy="steps",
    global_batch_size=jobs.FIRST_BATCH,
    points=f"0:{jobs.FIRST_BATCH} {jobs.MILESTONE}sp:{jobs.SECOND_BATCH}",
    max_duration=f"{jobs.END}sp",
)


@dataclass(frozen=True)
class Plan:
    """How far a worker trains, and how.

    Args:
        job: What to train.
        num_updates: It stops after so many.
        end: Samples after which its schedule ends, before it grows; None: that of `SCHEDULE`.
        owns_loop: Whether the test's own loop drives the updates, or the trainer owns the step.
        options: Further keyword arguments of the trainer.
    """

    job: SmallJob
    num_updates: int = 100
    owns_loop: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    end: int | None = None


def _short(end: int) -> StepsSchedule:
    return StepsSchedule.of(
        strategy="steps",
        global_batch_size=jobs.FIRST_BATCH,
        points=f"0:{jobs.FIRST_BATCH}",
        max_duration=f"{end}sp",
    )


def make_trainer(plan: Plan, membership: Membership) -> Trainer:
    model = plan.job.model(plan.job.dtype)
    return Trainer(
        model,
        jobs.sgd(model),
        plan.job.dataset(plan.job.dtype),
        SCHEDULE if plan.end is None else _short(plan.end),
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
        trainer.start()
        return trainer.position, run(trainer, half)


def first_gradient(engine: Engine, plan: Plan) -> torch.Tensor:
    """The first update's divided gradient, flat, in float64."""
    with make_trainer(plan, FixedWorld(engine)) as trainer:
        for _ in trainer:
            break
        gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
        return torch.cat([gradient.double().flatten() for gradient in gradients])


class ScriptedTrouble:
    """Raises `error` at the calls numbered in `at` (from 0); counts all of them."""

    def __init__(self, error: Exception, at: frozenset[int]) -> None:
        self.error = error
        self.at = at
        self.num_calls = 0

    def maybe(self) -> None:
        number, self.num_calls = self.num_calls, self.num_calls + 1
        if number in self.at:
            raise self.error


class TroubledDataset(Dataset[Any]):
    """Another data set, some of whose samples cannot be had."""

    def __init__(self, inner: Dataset[Any], trouble: ScriptedTrouble) -> None:
        self.inner: Any = inner
        self.trouble = trouble

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        self.trouble.maybe()
        return self.inner[index]


def troubled(job: SmallJob, trouble: ScriptedTrouble, where: str) -> SmallJob:
    """The job, with trouble in its data, its loss function, or near the end of its backward."""
    if where == "data":
        return replace(job, dataset=lambda dtype: TroubledDataset(job.dataset(dtype), trouble))
    if where == "backward":

        def model(dtype: torch.dtype) -> torch.nn.Module:
            made = job.model(dtype)
            first_layer = next(parameter for parameter in made.parameters() if parameter.dim() > 1)
            first_layer.register_hook(lambda gradient: trouble.maybe())
            return made

        return replace(job, model=model)

    def loss_fn(model: torch.nn.Module, batch: Any) -> Any:
        trouble.maybe()
        return job.loss_fn(model, batch)

    return replace(job, loss_fn=loss_fn)


def train_with_trouble(
    engine: Engine, plan: Plan, where: str, error: Exception, at: frozenset[int], rank: int
) -> tuple[str, dict[str, Any]]:
    """Train with trouble on one worker. Returns the text of the error that ended it, if any, and the state."""
    job = plan.job
    if engine.rank == rank:
        job = troubled(job, ScriptedTrouble(error, at), where)
    with make_trainer(replace(plan, job=job), FixedWorld(engine)) as trainer:
        try:
            return "", run(trainer, plan)
        except ElasticBatchError as raised:
            return str(raised), state_of(trainer.model, trainer._optimizer.optimizer)


def train_through_failures(engine: Engine, plan: Plan, fail_at: list[int], at: str) -> list[dict[str, Any]]:
    """Train once for each of `fail_at`, the collective of that number breaking the first world; return the states."""
    states = []
    for number in fail_at:
        membership = RecoveringMembership(FailingEngine(engine, number, at))
        with make_trainer(plan, membership) as trainer:
            states.append(run(trainer, plan))
        if membership.num_worlds != 2:
            raise AssertionError(f"collective {number} did not break the world")
    return states


def count_collectives(inner: Engine, plan: Plan) -> tuple[int, int, dict[str, Any]]:
    """Collectives before the first update, collectives in all, and the final state."""
    engine = FailingEngine(inner, None)
    with make_trainer(plan, FixedWorld(engine)) as trainer:
        trainer.start()
        before = engine.num_collectives
        state = run(trainer, plan)
        return before, engine.num_collectives, state


def evaluate_after_a_break(engine: Engine, plan: Plan, broken_at: int | None) -> tuple[list[float], dict[str, Any]]:
    """Train to the end, evaluate twice after each update but the last and once after the loop.

    Returns what was found, and the final state.

    In update `broken_at` the world breaks such that the first worker has committed and the last one has not.
    """
    found = []
    failing = FailingEngine(engine, None)
    with make_trainer(plan, RecoveringMembership(failing)) as trainer:

        def evaluate() -> float:
            mean: float = trainer.evaluate(trainer._train_set, losses_of_tokens)["loss"]
            return mean

        for update in trainer.updates():
            for batch in update:
                loss_sum, weight = jobs.token_loss(trainer.model, batch)
                update.backward(loss_sum, weight)
            is_first, is_last = engine.rank == 0, engine.rank == engine.size - 1
            if update.index == broken_at and is_last and not is_first:
                failing.fail_at, failing.at = failing.num_collectives, "late"  # the header, which comes last
            if not update.step():
                raise AssertionError("the others have committed it")
            if update.index == broken_at and is_first:
                failing.fail_at, failing.at = failing.num_collectives, "launch"
            if not trainer.finished:
                found += [evaluate(), evaluate()]
        return [*found, evaluate()], state_of(trainer.model, trainer._optimizer.optimizer)


def stop_on_one_worker(engine: Engine, plan: Plan, rank: int, after: int) -> tuple[int, str | None]:
    """One worker asks for the end; returns how far each one came, and why it stopped."""
    with make_trainer(plan, FixedWorld(engine)) as trainer:
        for _ in trainer:
            if engine.rank == rank and trainer.num_updates == after:
                trainer.stop("enough")
        return trainer.num_updates, trainer.stop_reason


def break_off(engine: Engine, plan: Plan, after: int) -> int:
    """Every worker leaves the loop after the same update, then all evaluate together."""
    with make_trainer(plan, FixedWorld(engine)) as trainer:
        for _ in trainer:
            if trainer.num_updates == after:
                break
        trainer.evaluate(trainer._train_set, losses_of_tokens)
        return trainer.num_updates


def losses_of_tokens(model: torch.nn.Module, batch: Any) -> dict[str, Any]:
    loss_sum, weight = jobs.token_loss(model, batch)
    return {"loss": (loss_sum, weight), "samples": (batch["tokens"].shape[0], 1)}


def evaluate_tokens(engine: Engine, plan: Plan) -> Any:
    with make_trainer(plan, FixedWorld(engine)) as trainer:
        return trainer.evaluate(trainer._train_set, losses_of_tokens, batch_size=7)


def evaluate_few(engine: Engine, plan: Plan, num_samples: int) -> Any:
    with make_trainer(plan, FixedWorld(engine)) as trainer:
        return trainer.evaluate(Subset(trainer._train_set, range(num_samples)), losses_of_tokens)


def evaluate_with_trouble(engine: Engine, plan: Plan, rank: int) -> str:
    """The measure fails on one worker; returns what each worker raised."""

    def measure(model: torch.nn.Module, batch: Any) -> Any:
        if engine.rank == rank:
            raise ValueError("no such measure")
        return losses_of_tokens(model, batch)

    with make_trainer(plan, FixedWorld(engine)) as trainer:
        try:
            trainer.evaluate(trainer._train_set, measure)
        except ElasticBatchError as error:
            return str(error)
    return ""


def evaluate_through_a_failure(engine: Engine, plan: Plan) -> tuple[Any, int]:
    """A collective of the evaluation breaks the world; it is repeated in the next one."""
    failing = FailingEngine(engine, None)
    membership = RecoveringMembership(failing)
    with make_trainer(plan, membership) as trainer:
        trainer.start()
        failing.fail_at = failing.num_collectives
        return trainer.evaluate(trainer._train_set, losses_of_tokens, batch_size=7), membership.num_worlds


def evaluate_inside_an_update(engine: Engine, plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """The world breaks in an evaluation while an update is open, before, amid or after its batches, by its index."""
    failing = FailingEngine(engine, None)
    outcomes: list[str] = []
    with make_trainer(plan, RecoveringMembership(failing)) as trainer:

        def evaluate(place: int) -> None:
            if update.index % 3 == place and not outcomes.count(f"{update.index} repeated"):
                failing.fail_at = failing.num_collectives
                trainer.evaluate(trainer._train_set, losses_of_tokens, batch_size=7)

        for update in trainer.updates():
            evaluate(0)
            for number, batch in enumerate(update):
                if number == 0:
                    evaluate(1)
                update.backward(*plan.job.loss_fn(trainer.model, batch))
            evaluate(2)
            update.step()
            outcomes.append(f"{update.index} {update.outcome.value}")
            if isinstance(trainer._loop, UpdateLoop) and isinstance(trainer._loop.engine, FailingEngine):
                failing = trainer._loop.engine
            if trainer.num_updates == plan.num_updates - 1:
                trainer.stop("enough")
        return state_of(trainer.model, trainer._optimizer.optimizer), outcomes


def disturb_one_worker(engine: Engine, plan: Plan, rank: int) -> str:
    """One worker's parameters are changed behind the trainer's back; returns what each worker raised."""
    with make_trainer(plan, FixedWorld(engine)) as trainer:
        try:
            for _ in trainer:
                if engine.rank == rank and trainer.num_updates == 3:
                    with torch.no_grad():
                        trainer.model.get_parameter("embedding.weight").view(-1)[0].mul_(1 + 1e-12)
        except ElasticBatchError as error:
            return str(error)
    return ""


def train_from_different_weights(engine: Engine, plan: Plan) -> dict[str, Any]:
    """Every worker begins with weights of its own; rank 0's must win."""
    with make_trainer(plan, FixedWorld(engine)) as trainer:
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(engine.rank)
        return run(trainer, plan)


def first_noise_sums(engine: Engine, plan: Plan) -> NoiseSums:
    """What the first update tells the estimator of the measured noise scale."""
    with make_trainer(plan, FixedWorld(engine)) as trainer:
        update = next(iter(trainer))
        weight = update.committed_header.weight
        return update.committed_header.noise_sums(jobs.NUM_SAMPLES * weight / update.global_batch_size)


def first_loss(engine: Engine, plan: Plan) -> float:
    with make_trainer(plan, FixedWorld(engine)) as trainer:
        return next(iter(trainer)).loss


def train_with_own_options(engine: Engine, plan: Plan, own: dict[int, dict[str, Any]]) -> str:
    """Train with options that differ by rank; return the error that ends it, or nothing."""
    mine = replace(plan, options={**plan.options, **own.get(engine.rank, {})})
    try:
        train(engine, mine)
    except ElasticBatchError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def train_in_own_order(engine: Engine, plan: Plan) -> str:
    """Train with parameters that the optimizer has in another order on rank 1; return the error that ends it."""
    model = plan.job.model(plan.job.dtype)
    parameters = list(model.parameters())
    if engine.rank == 1:
        parameters.reverse()
    try:
        with Trainer(
            model,
            torch.optim.SGD(parameters, lr=0.1),
            plan.job.dataset(plan.job.dtype),
            SCHEDULE,
            loss_fn=plan.job.loss_fn,
            membership=FixedWorld(engine),
            micro_batch_size=jobs.MICRO_BATCH,
        ) as trainer:
            run(trainer, plan)
    except ElasticBatchError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def leave_amid_reductions(engine: Engine, plan: Plan) -> str:
    """Leave the loop when the last batch of an update was answered, and loop again; return the error."""
    with make_trainer(plan, FixedWorld(engine)) as trainer:
        for update in trainer.updates():
            for batch in update:
                loss = plan.job.loss_fn(trainer.model, batch)
                update.backward(*loss) if isinstance(loss, tuple) else update.backward(loss)
            break
        try:
            next(iter(trainer.updates()))
        except ElasticBatchError as error:
            return f"{type(error).__name__}: {error}"
    return ""
