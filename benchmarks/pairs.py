"""Two pieces of work measured in turn, many times: their ratio with a 95 % interval, and one form of output."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

NUM_PAIRS = 24
_RESAMPLES = 10_000
_OURS_ALONE = 0.9  # of the wall time spent computing

Work = Callable[[], object]
Clock = Literal["wall", "cpu"]
Verdict = Literal["holds", "broken", "undecided"]


@dataclass(frozen=True, slots=True)
class Elapsed:
    """What a piece of work took, in seconds."""

    wall: float
    """By the wall."""
    cpu: float
    """Of processor time: this process's threads, or all workers' together."""

    def by(self, clock: Clock) -> float:
        """The seconds of one of the two clocks."""
        return self.wall if clock == "wall" else self.cpu

    def divided(self, parts: int) -> Elapsed:
        """What one of so many equal parts took."""
        return Elapsed(self.wall / parts, self.cpu / parts)


Pair = tuple[Elapsed, Elapsed]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio and its 95 % interval, by bootstrap: over pairs the median, over rounds of pairs the medians' mean."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def verdict(self, *, at_least: float | None = None, at_most: float | None = None) -> Verdict:
        """Whether a bound holds, so far as the whole interval says so."""
        if (at_least is None or self.low >= at_least) and (at_most is None or self.high <= at_most):
            return "holds"
        is_outside = (at_least is not None and self.high < at_least) or (at_most is not None and self.low > at_most)
        return "broken" if is_outside else "undecided"


@dataclass(frozen=True, slots=True)
class Options:
    """What every benchmark can be told."""

    pairs: int
    quick: bool
    check: bool
    only: str


def read_options(description: str | None, *, quick: str, only: str = "cases", pairs: int = NUM_PAIRS) -> Options:
    """Read the command line.

    Args:
        description: What the benchmark says about itself.
        quick: What it leaves out for a quick look.
        only: What it has several of.
        pairs: How many there are by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--check", action="store_true", help="exit code 1 where a promise is surely broken")
    parser.add_argument("--only", default="", help=f"{only} whose description contains this")
    parser.add_argument("--pairs", type=int, help=f"how many pairs; default: {pairs}, or 6 with --quick")
    given = parser.parse_args()
    return Options(given.pairs or (6 if given.quick else pairs), given.quick, given.check, given.only)


def elapsed(work: Work) -> Elapsed:
    """Run `work` and say what it took, with what it left to a CUDA device."""
    _synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    _synchronize()
    spent = Elapsed(time.perf_counter() - wall, time.process_time() - cpu)
    del result  # freeing it is not part of the work
    return spent


def interleave(
    first: Work, second: Work, num_pairs: int = NUM_PAIRS, measure: Callable[[Work], Elapsed] = elapsed
) -> list[Pair]:
    """Measure both in turn: neighbours in time, so that what else the machine does meets both alike.

    Args:
        first: The one; in every other pair it runs second.
        second: The other.
        num_pairs: How often.
        measure: Runs a piece of work and says what it took.

    Returns:
        What (first, second) took, for each pair.
    """
    pairs = []
    for number in range(num_pairs):
        if number % 2:
            one = measure(first)
            pairs.append((one, measure(second)))
        else:
            other = measure(second)
            pairs.append((measure(first), other))
    return pairs


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Estimate by what factor the numerators exceed the denominators, pair by pair.

    The median is that of pairs, so that neither a slow drift of the machine nor a few disturbed pairs move it.
    """
    return Ratio(*(round(value, 4) for value in _median(np.asarray(numerators) / np.asarray(denominators))))


def ratio_of(pairs: Sequence[Pair], clock: Clock) -> Ratio:
    """By what factor the first of each pair takes longer than the second."""
    return ratio([one.by(clock) for one, _ in pairs], [other.by(clock) for _, other in pairs])


def ratio_of_rounds(rounds: Sequence[Sequence[Pair]], clock: Clock) -> Ratio:
    """As `ratio_of`, of pairs that several processes measured: the mean of their medians.

    The interval is by bootstrap over the rounds: pairs of one process have its layout of memory in common.
    """
    if len(rounds) == 1:
        return ratio_of(rounds[0], clock)
    medians = np.array([ratio_of(pairs, clock).ratio for pairs in rounds])
    drawn = np.random.default_rng(0).choice(medians, (_RESAMPLES, len(medians))).mean(axis=1)
    return Ratio(*(round(float(value), 4) for value in (medians.mean(), *np.quantile(drawn, (0.025, 0.975)))))


def milliseconds(spent: Sequence[Elapsed], clock: Clock, parts: int = 1) -> float:
    """The median time of one of the `parts` that a piece of work has."""
    return round(1e3 * statistics.median(each.by(clock) for each in spent) / parts, 3)


def trusted_clock(pairs: Sequence[Pair], num_processes: int = 1) -> Clock:
    """The wall clock if the processors were ours alone, else processor time, which others disturb far less.

    Args:
        pairs: Of work that keeps one thread of each process busy.
        num_processes: How many share the work; processor time is their sum.
    """
    if torch.cuda.is_available():
        return "wall"
    used = statistics.median(each.cpu / each.wall for pair in pairs for each in pair) / num_processes
    return "wall" if used > _OURS_ALONE else "cpu"


def difference_of(pairs: Sequence[Pair], clock: Clock) -> tuple[float, float, float]:
    """By how many seconds the first of each pair takes longer: the median, and its 95 % interval as for ratios."""
    return _median(np.array([one.by(clock) - other.by(clock) for one, other in pairs]))


def publish(benchmark: str, results: Mapping[str, Any], table: Sequence[Sequence[object]]) -> None:
    """Print the results: one JSON object to stdout, and a table for people, its head first, to stderr."""
    machine = {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": benchmark, "machine": machine, **results}, indent=1))
    texts = [[str(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=sys.stderr)


def _median(values: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """The median and its 95 % interval, by bootstrap."""
    drawn = np.random.default_rng(0).choice(values, (_RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(np.median(values)), float(low), float(high)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
