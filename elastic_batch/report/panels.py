"""The panels of the pictures: each draws one quantity of all groups on given axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from elastic_batch.report.curves import Curve, binned, evaluated, stairs
from elastic_batch.report.runs import Group

Abscissa = Literal["epoch", "update"]

# Okabe and Ito's colours, told apart with every kind of colour blindness; dashes tell them apart in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ((), (5, 1.5), (1.5, 1.2), (6, 1.5, 1.5, 1.5), (3, 1), (8, 2), (1, 1))
_MOST_BOUNDARIES = 12


@dataclass(frozen=True)
class Style:
    """How a group's curves look in every panel."""

    colour: str
    dashes: tuple[float, ...]
    width: float


def styled(groups: Sequence[Group]) -> Iterator[tuple[Group, Style]]:
    """Each group with its style; where curves coincide the later ones are thinner, so that the earlier ones show."""
    for index, group in enumerate(groups):
        width = max(1.3, 2.8 - 0.6 * index) if len(groups) > 1 else 1.8
        yield group, Style(_COLOURS[index % len(_COLOURS)], _DASHES[index % len(_DASHES)], width)


def draw_learning_rate(axes: Axes, groups: Sequence[Group]) -> None:
    """The learning rate by epoch."""
    _draw_stairs(axes, groups, "learning_rate")
    axes.set_yscale("log")
    axes.set_ylabel("learning rate")
    _tidy_log(axes)


def draw_batch(axes: Axes, groups: Sequence[Group]) -> None:
    """The global batch by epoch."""
    _draw_stairs(axes, groups, "global_batch_size")
    axes.set_yscale("log", base=2)
    axes.set_ylabel("global batch (samples)")
    axes.yaxis.set_major_formatter(FuncFormatter(_grouped_digits))


def draw_noise(axes: Axes, groups: Sequence[Group]) -> None:
    """The scheduled noise scale as stairs, the measured one as dots of the same colour."""
    _draw_stairs(axes, groups, "noise_scale")
    for group, style in styled(groups):
        measured = binned(group, "measured_noise_scale")
        positive = measured.mean > 0
        axes.plot(
            measured.epochs[positive], measured.mean[positive], ".", color=style.colour, markersize=2.5, alpha=0.6,
            label="measured",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylabel("scheduled g (lines), measured\nnoise scale in samples (dots)")
    _tidy_log(axes)


def draw_loss(axes: Axes, groups: Sequence[Group], abscissa: Abscissa = "epoch") -> None:
    """The training loss, averaged over short stretches."""
    curves = [(binned(group, "loss"), group, style) for group, style in styled(groups)]
    _draw_curves(axes, curves, abscissa)
    axes.set_ylabel("training loss")
    values = np.concatenate([curve.mean for curve, _, _ in curves])
    if np.isfinite(values).any() and not (values <= 0).any():  # a likelihood's may be negative
        axes.set_yscale("log")
        _tidy_log(axes)


def draw_metric(axes: Axes, groups: Sequence[Group], metric: str, abscissa: Abscissa = "epoch") -> None:
    """A metric of the evaluations; an accuracy in per cent, from where most of the training happens."""
    curves = [(evaluated(group, metric), group, style) for group, style in styled(groups)]
    _draw_curves(axes, curves, abscissa)
    axes.set_ylabel(f"test {metric}")
    values = np.concatenate([curve.mean for curve, _, _ in curves])
    values = values[np.isfinite(values)]
    if metric != "accuracy" or not values.size:
        return
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    # The first epochs would squeeze the differences that matter into the top of the panel.
    low, high = np.quantile(values, 0.15), values.max()
    bottom = max(0.0, low - 0.15 * (high - low) - 0.005)
    axes.set_ylim(bottom, min(1.0, high + 0.08 * (high - low) + 0.005))
    if (lowest := np.nanmin(np.concatenate([curve.low for curve, _, _ in curves]))) < bottom:
        axes.set_ylabel(f"test {metric} (cut; lowest {lowest:.0%})")


def _draw_stairs(axes: Axes, groups: Sequence[Group], field: str) -> None:
    for group, style in styled(groups):
        # All seeds of a group follow one schedule: the first stands for them.
        run = group.runs[0]
        column = run.planned_batches if field == "global_batch_size" else run.updates[field]
        epochs, values = stairs(np.append(run.starts, run.updates["epoch"][-1]), column)
        positive = values > 0
        axes.step(
            epochs[positive], values[positive], where="post", label=group.label,
            color=style.colour, linewidth=style.width, dashes=style.dashes or (None, None),
        )  # fmt: skip
    _mark_boundaries(axes, groups)
    axes.set_xlabel("epoch")
    axes.margins(x=0.02)
    axes.set_xlim(left=0)


def _draw_curves(axes: Axes, curves: Sequence[tuple[Curve, Group, Style]], abscissa: Abscissa) -> None:
    for curve, group, style in curves:
        across = curve.epochs if abscissa == "epoch" else curve.updates
        axes.plot(
            across, curve.mean, label=group.label,
            color=style.colour, linewidth=0.8 * style.width, dashes=style.dashes or (None, None),
        )  # fmt: skip
        if len(group.runs) > 1:
            axes.fill_between(across, curve.low, curve.high, color=style.colour, alpha=0.18, linewidth=0)
        if abscissa == "update":
            _mark_on_curve(axes, curve, group, style)
    if abscissa == "epoch":
        _mark_boundaries(axes, [group for _, group, _ in curves])
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(_grouped_digits))
    axes.set_xlabel("epoch" if abscissa == "epoch" else "update")
    axes.margins(x=0.02)
    axes.set_xlim(left=0)


def _grouped_digits(value: float, _: int) -> str:
    return f"{value:,.0f}".replace(",", "\N{THIN SPACE}")


def _mark_boundaries(axes: Axes, groups: Sequence[Group]) -> None:
    """A line where a phase begins; a schedule that changes all the time has none."""
    epochs = np.sort(np.concatenate([group.runs[0].boundaries for group in groups]))
    # One milestone begins a phase at the next update, which is a little later where the batch is larger.
    length = max(group.runs[0].updates["epoch"][-1] for group in groups)
    distinct = epochs[np.diff(epochs, prepend=-length) > length / 100]
    if len(distinct) <= _MOST_BOUNDARIES:
        for epoch in distinct:
            axes.axvline(epoch, color="0.8", linewidth=0.8, zorder=0)


def _mark_on_curve(axes: Axes, curve: Curve, group: Group, style: Style) -> None:
    """A dot on the curve where a phase begins, since the same epoch is another update for every group."""
    run = group.runs[0]
    if not 0 < len(run.boundaries) <= _MOST_BOUNDARIES or not curve.updates.size:
        return
    updates = np.interp(run.boundaries, run.updates["epoch"], run.updates["update"])
    axes.plot(
        updates, np.interp(updates, curve.updates, curve.mean), "o",
        color=style.colour, markersize=4, markeredgecolor="white", markeredgewidth=0.7,
    )  # fmt: skip


def _tidy_log(axes: Axes) -> None:
    """Plain numbers: at 1, 2 and 5 of each power of ten, more within one power, fewer over many."""
    low, high = axes.get_ylim()
    steps: tuple[float, ...] = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    if high < 8 * low:
        steps = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
