"""Schedules made from a `torch.optim.lr_scheduler`, which is simulated and never touched."""

from __future__ import annotations

import copy
import warnings
from array import array
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from elastic_batch.errors import InvalidSetting
from elastic_batch.noise import NoiseForm
from elastic_batch.schedule import ConversionSettings, Duration, ScheduleContext, ScheduleSpec, TableSchedule
from elastic_batch.schedule.batches import Rule
from elastic_batch.schedule.convert import Per

# Groups whose learning rates keep their ratio up to this are said to have one shape.
_SHAPE_TOLERANCE = 1e-6


def from_lr_scheduler(
    scheduler: LRScheduler,
    *,
    per: Per,
    max_duration: str | Duration,
    global_batch_size: int,
    max_global_batch_size: int | None = None,
    growth_only: bool = False,
    rule: Rule = "linear",
    noise_form: NoiseForm = "linear",
) -> ScheduleSpec:
    """Turn a learning-rate scheduler into a schedule of batches with the same noise scale.

    The scheduler is copied now and simulated when the training set is known; it and its optimizer stay as they are.
    Do not call its `step` while training: the schedule sets the learning rate. All parameter groups must follow the
    first by a common factor.

    Args:
        scheduler: A scheduler on which `step` has not been called yet.
        per: How often the training script would call `scheduler.step()`: once per "epoch", or per "update" of
            `global_batch_size` samples.
        max_duration: Length of the job, say "200ep".
        global_batch_size: Samples of one update for which the learning rates are meant, and with which training begins.
        max_global_batch_size: The batch grows up to here; None: a tenth of the training set.
        growth_only: Never shrink the batch: where the learning rate falls and comes back, the dip stays in it.
        rule: "linear" (Smith et al., 2018), or for Adam and AdamW "sqrt" (Seesaw, Malladi et al.).
        noise_form: Form of the noise scale that is kept, "linear" or "exact".

    Raises:
        InvalidSetting: The scheduler is driven by a metric, cycles the momentum, was stepped already or cannot be
            copied; or another argument is wrong. The message names the alternative.
    """
    _refuse_unsuitable(scheduler)
    fresh = _Simulation(scheduler)
    settings = ConversionSettings.of(
        global_batch_size=global_batch_size,
        max_duration=max_duration,
        max_global_batch_size=max_global_batch_size,
        growth_only=growth_only,
        rule=rule,
        noise_form=noise_form,
    )

    def rates(context: ScheduleContext, num_steps: int) -> array[float]:
        return fresh.run(context, num_steps, per)

    return TableSchedule(rates=rates, per=per, settings=settings, source=type(scheduler).__name__)


class _Simulation:
    """A private copy of a scheduler on an optimizer that trains nothing."""

    def __init__(self, scheduler: LRScheduler) -> None:
        self._scheduler = _copied(scheduler, scheduler.optimizer)
        groups = self._scheduler.optimizer.param_groups
        self._known_rates = {float(groups[0][name]) for name in ("lr", "initial_lr") if name in groups[0]}

    def run(self, context: ScheduleContext, num_steps: int, per: Per) -> array[float]:
        """Give the first group's learning rate at each step.

        Raises:
            InvalidSetting: The groups have different shapes, the momentum changes, or the scheduler ends too early.
        """
        if not any(abs(context.learning_rate - rate) <= 1e-9 * rate for rate in self._known_rates):
            rule = f"is not the learning rate of the scheduler's optimizer, {max(self._known_rates)}"
            raise InvalidSetting("learning_rate", context.learning_rate, rule, "Give the trainer that optimizer")
        columns = _simulate(_copied(self._scheduler, self._scheduler.optimizer), num_steps, per)
        _check_common_shape(columns)
        return columns[0]


def _copied(scheduler: LRScheduler, optimizer: Optimizer) -> LRScheduler:
    """Copy a scheduler with all that it holds, except that its optimizer becomes a stand-in."""
    try:
        return copy.deepcopy(scheduler, {id(optimizer): _stand_in(optimizer)})
    except Exception as error:  # a user's scheduler may hold anything, and copying it may fail in any way
        raise InvalidSetting(
            "scheduler",
            type(scheduler).__name__,
            f"cannot be copied ({error})",
            "Give its factors as a function: elastic_batch.schedule.from_function",
        ) from error


