"""Ghost batch norm against torch's batch norm: the norm alone at the shapes of WRN-16-4, and a whole training step.

Run `python benchmarks/bench_ghost.py`: JSON to stdout, a table to stderr. One thread; micro-batch 128, ghosts of 32 and
of 128; contiguous and channels-last memory. Both take turns, so that what else the machine does meets both alike; the
total over the shapes is weighted by time, as often as each occurs in the network. A step takes seconds, in which the
machine changes its pace; so the two networks take turns after each block, forward and backward. Each comparison has a
fresh process, whose heap is as the trainer sets it: what large results cost depends on what was freed before. Promised
are at most 1.05 for the norms, 1.02 for the step, and nothing extra (1.01) where the ghost is the micro-batch.
`--quick` for a look, `--check` to fail where a promise is not kept.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any, ParamSpec, TypeVar

import torch
from pairs import Elapsed, Pair, Work, interleave, milliseconds, publish, ratio_of, read_options, trusted_clock
from torch import Tensor, nn
from torch.nn import functional as F

from elastic_batch.ghost import GhostBatchNorm2d, RunningStatistics, convert_batch_norm
from elastic_batch.trainer.heap import keep_freed_memory
from elastic_batch.workloads.models import ResidualNet, wide_resnet

MICRO_BATCH = 128
BOUND_NORMS, BOUND_STEP, BOUND_ONE_GHOST = 1.05, 1.02, 1.01
WARM_UPS = 2
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
Shape = tuple[int, int, int]  # channels, height, width
Given = ParamSpec("Given")
Found = TypeVar("Found")


def network() -> ResidualNet:
    """WRN-16-4 for CIFAR-10."""
    return wide_resnet(16, 4, channels_in=3, num_classes=10)


def norm_shapes() -> Counter[Shape]:
    """What the network's batch norms get, and how often."""
    found: Counter[Shape] = Counter()
    model = network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, args: found.update([tuple(args[0].shape[1:])]))
    model(torch.zeros(2, 3, 32, 32))
    return found


def compare_norms(shape: Shape, ghost: int, named_format: str, num_pairs: int) -> list[Pair]:
    """Forward and backward of one norm: (ours, torch's) for each pair."""
    memory_format = FORMATS[named_format]
    x, grad = torch.randn(2, MICRO_BATCH, *shape).unbind()
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    grad = grad.contiguous(memory_format=memory_format)
    plain, ours = nn.BatchNorm2d(shape[0]), GhostBatchNorm2d(shape[0], ghost)
    statistics = RunningStatistics(ours)
    pairs = interleave(norm_work(ours, x, grad), norm_work(plain, x, grad), num_pairs + WARM_UPS)
    statistics.close()
    return pairs[WARM_UPS:]


def norm_work(norm: nn.BatchNorm2d, x: Tensor, grad: Tensor) -> Work:
    """One forward and backward."""
    return lambda: torch.autograd.grad(norm(x), (x, norm.weight, norm.bias), grad)


def compare_steps(ghost: int, named_format: str, num_pairs: int) -> list[Pair]:
    """A training step of the network, running statistics included: (ours, torch's) for each pair."""
    memory_format = FORMATS[named_format]
    images = torch.randn(MICRO_BATCH, 3, 32, 32).contiguous(memory_format=memory_format)
    labels = torch.randint(10, (MICRO_BATCH,))
    converted = network()
    convert_batch_norm(converted, ghost)
    statistics = RunningStatistics(converted)

    def update_statistics() -> None:
        statistics.commit(statistics.sums())
        statistics.begin()

    ours = steps(converted, memory_format, images, labels, update_statistics)
    plain = steps(network(), memory_format, images, labels, lambda: None)
    num_pieces = 2 * (len(converted.blocks) + 2) + 1
    pieces = interleave(lambda: next(ours), lambda: next(plain), (num_pairs + 1) * num_pieces)
    statistics.close()
    by_step = [pieces[start : start + num_pieces] for start in range(num_pieces, len(pieces), num_pieces)]
    return [(together(one for one, _ in step), together(other for _, other in step)) for step in by_step]


