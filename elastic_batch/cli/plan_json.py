"""A plan for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastic_batch.schedule import Plan
from elastic_batch.workloads.planning import JobPlan
from elastic_batch.workloads.step_times import StepTimes, hours


def plan_as_json(planned: JobPlan, numbers_of_workers: Sequence[int], times: StepTimes | None) -> dict[str, Any]:
    """Describe a plan with plain values.

    Args:
        planned: The plan.
        numbers_of_workers: For which numbers to tell shares.
        times: What was measured; None: nothing was.
    """
    plan = planned.plan
    described: dict[str, Any] = {
        "name": planned.job.name,
        "rule": plan.rule,
        "noise_form": plan.noise_form,
        "num_samples": planned.schedule.num_samples,
        "micro_batch_size": planned.job.micro_batch_size,
        "updates": plan.updates,
        "samples": plan.samples,
        "epochs": plan.epochs,
        "baseline_updates": plan.baseline_updates,
        "phases": [
            {
                "phase": row.phase,
                "start_epoch": row.start_epoch,
                "end_epoch": row.end_epoch,
                "global_batch_size": row.global_batch_size,
                "num_micro_batches": row.num_micro_batches,
                "learning_rate": row.learning_rate,
                "last_learning_rate": row.last_learning_rate,
                "momentum": row.momentum,
                "noise_scale": row.noise_scale,
                "last_noise_scale": row.last_noise_scale,
                "updates": row.updates,
            }
            for row in plan.rows
        ],
        "workers": [_workers(plan, planned.decay, number, times) for number in numbers_of_workers],
    }
    if times is not None:
        described["measured"] = {
            "device": times.device,
            "pass_seconds": {str(width): seconds for width, seconds in times.pass_seconds.items()},
            "step_seconds": times.step_seconds,
            "width": times.width,
        }
    return described


def _workers(plan: Plan, decay: Plan | None, number: int, times: StepTimes | None) -> dict[str, Any]:
    shares = plan.shares(number)
    described = {
        "num_workers": number,
        "micro_batches_per_worker": [share.num_micro_batches for share in shares],
        "idle_share": [share.idle_share for share in shares],
        "micro_batches_in_sequence": plan.micro_batches_in_sequence(number),
        "baseline_micro_batches_in_sequence": decay.micro_batches_in_sequence(number) if decay else None,
    }
    if times is not None:
        described["hours"] = hours(plan, number, times)
        described["baseline_hours"] = hours(decay, number, times) if decay else None
    return described
