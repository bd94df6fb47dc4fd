"""`elastic-batch train`: train a job, alone or as one of torchrun's workers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from elastic_batch.cli.elastic import Listening, listening_options
from elastic_batch.cli.invocation import Invocation
from elastic_batch.cli.main import EXIT_RESUMABLE
from elastic_batch.cli.options import job_options, read_job
from elastic_batch.cli.places import check_resume, require_directory
from elastic_batch.cli.progress import Display, open_display
from elastic_batch.cli.train_workers import train_on_workers
from elastic_batch.errors import InvalidSetting, RunDirectoryUsed
from elastic_batch.job import Job
from elastic_batch.launchers import launched_world
from elastic_batch.rundir import is_used
from elastic_batch.workloads.planning import JobPlan, plan_job


@click.command("train")
@job_options
@click.option("--run-dir", metavar="DIR", help="Where records and checkpoints go; default: runs/NAME[-STRATEGY].")
@click.option(
    "--resume",
    metavar="auto|never|PATH",
    help="Go on from a checkpoint; auto starts fresh if there is none; default: never.",
)
@click.option("--init-from", metavar="FILE", help="Weights that a fresh run starts from.")
@click.option("--metrics-port", type=int, metavar="PORT", help="Serve Prometheus metrics there.")
@click.option("--log", "loggers", multiple=True, metavar="tensorboard|wandb|mlflow", help="Log there too; repeatable.")
@click.option(
    "--workers",
    metavar="MIN:MAX",
    help="Train on so many worker processes, which come and go as the job asks; default: in this process.",
)
@listening_options
@click.option("--json", "as_json", is_flag=True, help="End with a JSON object on standard output.")
@click.pass_obj
def command(
    invocation: Invocation,
    /,
    run_dir: str | None,
    resume: str | None,
    init_from: str | None,
    metrics_port: int | None,
    loggers: tuple[str, ...],
    as_json: bool,
    strategy: str | None,
    workers: str | None,
    host: str,
    port: int,
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    **job_flags: Any,
) -> int:
    """Train a job. RECIPE is one of `elastic-batch recipes`, FILE a job file of your own.

    With --workers it is trained like a script of `elastic-batch run`; --host and what belongs to it let workers of
    other machines join.

    Exit codes: 0 trained to the end; 75 stopped early on request, resumable; 2 impossible settings; 1 anything else.
    """
    job = read_job(
        environ=invocation.environ,
        strategy=strategy,
        metrics_port=metrics_port,
        loggers=list(loggers) or None,
        **job_flags,
    )
    planned = plan_job(job)  # what cannot run fails here, before torch is loaded
    directory = run_dir or str(Path("runs") / (f"{job.name}-{strategy}" if strategy else job.name))
    how_to_resume = ("auto" if invocation.was_restarted else "never") if resume is None else resume
    listening = Listening(host=host, port=port, token_file=token_file, tls_cert=tls_cert, tls_key=tls_key)
    _check_places(invocation, directory, how_to_resume, job.checkpoint.location)
    if init_from == "":
        raise InvalidSetting("--init-from", init_from, "must be the path of weights")
    if workers is not None:
        return train_on_workers(invocation, job, directory, how_to_resume, workers, listening, as_json)
    _refuse_listening(listening)
    if not invocation.is_elastic:
        launched_world(invocation.environ)  # a variable that is missing shows now, not after the model was built
    summary = _train(invocation, planned, directory, how_to_resume, init_from)
    if summary.pop("is_lead"):
        # Whoever started elastic workers says how to resume.
        again = None if invocation.is_elastic else invocation.with_options(run_dir=directory, resume="auto")
        _print_end(summary, planned, directory, again, as_json)
    return 0 if summary["finished"] else EXIT_RESUMABLE


def plan_arguments(arguments: Sequence[str], environ: Mapping[str, str]) -> JobPlan:
    """Plan the job that `train` would train with these arguments.

    Raises:
        InvalidSetting: The job cannot run.
    """
    given = command.make_context("train", list(arguments)).params
    job_flags = {name: given[name] for name in _JOB_FLAGS}
    return plan_job(read_job(environ=environ, **{**job_flags, "loggers": list(given["loggers"]) or None}))


_JOB_FLAGS = ("job_name", "assignments", "strategy", "max_duration", "seed", "metrics_port")


def _check_places(invocation: Invocation, directory: str, resume: str, checkpoints: str | None) -> None:
    check_resume(resume)
    require_directory("--run-dir", directory)
    if checkpoints is not None and "://" not in checkpoints:
        require_directory("checkpoint.location", checkpoints)
    # Elastic workers come when others have begun the run; their supervisor has looked.
    if resume == "never" and not invocation.is_elastic and is_used(directory):
        raise RunDirectoryUsed(directory)


def _refuse_listening(listening: Listening) -> None:
    usual = asdict(Listening())
    for name, value in asdict(listening).items():
        if value != usual[name]:
            flag = f"--{name.replace('_', '-')}"
            remedy = f"Give --workers MIN:MAX, or leave {flag} out"
            raise InvalidSetting(flag, str(value), "needs --workers: only elastic jobs have a coordinator", remedy)


def _train(
    invocation: Invocation, planned: JobPlan, directory: str, resume: str, init_from: str | None
) -> dict[str, Any]:
    """Train and return the run's summary."""
    from elastic_batch.workloads.build import build_workload  # loads torch

    job, schedule = planned.job, planned.schedule
    display = open_display(invocation.rank, schedule.end, schedule.num_samples)
    with display:
        loggers = _loggers(invocation, job, directory)
        workload = build_workload(
            job, environ=invocation.environ, run_dir=directory, resume=resume, init_from=init_from, loggers=loggers
        )
        with workload.trainer as trainer:
            metrics = _run(workload, display)
            is_lead = trainer.is_lead
    return {
        "is_lead": is_lead,
        "name": job.name,
        "strategy": job.schedule.strategy,
        "seed": job.seed,
        "run_dir": directory,
        "updates": trainer.num_updates,
        "baseline_updates": planned.plan.baseline_updates,
        "samples": trainer.position,
        "epochs": trainer.position / schedule.num_samples,
        "finished": trainer.finished,
        "reason": trainer.stop_reason,
        "metrics": metrics,
    }


