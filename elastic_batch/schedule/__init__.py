"""Schedules of batch, learning rate and momentum: pure functions of the position, and nothing else."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from elastic_batch.schedule.adaptive import AdaptiveSchedule
from elastic_batch.schedule.convert import ConversionSettings, ConvertSchedule, TableSchedule, from_function
from elastic_batch.schedule.durations import Duration
from elastic_batch.schedule.milestones import MilestoneSchedule
from elastic_batch.schedule.planning import Plan, PlanRow, WorkerShare, plan, worker_share
from elastic_batch.schedule.ramp import Point, RampSchedule
from elastic_batch.schedule.resolved import Phase, Run, Schedule, walk
from elastic_batch.schedule.settings import ScheduleSettings, ScheduleSpec, Warmup
from elastic_batch.schedule.shapes import AnyShape, TableShape
from elastic_batch.schedule.steps import Step, StepsSchedule
from elastic_batch.schedule.trading import Raised
from elastic_batch.schedule.values import PhaseValues, ScheduleContext

AnySchedule = Annotated[
    MilestoneSchedule | ConvertSchedule | RampSchedule | StepsSchedule | AdaptiveSchedule,
    Field(discriminator="strategy"),
]
"""The `schedule` section of a job file."""

__all__ = [
    "AdaptiveSchedule",
    "AnySchedule",
    "AnyShape",
    "ConversionSettings",
    "ConvertSchedule",
    "Duration",
    "MilestoneSchedule",
    "Phase",
    "PhaseValues",
    "Plan",
    "PlanRow",
    "Point",
    "Raised",
    "RampSchedule",
    "Run",
    "Schedule",
    "ScheduleContext",
    "ScheduleSettings",
    "ScheduleSpec",
    "Step",
    "StepsSchedule",
    "TableSchedule",
    "TableShape",
    "Warmup",
    "WorkerShare",
    "from_function",
    "plan",
    "walk",
    "worker_share",
]
