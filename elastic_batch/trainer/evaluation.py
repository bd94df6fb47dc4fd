"""Evaluation over the world: every worker takes a part of a data set, sums and weights are added up."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from elastic_batch.data import WorkerInit, iterate, to_device
from elastic_batch.engines import Engine
from elastic_batch.errors import MisusedTrainer, WorkerFailed
from elastic_batch.shares import share
from elastic_batch.trainer.agreement import deviating_ranks
from elastic_batch.trainer.failures import exchange, judge, texts

Pair = tuple[Tensor | float, Tensor | float]
Measure = Callable[[nn.Module, Any], Pair | Mapping[str, Pair]]
"""Of (model, batch): a (sum, weight) pair, or one for each of several names."""
UNNAMED = ""
"""What `evaluate` calls the mean of a single pair."""


def accuracy(model: nn.Module, batch: Any) -> Pair:
    """How many of a batch's samples a classifier gets right.

    Args:
        model: Gives scores [samples, classes].
        batch: (inputs, classes [samples]).

    Returns:
        (number of right answers, number of samples).
    """
    inputs, targets = batch
    return (model(inputs).argmax(dim=1) == targets).sum(), targets.shape[0]


def evaluate(
    engine: Engine,
    model: nn.Module,
    dataset: Dataset[Any],
    measure: Measure,
    *,
    device: torch.device,
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
) -> dict[str, float]:
    """The weighted means of `measure` over `dataset`. A collective: all workers call it together.

    Each worker runs a contiguous part; one without samples runs the first batch with weight 0, to know the names.

    Returns:
        Name -> sum of sums / sum of weights, NaN where these are 0, sorted by name; the name is `UNNAMED` where
        `measure` gives a single pair.

    Raises:
        MisusedTrainer: `measure` gives other names on some worker, or the data set is empty; every worker raises it.
        WorkerFailed: `measure` or the data failed on some worker; every worker raises it.
        WorldBroken: The world broke meanwhile.
    """
    num_samples = len(cast(Sized, dataset))
    part = share(num_samples, engine.size, engine.rank)
    loader = DataLoader(
        Subset(dataset, part or range(min(1, num_samples))),
        batch_size=batch_size,
        collate_fn=collate_fn,
        num_workers=num_workers,
        worker_init_fn=WorkerInit.here() if num_workers else None,
        # A generator of its own: the global one is the user's, and must not move.
        generator=torch.Generator(),
    )
    totals: dict[str, Tensor] = {}
    error: Exception | None = None
    try:
        with _evaluating(model):
            for batch in iterate(loader):
                for name, pair in _named(measure(model, to_device(batch, device))).items():
                    found = _as_tensor(pair, device)
                    # Whoever has no part runs a batch for the names alone.
                    totals[name] = totals.get(name, 0) + (found if part else torch.zeros_like(found))
    except Exception as caught:
        error = caught
    return _total(engine, totals, error, device)


def name_of(measure: Measure) -> str:
    """What records call the mean of a measure that gives a single pair: the function's name, `value` if it has none.

    >>> name_of(accuracy), name_of(lambda model, batch: (0.0, 1.0))
    ('accuracy', 'value')
    """
    name = str(getattr(measure, "__name__", ""))
    return name if name.isidentifier() else "value"


def _total(
    engine: Engine, totals: dict[str, Tensor], error: Exception | None, device: torch.device
) -> dict[str, float]:
    failures = exchange(engine, judge(error, 1) if error else None, device)
    if failures:
        raise WorkerFailed("the evaluation", texts(failures)) from error
    names = sorted(totals)
    _require_same_names(engine, names, device)
    if not names:
        raise MisusedTrainer("the data set to evaluate on is empty")
    summed = torch.stack([totals[name] for name in names])  # (name, sum and weight)
    engine.all_reduce(summed).wait()
    return {
        name: value / weight if weight else math.nan
        for name, (value, weight) in zip(names, summed.tolist(), strict=True)
    }


def _require_same_names(engine: Engine, names: list[str], device: torch.device) -> None:
    """See that what is added up over the workers belongs together."""
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    if engine.size > 1 and (ranks := deviating_ranks(engine, int.from_bytes(digest[:6]), device)):
        raise MisusedTrainer(
            f"the measure gives other names on workers {', '.join(map(str, ranks))} than on the others; here it gives "
            f"{', '.join(map(repr, names)) or 'none'}. Give every name for each batch, with weight 0 where nothing "
            "counts"
        )


def _named(result: Pair | Mapping[str, Pair]) -> Mapping[str, Pair]:
    named = result if isinstance(result, Mapping) else {UNNAMED: result}
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in named.values()):
        raise MisusedTrainer("the measure must give a (sum, weight) pair, or a dict of such pairs by name")
    return named


def _as_tensor(pair: Pair, device: torch.device) -> Tensor:
    return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device).detach() for number in pair])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