def _stand_in(original: Optimizer) -> Optimizer:
    """Give an optimizer with the options of another one's groups, and one number for each group's parameters."""
    groups = []
    for group in original.param_groups:
        options = {name: _plain(option) for name, option in group.items() if name not in ("params", "param_names")}
        groups.append({"params": [torch.zeros(())], **options})
    return Optimizer(groups, {})


def _plain(option: Any) -> Any:
    return float(option) if isinstance(option, torch.Tensor) and option.numel() == 1 else copy.copy(option)


def _simulate(scheduler: LRScheduler, num_steps: int, per: Per) -> list[array[float]]:
    """Step a scheduler and record each group's learning rates."""
    groups = scheduler.optimizer.param_groups
    columns = [array("d", [float(group["lr"])]) for group in groups]
    cycled = [(group.get("momentum"), group.get("betas")) for group in groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice on how to step a real optimizer
        for step in range(1, num_steps):
            try:
                scheduler.step()
            except (ValueError, TypeError, IndexError) as error:
                raise _end_error(scheduler, num_steps, per, f"step {step} says {error}") from error
            if [(group.get("momentum"), group.get("betas")) for group in groups] != cycled:
                raise _momentum_error(type(scheduler).__name__)
            for column, group in zip(columns, groups, strict=True):
                column.append(float(group["lr"]))
    return columns


def _end_error(scheduler: LRScheduler, num_steps: int, per: Per, reason: str) -> InvalidSetting:
    return InvalidSetting(
        "scheduler",
        type(scheduler).__name__,
        f"must allow {num_steps} steps, one per {per}: {reason}",
        "See that per and max_duration agree with how the scheduler was made",
    )


def _check_common_shape(columns: list[array[float]]) -> None:
    first = columns[0]
    highest = max(range(len(first)), key=first.__getitem__)
    for index, column in enumerate(columns[1:], start=1):
        for step, (rate, own) in enumerate(zip(first, column, strict=True)):
            if abs(own * first[highest] - rate * column[highest]) > _SHAPE_TOLERANCE * column[highest] * first[highest]:
                raise InvalidSetting(
                    "scheduler",
                    f"group {index} at {own:g} where group 0 is at {rate:g} (step {step})",
                    "must give all parameter groups the same shape, because they share one batch",
                    "Use one factor for all groups; a minimum such as eta_min is common only to equal learning rates",
                )


def _refuse_unsuitable(scheduler: Any) -> None:
    name = type(scheduler).__name__
    parts = list(_parts(scheduler))
    if any(isinstance(part, ReduceLROnPlateau) for part in parts):
        raise InvalidSetting(
            "scheduler",
            name,
            "must not depend on a metric, because the schedule has to be known in advance",
            "Give points where it would drop as milestones of grow-batch, or recorded batches as decisions of adaptive",
        )
    if not all(isinstance(part, LRScheduler) for part in parts):
        remedy = "Give a function's factors with elastic_batch.schedule.from_function"
        raise InvalidSetting("scheduler", name, "must be a torch.optim.lr_scheduler", remedy)
    for part in parts:
        if getattr(part, "cycle_momentum", False):
            raise _momentum_error(type(part).__name__)
    num_steps = max(getattr(part, "last_epoch", 0) for part in parts)
    if num_steps > 0:
        raise InvalidSetting(
            "scheduler",
            f"{name} after {num_steps} steps",
            "must not have been stepped yet",
            "Make it anew; a resumed run finds its place from its checkpoint",
        )


def _momentum_error(name: str) -> InvalidSetting:
    return InvalidSetting(
        "scheduler",
        name,
        "must not change the momentum",
        "Pass cycle_momentum=False, or give momentum changes to strategy steps, one per step",
    )


def _parts(scheduler: Any) -> Iterator[Any]:
    """Give a scheduler and those that it is made of."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _parts(part)
