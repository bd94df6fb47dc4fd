"""First batches, which come some times more before they count: what is taken on trust is tried on them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from elastic_batch.data import NotDivisibleError, cut, duplicate
from elastic_batch.ghost import RunningStatistics
from elastic_batch.trainer.buffers import preserved_buffers
from elastic_batch.trainer.mean_check import MeanCheck
from elastic_batch.trainer.pass_check import PassCheck
from elastic_batch.trainer.steering import SteeredOptimizer

Part = tuple[Any, list[int]]
"""A batch or a part of it, and the seeds of its micro-batches; none where it may draw what it likes."""


class FirstBatches:
    """Has the run's first batch compared with its halves, and its first wide pass with the micro-batches.

    Args:
        model: The model, unwrapped.
        optimizer: Has the parameters whose gradients are compared.
        statistics: Of the model's ghost norms; what they collect meanwhile is forgotten.
        check_loss: Whether the first batch is compared: whether the loss is a mean over samples.

    Attributes:
        obstacle: Why passes must not have several micro-batches, as far as the batch at hand showed it.
    """

    def __init__(
        self, model: nn.Module, optimizer: SteeredOptimizer, statistics: RunningStatistics, *, check_loss: bool
    ) -> None:
        self.obstacle: str | None = None
        self._model = model
        self._optimizer = optimizer
        self._statistics = statistics
        self._loss_unchecked, self._pass_unchecked = check_loss, True
        self._check: MeanCheck | PassCheck | None = None

    @property
    def is_comparing(self) -> bool:
        """Whether the part at hand is to be answered by `record`."""
        return self._check is not None

    def parts(self, batch: Any, seeds: list[int], micro_batch_size: int) -> Generator[Part, None, None]:
        """What comes before a batch that is the first of its kind: the whole and its parts.

        Args:
            batch: The batch.
            seeds: Of each of its micro-batches.
            micro_batch_size: In samples.

        Raises:
            MisusedTrainer: The loss is no mean over samples.
        """
        self.obstacle = self._check = None  # what an earlier loop left unanswered is not asked for any more
        if self._loss_unchecked:
            self._loss_unchecked = False
            yield from self._for_the_loss(batch, len(seeds) * micro_batch_size)
        if self._pass_unchecked and len(seeds) > 1:
            self._pass_unchecked = False
            yield from self._for_the_pass(batch, seeds, micro_batch_size)

    def record(self, loss: Tensor, weight: Tensor | float | None, stray: str | None) -> None:
        """Take the answer to a part.

        Args:
            loss: A mean over samples, or a sum.
            weight: The sum's; None for a mean.
            stray: Why draws in the forward pass do not follow the micro-batches, if they do not.
        """
        if isinstance(self._check, PassCheck):
            self._check.record(loss, weight, stray)
        elif self._check is not None and weight is None:
            self._check.record(loss)

    def _for_the_loss(self, batch: Any, num_samples: int) -> Generator[Part, None, None]:
        check = self._check = MeanCheck(self._model, batch, num_samples)
        try:
            with closing(check.parts()) as parts:
                for part in parts:
                    yield part, []
            check.verify()
        except GeneratorExit:
            check.explain()
            raise
        finally:
            self._check = None

    def _for_the_pass(self, batch: Any, seeds: list[int], size: int) -> Generator[Part, None, None]:
        try:
            parts = [cut(batch, i * size, (i + 1) * size, len(seeds) * size) for i in range(len(seeds))]
        except NotDivisibleError as error:
            self.obstacle = f"they cannot be compared with a wider one, because {error}"
            return
        whole_and_parts = [(duplicate(batch), seeds), *zip(parts, ([seed] for seed in seeds), strict=True)]
        trained = [parameter for parameter in self._optimizer.parameters if parameter.requires_grad]
        check = self._check = PassCheck(trained, len(seeds))
        try:
            with preserved_buffers(self._model), torch.compiler.set_stance("force_eager"):
                for part, its_seeds in whole_and_parts:
                    self._statistics.samples_per_pass = len(its_seeds) * size
                    yield part, its_seeds
        finally:
            self._check = None
            self._statistics.begin()
        self.obstacle = check.obstacle()
