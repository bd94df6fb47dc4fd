"""A plan for people: tables and small charts in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from elastic_batch.cli.output import open_console
from elastic_batch.schedule import Plan, PlanRow, worker_share
from elastic_batch.workloads.planning import JobPlan
from elastic_batch.workloads.step_times import StepTimes, hours

_BARS = " ▁▂▃▄▅▆▇█"
_CHART_COLUMNS = 60
_MOST_ROWS = 30
_MOST_BATCH_COLUMNS = 6
_NOTEWORTHY = 0.95
"""Hours below this part of plain decay's count as time saved; measurements here scatter by a few percent."""


def print_plan(planned: JobPlan, numbers_of_workers: Sequence[int], times: StepTimes | None) -> None:
    """Print a plan: what, phases, chart, workers, verdict.

    Args:
        planned: The plan.
        numbers_of_workers: Rows of the table of workers.
        times: What was measured; None: nothing was.
    """
    console = open_console()
    job, plan = planned.job, planned.plan
    ghost = job.ghost_batch_size or job.micro_batch_size
    console.print(f"[bold]{job.name}[/bold]: {plan.rule}")
    console.print(
        f"{plan.epochs:.4g} epochs of {planned.schedule.num_samples} samples; micro-batches of {job.micro_batch_size}, "
        f"ghost batches of {ghost}; g is the {plan.noise_form} noise scale, {_FORMS[plan.noise_form]}"
    )
    console.print(_phases(plan))
    _print_chart(console, planned)
    console.print(_workers(planned, numbers_of_workers, times))
    for line in _verdict(planned, times):
        console.print(line, soft_wrap=True)


_FORMS = {"linear": "lr N / (B (1 - m))", "exact": "lr (N / B - 1) / (1 - m)"}


def _phases(plan: Plan) -> Table:
    table = Table("epochs", "batch", "micro-batches", "lr", "momentum", "g", "updates", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in plan.rows[:_MOST_ROWS]:
        table.add_row(
            f"{row.start_epoch:.4g} to {row.end_epoch:.4g}",
            str(row.global_batch_size),
            str(row.num_micro_batches),
            _span(row.learning_rate, row.last_learning_rate),
            f"{row.momentum:g}",
            _span(row.noise_scale, row.last_noise_scale),
            str(row.updates),
        )
    left_out = len(plan.rows) - _MOST_ROWS
    if left_out > 0:
        table.add_row(f"... {left_out} more rows (--json has all)")
    saved = 1 - plan.updates / plan.baseline_updates
    table.add_section()
    table.add_row("in all", "", "", "", "", f"{saved:.0%} fewer", str(plan.updates))
    table.add_row("with plain decay", "", "", "", "", "", str(plan.baseline_updates))
    return table


def _span(first: float, last: float) -> str:
    return f"{first:.4g}" if math.isclose(first, last, rel_tol=1e-9) else f"{first:.4g} to {last:.4g}"


def _print_chart(console: Console, planned: JobPlan) -> None:
    """Batch, learning rate and noise scale over the epochs, one line of bars each, on logarithmic scales."""
    schedule = planned.schedule
    positions = [schedule.end * column // _CHART_COLUMNS for column in range(_CHART_COLUMNS)]
    values = [schedule.at(position) for position in positions]
    console.print()
    for label, numbers in (
        ("batch", [float(one.global_batch_size) for one in values]),
        ("lr", [one.learning_rate for one in values]),
        ("g", [schedule.noise_scale(one) for one in values]),
    ):
        console.print(f"{label:>5}  {_bars(numbers)}  {numbers[0]:.4g} to {numbers[-1]:.4g}")
    console.print(f"{'':5}  0{f'{planned.plan.epochs:.4g} epochs':>{_CHART_COLUMNS - 1}}\n")


def _bars(numbers: Sequence[float]) -> str:
    """One character per number, as high as its logarithm between the smallest and the largest."""
    logarithms = [math.log(number) if number > 0 else -math.inf for number in numbers]
    finite = [one for one in logarithms if one > -math.inf] or [0.0]
    low, extent = min(finite), max(finite) - min(finite)
    heights = [1 + round((one - low) / extent * 7) if extent and one > -math.inf else 4 for one in logarithms]
    return "".join(" " if one == -math.inf else _BARS[height] for one, height in zip(logarithms, heights, strict=True))


def _workers(planned: JobPlan, numbers_of_workers: Sequence[int], times: StepTimes | None) -> Table:
    """Micro-batches of the busiest worker and idle share, by phase; speed against one worker; hours."""
    chosen = _some_of_each_batch(planned.plan.rows)
    heads = [f"B {row.global_batch_size}" for row in chosen]
    table = Table("workers", *heads, "speed-up", "plain decay's", box=None, pad_edge=False)
    if times is not None:
        table.add_column("hours")
        table.add_column("plain decay's")
    for column in table.columns:
        column.justify = "right"
    table.title = "micro-batches of the busiest worker (idle share of all), by batch"
    table.title_justify = "left"
    for number in numbers_of_workers:
        shares = [worker_share(row.num_micro_batches, number) for row in chosen]
        cells = [f"{share.num_micro_batches} ({share.idle_share:.0%})" for share in shares]
        speeds = [_speed_up(planned.plan, number), _speed_up(planned.decay, number)]
        costs = [] if times is None else [_hours(planned.plan, number, times), _hours(planned.decay, number, times)]
        table.add_row(str(number), *cells, *speeds, *costs)
    return table


def _some_of_each_batch(rows: Sequence[PlanRow]) -> list[PlanRow]:
    """One row of each batch size, small to large; of many sizes a few, evenly apart, with the first and the last."""
    distinct = sorted({row.global_batch_size: row for row in rows}.values(), key=lambda row: row.global_batch_size)
    most = _MOST_BATCH_COLUMNS - 1
    if len(distinct) <= most:
        return distinct
    return [distinct[index * (len(distinct) - 1) // most] for index in range(most + 1)]


def _speed_up(plan: Plan | None, number: int) -> str:
    if plan is None:
        return "-"
    return f"{plan.micro_batches_in_sequence(1) / plan.micro_batches_in_sequence(number):.3g}x"


def _hours(plan: Plan | None, number: int, times: StepTimes) -> str:
    return "-" if plan is None else f"{hours(plan, number, times):.3g}"


def _verdict(planned: JobPlan, times: StepTimes | None) -> list[str]:
    if times is None:
        return ["Speed-ups count micro-batches in sequence. --measure times this machine and shows hours."]
    widths = ", ".join(f"{one}: {1000 * seconds / one:.3g} ms" for one, seconds in times.pass_seconds.items())
    lines = [
        f"Measured on {times.device}: a micro-batch takes, by micro-batches of a pass, {widths}; an optimizer step "
        f"{1000 * times.step_seconds:.3g} ms.",
        "Hours leave out loading data and reducing gradients.",
    ]
    if planned.decay is not None:
        own, decay = hours(planned.plan, 1, times), hours(planned.decay, 1, times)
        fewer = f"{planned.plan.baseline_updates - planned.plan.updates} fewer updates"
        saved = f"{1 - own / decay:.0%} of the time saved on this machine by itself, in wider passes"
        lines.append(f"{fewer}, {saved if own < _NOTEWORTHY * decay else 'no time saved on this machine by itself'}.")
    return lines
