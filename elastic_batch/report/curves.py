"""Curves: noisy series thinned to what a picture can show, and several seeds joined to a mean with its range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elastic_batch.report.runs import Column, Group

NUM_BINS = 160


@dataclass(frozen=True)
class Curve:
    """Points of a curve: by epoch, by update, the mean over runs and the range that they span."""

    epochs: Column
    updates: Column
    mean: Column
    low: Column
    high: Column


def binned(group: Group, field: str) -> Curve:
    """A field of the updates' records, averaged over equal stretches of training.

    Args:
        group: The runs.
        field: The field's name.
    """
    end = min(run.updates["epoch"][-1] for run in group.runs)
    edges = np.linspace(0.0, end, NUM_BINS + 1)
    rows = [_bin_means(run.updates["epoch"], run.updates[field], edges) for run in group.runs]
    return _joined(group, edges[1:], rows)


def evaluated(group: Group, metric: str) -> Curve:
    """A metric of the evaluations, at the epochs where every run of the group has one."""
    epochs = [run.evaluations["epoch"] for run in group.runs]
    shared = epochs[0][np.all([np.isin(epochs[0], others) for others in epochs], axis=0)]
    rows = [
        run.evaluations.get(metric, np.full(len(run.evaluations["epoch"]), np.nan))[
            np.isin(run.evaluations["epoch"], shared)
        ]
        for run in group.runs
    ]
    return _joined(group, shared, rows)


def stairs(epochs: Column, values: Column) -> tuple[Column, Column]:
    """Only the points at which a piecewise constant series changes, and its last.

    Args:
        epochs: Where each value begins, and one more: where the last one ends.
        values: The values.
    """
    changes = np.concatenate([[True], np.diff(values) != 0])
    return np.append(epochs[:-1][changes], epochs[-1]), np.append(values[changes], values[-1])


def _bin_means(epochs: Column, values: Column, edges: Column) -> Column:
    """The mean in each bin; NaN where it has no value. What is beyond the last edge has no bin."""
    known = ~np.isnan(values) & (epochs <= edges[-1])
    # An update belongs to the bin in which it ends; the last edge belongs to the last bin.
    bins = np.searchsorted(edges, epochs[known], side="left") - 1
    counts = np.bincount(bins, minlength=len(edges) - 1)
    sums = np.bincount(bins, weights=values[known], minlength=len(edges) - 1)
    with np.errstate(invalid="ignore"):
        return sums / np.where(counts, counts, np.nan)


def _joined(group: Group, epochs: Column, rows: Sequence[Column]) -> Curve:
    # A measured noise scale is not always known, and not for every seed at the same time.
    table = np.array(rows)
    known = ~np.isnan(table).all(axis=0)
    table, epochs = table[:, known], epochs[known]
    first = group.runs[0]
    updates = np.interp(epochs, first.updates["epoch"], first.updates["update"])
    return Curve(epochs, updates, np.nanmean(table, axis=0), np.nanmin(table, axis=0), np.nanmax(table, axis=0))
