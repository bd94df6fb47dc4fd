"""Is a user's mean loss really the mean over samples? The first micro-batch is compared with its two halves."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from elastic_batch.data import NotDivisibleError, cut
from elastic_batch.errors import MisusedTrainer
from elastic_batch.randomness import GeneratorState
from elastic_batch.trainer.buffers import preserved_buffers

logger = logging.getLogger(__name__)

_TOLERANCE = 2e-3
"""Relative: above what TF32 rounding does to a gradient, below what a wrong mean shows even in an untrained model."""
_ROUNDINGS = 4
"""The same for shorter types, in units of their rounding: 3 % in bf16, where right losses show up to 0.7 %."""
_FP16_SCALE = 2.0**10
"""Keeps the gradients of fp16 away from zero."""


class MeanCheck:
    """Compares a loss's gradient over a micro-batch with those over its halves, uncompiled and without randomness.

    With `ignore_index`, class weights or negatives taken from the batch, a mean over the batch is not the mean of its
    samples' losses, and dividing the summed gradient by the number of samples would change with the micro-batch size.
    Gradients show that where losses do not: in an untrained classifier all samples have nearly the same loss.

    Norms, dropout and whatever else has no modules inside are in evaluation mode meanwhile, where samples do not
    influence each other. The rest of the model stays as it is, because some models answer with something else in
    evaluation mode; but if anything draws at random, there is a second round with all of it in evaluation mode. What
    draws even then (mixup, the noise of a diffusion model) is left alone: the parts cannot be compared.

    It runs under the autocast of whoever asks for its parts, and compares as closely as that type allows.

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
        self._types = {parameter.dtype for parameter in self._parameters}
        self._share = 0.0
        self._differences: tuple[Tensor | None, ...] = (None,) * len(self._parameters)
        self._norms: list[float] = []

    def parts(self) -> Iterator[Any]:
        """The whole batch and its halves, each to be answered by `record`; nothing if it cannot be halved."""
        half = self._num_samples // 2
        if half == 0:
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
        self._norms = []

    def _round(self, modules: list[nn.Module], half: int) -> Iterator[Any]:
        """The parts, with these modules in evaluation mode."""
        self._differences, self._norms = (None,) * len(self._parameters), []
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
        if torch.is_autocast_enabled(loss.device.type):
            self._types.add(torch.get_autocast_dtype(loss.device.type))
        if torch.float16 in self._types:
            loss = loss * _FP16_SCALE
        try:
            with torch.autocast(loss.device.type, enabled=False):
                gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        except RuntimeError:
            return  # reentrant checkpointing allows no such gradient; what is really wrong will show in the backward
        sign = -1.0 if self._norms else 1.0
        self._differences = tuple(map(_sum, self._differences, (_scaled(g, sign * self._share) for g in gradients)))
        self._norms.append(_norm(gradients))

    def verify(self) -> None:
        """Compare.

        Raises:
            MisusedTrainer: The whole is not the mean of its halves.
        """
        if len(self._norms) != 3:
            return
        difference = _norm(self._differences) / max(*self._norms, torch.finfo(torch.float32).tiny)
        if difference > max(_TOLERANCE, *(_ROUNDINGS * torch.finfo(kind).eps for kind in self._types)):
            raise MisusedTrainer(
                f"the gradient of the loss over a micro-batch is {difference:.2%} away from the mean of its halves': "
                "the loss is not a mean over samples (ignore_index, class weights or negatives from the batch do "
                "that). Give a sum and its weight: update.backward(loss_sum, weight=...), or (loss_sum, weight) from "
                "loss_fn, in a job file from a loss.target with takes: 'model, batch'. In a script "
                "check_loss=False keeps the loss as it is"
            )


def _is_plain(module: nn.Module) -> bool:
    # A norm counts as one though some have their activation inside.
    return isinstance(module, _BatchNorm) or next(module.children(), None) is None


def _scaled(gradient: Tensor | None, factor: float) -> Tensor | None:
    return None if gradient is None else gradient * factor


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return first if second is None else second if first is None else first.add_(second)


def _norm(gradients: Iterable[Tensor | None]) -> float:
    # Those of embeddings may be sparse.
    dense = (gradient.to_dense() for gradient in gradients if gradient is not None)
    return math.hypot(*(float(torch.linalg.vector_norm(gradient)) for gradient in dense))
