"""What measuring the noise scale costs an update: its share of one that takes at least 100 ms stays under 1 %.

Run `python benchmarks/bench_noise.py`: JSON to stdout, a table to stderr. The cost does not depend on the number of
samples, so it is measured where it shows: trainers with and without `measure_noise` take turns at updates of tiny
micro-batches. Their difference is then compared with an update of usual micro-batches, of the same model.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import closing
from dataclasses import asdict, dataclass, replace

import torch
from loops import WORKLOADS, Workload, block, trainer_loop
from pairs import Clock, Ratio, difference_of, elapsed, interleave, publish, read_options, trusted_clock

BOUND = 0.01
LEAST_SECONDS = 0.1  # of the update that the cost is compared with
TINY_PAIRS = 8  # for each pair that is asked for: such updates are short, their difference is small
TINY_MICRO_BATCH = 2
MICRO_BATCHES = 4  # of an update
WARM_UPS = 3
REPEATS = 7


@dataclass(frozen=True, slots=True)
class Cost:
    """What measuring costs."""

    model: str
    parameters: int
    clock: str
    microseconds: list[float]
    """The median and its interval."""
    update_milliseconds: float
    share: Ratio
    """Of the update."""


def measure(name: str, num_pairs: int) -> Cost:
    """One model's cost, beside an update of it that is long enough."""
    tiny = replace(WORKLOADS[name], micro_batch_size=TINY_MICRO_BATCH)
    with (
        closing(trainer_loop(tiny, num_micro_batches=MICRO_BATCHES, measure_noise=True)) as on,
        closing(trainer_loop(tiny, num_micro_batches=MICRO_BATCHES, measure_noise=False)) as off,
    ):
        interleave(block(on), block(off), WARM_UPS)
        pairs = interleave(block(on), block(off), TINY_PAIRS * num_pairs)
    clock = trusted_clock(pairs)
    cost = difference_of(pairs, clock)
    update = usual_update(WORKLOADS[name], clock)
    return Cost(
        model=name,
        parameters=sum(parameter.numel() for parameter in tiny.make_model().parameters()),
        clock=clock,
        microseconds=[round(1e6 * value, 1) for value in cost],
        update_milliseconds=round(1e3 * update, 1),
        share=Ratio(*(round(value / update, 5) for value in cost)),
    )


def usual_update(workload: Workload, clock: Clock) -> float:
    """Seconds of an update that takes LEAST_SECONDS or more: as many micro-batches as that needs."""
    num_micro_batches = MICRO_BATCHES
    while True:
        with closing(trainer_loop(workload, num_micro_batches=num_micro_batches, measure_noise=False)) as loop:
            seconds = statistics.median([elapsed(block(loop)).by(clock) for _ in range(WARM_UPS + REPEATS)][WARM_UPS:])
        if seconds >= LEAST_SECONDS:
            return seconds
        num_micro_batches *= 2


HEAD = ("model", "parameters", "cost us", "update ms", "share of it", "at most 1 %")


def row(cost: Cost) -> list[object]:
    """A model's line in the table."""
    middle, low, high = (100 * value for value in (cost.share.ratio, cost.share.low, cost.share.high))
    return [
        cost.model,
        cost.parameters,
        cost.microseconds[0],
        cost.update_milliseconds,
        f"{middle:.2f} % [{low:.2f}, {high:.2f}]",
        f"{cost.share.verdict(at_most=BOUND)} ({cost.clock})",
    ]


def main() -> int:
    """Measure every model and print the figures."""
    options = read_options(__doc__, quick="few pairs", only="models")
    torch.set_num_threads(1)
    costs = [measure(name, options.pairs) for name in WORKLOADS if options.only in name]
    cases = [asdict(cost) | {"promise": cost.share.verdict(at_most=BOUND)} for cost in costs]
    results = {"bound": BOUND, "pairs": TINY_PAIRS * options.pairs, "cases": cases}
    publish("noise", results, [HEAD, *map(row, costs)])
    return int(options.check and any(case["promise"] == "broken" for case in cases))


if __name__ == "__main__":
    sys.exit(main())
