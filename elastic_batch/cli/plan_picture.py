"""A plan as a picture: batch, learning rate and noise scale by epoch, with plain decay beside them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from elastic_batch.errors import InvalidSetting, PackageMissing
from elastic_batch.schedule import PhaseValues, Schedule
from elastic_batch.workloads.planning import JobPlan

_POINTS = 600
_MOST_TICKS = 8


def check_picture(path: Path) -> None:
    """See that a plan can be drawn into a file, before anything is done that takes long.

    Raises:
        InvalidSetting: It ends with neither `.png` nor `.svg`.
        PackageMissing: matplotlib is not installed.
    """
    if path.suffix not in (".png", ".svg"):
        raise InvalidSetting("--plot", str(path), "must end with .png or .svg")
    if find_spec("matplotlib") is None:
        raise PackageMissing("drawing", "matplotlib", "report")


def draw_plan(planned: JobPlan, path: Path) -> None:
    """Draw a plan into a file.

    Args:
        planned: The plan.
        path: Where to, as `check_picture` wants it.
    """
    from matplotlib.figure import Figure  # takes half a second to load

    figure = Figure(figsize=(8, 7), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    figure.suptitle(
        f"{planned.job.name}: {planned.plan.updates} updates, {planned.plan.baseline_updates} with plain decay"
    )
    curves: tuple[tuple[str, Callable[[Schedule, PhaseValues], float]], ...] = (
        ("global batch (samples)", lambda _, values: values.global_batch_size),
        ("learning rate", lambda _, values: values.learning_rate),
        (f"noise scale g ({planned.plan.noise_form})", lambda schedule, values: schedule.noise_scale(values)),
    )
    for panel, (label, read) in zip(panels, curves, strict=True):
        for schedule, name, style in (
            (planned.decay_schedule, "plain decay", "--"),
            (planned.schedule, "this job", "-"),
        ):
            if schedule is not None:
                epochs, values = _sample(schedule, read)
                panel.step(epochs, values, style, where="post", label=name, color="C1" if style == "--" else "C0")
        panel.set_yscale("log", nonpositive="mask")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    sizes = sorted({row.global_batch_size for row in planned.plan.rows})
    if len(sizes) <= _MOST_TICKS:
        panels[0].set_yticks(sizes, [str(size) for size in sizes])
        panels[0].minorticks_off()
    panels[0].legend()
    figure.align_ylabels()
    panels[-1].set_xlabel("epoch")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _sample(schedule: Schedule, read: Callable[[Schedule, PhaseValues], float]) -> tuple[list[float], list[float]]:
    """Values at evenly spaced positions and at the beginning of each phase, by epoch."""
    positions = {schedule.end * point // _POINTS for point in range(_POINTS)}
    positions |= {phase.start for phase in schedule.phases}
    ordered = sorted(positions)
    values = [read(schedule, schedule.at(position)) for position in ordered]
    epochs = [position / schedule.num_samples for position in ordered]
    return [*epochs, schedule.end / schedule.num_samples], [*values, values[-1]]
