"""Is a user's mean loss really the mean over samples? The first micro-batch is compared with its two halves."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from elastic_batch.data import NotDivisibleError, cut
from elastic_batch.errors import MisusedTrainer
from elastic_batch.randomness import GeneratorState
from elastic_batch.trainer.buffers import preserved_buffers
from elastic_batch.trainer.gradient_comparison import GradientComparison

logger = logging.getLogger(__name__)


class MeanCheck:
    """Compares a loss's gradient over a micro-batch with those over its halves, uncompiled and without randomness.

    With `ignore_index`, class weights or negatives taken from the batch, a mean over the batch is not the mean of its
    samples' losses, and dividing the summed gradient by the number of samples would change with the micro-batch size.
    Gradients show that where losses do not: in an untrained classifier all samples have nearly the same loss.

    Norms, dropout and whatever else has no modules inside are in evaluation mode meanwhile, where samples do not
    influence each other. The rest of the model stays as it is, because some models answer with something else in
    evaluation mode; but if anything draws at random, there is a second round with all of it in evaluation mode. What
    draws even then (mixup, the noise of a diffusion model) is left alone: the parts cannot be compared.

    It runs under the autocast of whoever asks for its parts. Hooks may change gradients as they like: where there are
    any, nothing is compared.

    Args:
        model: Every module's own mode, and its buffers, are put back.
        batch: A micro-batch.
        num_samples: Its samples, along the first axis of its tensors.
    """

    def __init__(self, model: nn.Module, batch: Any, num_samples: int) -> None:
        self._model = model
        self._batch = batch
        self._num_samples = num_samples
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._share = 0.0
        self._comparison = GradientComparison(self._parameters)

    def parts(self) -> Generator[Any, None, None]:
        """The whole batch and its halves, each to be answered by `record`; nothing if it cannot be halved."""
        half = self._num_samples // 2
        if half == 0 or any(parameter._backward_hooks for parameter in self._parameters):
            return
        try:
            cut(self._batch, 0, half, self._num_samples)
        except NotDivisibleError as error:
            logger.debug("the loss is not compared with those of halves: %s", error)
            return
        plain = [module for module in self._model.modules() if _is_plain(module)]
        for modules in (plain, list(self._model.modules())):
            before = GeneratorState(self._parameters[0].device if self._parameters else None)
            yield from self._round(modules, half)
            if before.is_current():
                return
        logger.info("the loss is not compared with those of halves: it draws random numbers, for each part others")
        self._comparison = GradientComparison(self._parameters)

    def _round(self, modules: list[nn.Module], half: int) -> Iterator[Any]:
        """The parts, with these modules in evaluation mode."""
        self._comparison = GradientComparison(self._parameters)
        modes = [(module, module.training) for module in modules]
        with_cudnn = torch.backends.cudnn.enabled
        for module in modules:
            module.training = False
        # Recurrent layers of cuDNN have no backward in evaluation mode.
        torch.backends.cudnn.enabled = False
        try:
            with torch.compiler.set_stance("force_eager"):
                for start, stop in ((0, self._num_samples), (0, half), (half, self._num_samples)):
                    self._share = (stop - start) / self._num_samples
                    with preserved_buffers(self._model):
                        yield cut(self._batch, start, stop, self._num_samples)
            self._share = 0.0
        finally:
            torch.backends.cudnn.enabled = with_cudnn
            for module, mode in modes:
                module.training = mode

    def explain(self) -> None:
        """Say why the user's code got half a micro-batch, if that is where it failed: its error does not."""
        if 0 < self._share < 1:
            logger.warning(
                "the loop got no further than half a micro-batch: the first one comes in halves too, to check the "
                "loss; if the model takes whole micro-batches only, say check_loss=False"
            )

    def record(self, loss: Tensor) -> None:
        """Take the mean loss of the part at hand."""
        self._comparison.add(loss, self._share)

    def verify(self) -> None:
        """Compare.

        Raises:
            MisusedTrainer: The whole is not the mean of its halves.
        """
        if self._comparison.num_added == 3 and (excess := self._comparison.excess()) is not None:
            raise MisusedTrainer(
                f"the gradient of the loss over a micro-batch is {excess:.2%} away from the mean of its halves': "
                "the loss is not a mean over samples (a sum, ignore_index, class weights, negatives from the batch do "
                "that). Give a sum and its weight: update.backward(loss_sum, weight=...), or (loss_sum, weight) from "
                "loss_fn, in a job file from a loss.target with takes: 'model, batch'. In a script "
                "check_loss=False keeps the loss as it is"
            )


def _is_plain(module: nn.Module) -> bool:
    # A norm counts as one though some have their activation inside.
    return isinstance(module, _BatchNorm) or next(module.children(), None) is None
