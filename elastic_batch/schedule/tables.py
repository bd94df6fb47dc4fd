"""A table of learning rates as curves: cut where it turns, so that each stretch rises, falls or stays."""

from __future__ import annotations

from array import array
from fractions import Fraction
from itertools import pairwise

from elastic_batch.schedule.curves import Constant, Span, Table


def table_spans(entries: array[float], start: int, stop: int, period: Fraction) -> list[Span]:
    """Lay a table out from `start` to `stop`, one entry per `period` samples.

    Neighbours that are equal become a constant, so that a multi-step schedule has one span per step. The last entry
    holds to `stop`.
    """
    table = Table(entries, start, period.numerator, period.denominator)
    cuts = [*_stretches(entries), len(entries)]
    spans = []
    for first, after in pairwise(cuts):
        constant = entries[first] == entries[after - 1]
        curve = Constant(entries[first]) if constant else table
        spans.append(Span(table.begin(first), table.begin(after) if after < len(entries) else stop, curve))
    # Periods shorter than a sample leave entries that no position has.
    return [span for span in spans if span.start < span.stop]


def _stretches(entries: array[float]) -> list[int]:
    """Give the first index of each longest run that rises, falls or stays, from left to right."""
    starts, direction = [0], None
    for index in range(1, len(entries)):
        step = (entries[index] > entries[index - 1]) - (entries[index] < entries[index - 1])
        if direction is None:
            direction = step
        elif step != direction:
            # The first entry of a plateau ended the stretch before it; it belongs to the plateau.
            starts.append(index - 1 if step == 0 and starts[-1] < index - 1 else index)
            direction = 0 if step == 0 else None
    return starts