def steps(
    model: ResidualNet, memory_format: torch.memory_format, images: Tensor, labels: Tensor, finish: Callable[[], None]
) -> Iterator[None]:
    """Steps of SGD with momentum, in pieces: stem, each block and head forward, then backward, then the update."""

    def loss(features: Tensor) -> Tensor:
        return F.cross_entropy(model.head(features), labels)

    model.to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    while True:
        optimizer.zero_grad()
        handed: list[tuple[Tensor, Tensor]] = []
        result, gradient = images, None
        for part in (model.stem, *model.blocks, loss):
            taken = result.detach().requires_grad_(part is not model.stem)
            result = part(taken)
            handed.append((taken, result))
            yield
        while handed:
            taken, result = handed.pop()
            result.backward(gradient)
            gradient = taken.grad
            yield
        optimizer.step()
        finish()
        yield


def total(by_shape: dict[Shape, list[Pair]], counts: Counter[Shape]) -> list[Pair]:
    """The pairs of all the network's norms together."""
    rounds = zip(*(by_shape[shape] for shape in counts.elements()), strict=True)
    return [(together(one for one, _ in each), together(other for _, other in each)) for each in rounds]


def together(parts: Iterable[Elapsed]) -> Elapsed:
    """What several pieces of work took in all."""
    spent = list(parts)
    return Elapsed(sum(each.wall for each in spent), sum(each.cpu for each in spent))


def summarize(what: str, memory_format: str, ghost: int, pairs: list[Pair], bound: float | None) -> dict[str, Any]:
    """One line's figures."""
    clock = trusted_clock(pairs)
    found = ratio_of(pairs, clock)
    ours, plain = zip(*pairs, strict=True)
    return {
        "what": what,
        "memory_format": memory_format,
        "ghost_batch_size": ghost,
        "plain_milliseconds": milliseconds(plain, clock),
        "ghost_milliseconds": milliseconds(ours, clock),
        "clock": clock,
        **asdict(found),
        "at_most": bound,
        "promise": found.verdict(at_most=bound) if bound else "",
    }


def apart(work: Callable[Given, Found], *args: Given.args, **named: Given.kwargs) -> Found:
    """Do a piece of work in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), prepare) as processes:
        return processes.submit(work, *args, **named).result()


def prepare() -> None:
    """What each process begins with."""
    torch.set_num_threads(1)
    keep_freed_memory()


def measure_norms(memory_format: str, ghost: int, num_pairs: int) -> list[dict[str, Any]]:
    """Every shape, then their total."""
    counts = norm_shapes()
    by_shape = {shape: apart(compare_norms, shape, ghost, memory_format, num_pairs) for shape in counts}
    lines = [
        summarize(f"{counts[shape]} norms of {'x'.join(map(str, shape))}", memory_format, ghost, pairs, None)
        for shape, pairs in by_shape.items()
    ]
    bound = BOUND_ONE_GHOST if ghost == MICRO_BATCH else BOUND_NORMS
    return [*lines, summarize("all norms", memory_format, ghost, total(by_shape, counts), bound)]


HEAD = ("what", "memory", "ghost", "plain ms", "ghost ms", "ratio", "interval", "clock", "at most", "promise")


def row(line: dict[str, Any]) -> list[object]:
    """A line of the table."""
    names = ("what", "memory_format", "ghost_batch_size", "plain_milliseconds", "ghost_milliseconds", "ratio")
    interval = f"{line['low']:.3f} to {line['high']:.3f}"
    return [*(line[name] for name in names), interval, line["clock"], line["at_most"] or "", line["promise"]]


def main() -> int:
    """Measure all and print the figures."""
    options = read_options(__doc__, quick="few pairs, no training step", only="what is measured (norms, step)")
    lines = []
    for memory_format in FORMATS:
        if options.only in "norms":
            for ghost in (MICRO_BATCH // 4, MICRO_BATCH):
                lines += measure_norms(memory_format, ghost, options.pairs)
        if options.only in "step" and not options.quick:
            pairs = apart(compare_steps, MICRO_BATCH // 4, memory_format, options.pairs)
            lines.append(summarize("training step", memory_format, MICRO_BATCH // 4, pairs, BOUND_STEP))
    said = {"micro_batch_size": MICRO_BATCH, "pairs": options.pairs, "cases": lines}
    publish("ghost", said, [HEAD, *map(row, lines)])
    return int(options.check and any(line["promise"] == "broken" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
