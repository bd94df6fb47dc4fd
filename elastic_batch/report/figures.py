"""The pictures of a report, each as PNG and SVG; drawn without matplotlib's global state."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elastic_batch.report.panels import draw_batch, draw_learning_rate, draw_loss, draw_metric, draw_noise
from elastic_batch.report.runs import Group

Panel = Callable[[Axes], None]


def draw_figures(groups: Sequence[Group], metric: str | None, output: Path) -> list[Path]:
    """Draw all pictures.

    Args:
        groups: What to draw, at least one.
        metric: The metric of the evaluations; None leaves it out.
        output: A directory that is there.

    Returns:
        The files written.
    """
    schedule: list[Panel] = [lambda axes: draw_learning_rate(axes, groups), lambda axes: draw_batch(axes, groups)]
    noise: list[Panel] = [lambda axes: draw_noise(axes, groups)]
    loss: list[Panel] = [lambda axes: draw_loss(axes, groups), lambda axes: draw_loss(axes, groups, "update")]
    pictures = {"schedule": schedule, "noise": noise, "loss": loss, "overview": [*schedule, *noise, *loss]}
    if metric is not None:
        evaluation: list[Panel] = [
            lambda axes: draw_metric(axes, groups, metric),
            lambda axes: draw_metric(axes, groups, metric, "update"),
        ]
        name = _picture_name(metric, pictures)
        pictures |= {name: evaluation, "overview": [*schedule, *noise, loss[0], *evaluation]}
    title = ", ".join(dict.fromkeys(group.name for group in groups))
    with _style():
        return [path for name, panels in pictures.items() for path in _draw(panels, len(groups), title, output / name)]


def _picture_name(metric: str, others: Collection[str]) -> str:
    """A name for the evaluation's picture that any file system takes, and that no other picture has."""
    name = re.sub(r"[^\w-]+", "-", metric)
    return f"evaluation-{name}" if name.lower() in others else name


def _draw(panels: Sequence[Panel], num_groups: int, title: str, stem: Path) -> list[Path]:
    columns = 3 if len(panels) > 4 else len(panels)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.9 * columns, 2.9 * rows + 0.35), layout="constrained")
    cells = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, axes in zip(panels, cells, strict=False):
        panel(axes)
    for axes in cells[len(panels) :]:
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles[:num_groups], labels[:num_groups], loc="outside upper center", ncols=min(num_groups, 5), title=title
    )
    # Laid out once; each file would do it again.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    files = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    figure.savefig(files[0])
    figure.savefig(files[1], metadata={"Date": None})
    return files


def _style() -> AbstractContextManager[None]:
    """Settings for as long as the pictures are drawn."""
    return matplotlib.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.color": "0.92",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "savefig.dpi": 160,
            # The same runs give the same file, to the byte.
            "svg.hashsalt": "elastic-batch",
        }
    )