def _loggers(invocation: Invocation, job: Job, directory: str) -> list[Any]:
    """The job's experiment trackers, on the worker that leads; which one that is, changes in an elastic job."""
    from elastic_batch.telemetry import GuardedLogger, LateLogger, open_loggers

    def open_all() -> list[Any]:
        return open_loggers(job.loggers, directory, name=job.name, job=job.dump())

    if invocation.is_elastic:
        return [GuardedLogger("trackers", LateLogger(open_all))] if job.loggers else []
    return open_all() if invocation.rank == 0 else []


def _run(workload: Any, display: Display) -> dict[str, float]:
    """Train to the end, evaluating on the way; give the last evaluation."""
    trainer, job = workload.trainer, workload.job
    interval = _interval(job, trainer.schedule)
    metrics: dict[str, float] = {}
    for update in trainer:
        if trainer.last_record:  # the lead's alone
            display.update(trainer.position, trainer.last_record)
        start, stop = update.plan.start, update.plan.stop
        if trainer.finished or (interval is not None and stop // interval > start // interval):
            metrics = workload.evaluate()
            display.evaluation(metrics)
    if trainer.finished and not metrics:  # resumed at the very end, or the last update was skipped
        metrics = workload.evaluate()
    return metrics


def _interval(job: Job, schedule: Any) -> int | None:
    """Samples between evaluations."""
    every = job.evaluation.every
    if every is None:
        return None
    return every.samples(
        num_samples=schedule.num_samples,
        tokens_per_sample=job.data.tokens_per_sample,
        total=schedule.end,
        field="evaluation.every",
    )


def _print_end(summary: dict[str, Any], planned: JobPlan, directory: str, again: str | None, as_json: bool) -> None:
    how = f" Resume with:\n  {again}" if again is not None else ""
    if as_json:
        # JSON has no word for the loss of a run that diverged.
        metrics = {name: value if math.isfinite(value) else None for name, value in summary["metrics"].items()}
        click.echo(json.dumps({**summary, "metrics": metrics}, allow_nan=False))
        if not summary["finished"] and how:
            click.echo(how.lstrip(), err=True)
        return
    updates, baseline = summary["updates"], summary["baseline_updates"]
    if not summary["finished"]:
        click.echo(f"Stopped after update {updates} ({summary['reason']}).{how}")
        return
    measured = ", ".join(f"test {name} {value:.4f}" for name, value in summary["metrics"].items())
    click.echo(f"{planned.job.name}, {planned.plan.rule}: {measured or 'trained'}")
    click.echo(
        f"{updates} updates; plain decay needs {baseline} ({1 - updates / baseline:.0%} saved). Run: {directory}"
    )
