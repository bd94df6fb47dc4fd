"""What a job would do, found without torch and without its data: the schedule, its plan, the same with plain decay."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_batch.errors import InvalidSetting
from elastic_batch.job import Job
from elastic_batch.schedule import Plan, Schedule, plan
from elastic_batch.workloads.catalog import DATA_SETS, check_data, check_model_name


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """A job's schedule and its plan, beside the same job with plain decay."""

    job: Job
    schedule: Schedule
    plan: Plan
    decay: Plan | None
    """Plain decay; None where the job gives batches without a learning-rate schedule to compare with."""
    decay_schedule: Schedule | None

    @property
    def max_workers(self) -> int:
        """How many workers the largest batch can occupy."""
        return max(row.num_micro_batches for row in self.plan.rows)


def plan_job(job: Job) -> JobPlan:
    """Check a job as far as that is possible without its data, and plan it.

    Raises:
        UnknownName: A data set or model that does not exist; the message has the nearest name.
        InvalidSetting: The job cannot run.
    """
    check_data(job.data)
    if job.model.name is not None:
        check_model_name(job.model.name)
    if job.loss.name == "mse" and job.data.name is not None:
        rule, remedy = f"is for targets like the outputs; {job.data.name} has class labels", "Use cross-entropy"
        raise InvalidSetting("loss.name", "mse", rule, remedy)
    num_samples = num_training_samples(job)
    schedule = job.build_schedule(num_samples)
    for field, every in (("checkpoint.every", job.checkpoint.every), ("evaluation.every", job.evaluation.every)):
        if every is not None:
            every.samples(
                num_samples=num_samples, tokens_per_sample=job.data.tokens_per_sample, total=schedule.end, field=field
            )
    spec = job.with_plain_decay()
    decay_schedule = spec.build_schedule(num_samples) if spec else None
    return JobPlan(
        job=job,
        schedule=schedule,
        plan=plan(schedule),
        decay=plan(decay_schedule) if decay_schedule else None,
        decay_schedule=decay_schedule,
    )


def num_training_samples(job: Job) -> int:
    """N: from the job, from what is known of the data set, or else by loading the user's own.

    Raises:
        InvalidSetting: The user's data set cannot be loaded, or has no length.
    """
    if job.data.num_samples is not None:
        return job.data.num_samples
    if job.data.name is not None:
        return DATA_SETS[job.data.name].num_training_samples
    from elastic_batch.data import count_samples  # loads torch
    from elastic_batch.workloads.data_target import load_data_target

    return count_samples(load_data_target(job.data).training, "data.target")
