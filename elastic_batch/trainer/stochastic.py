"""Random draws of a pass that runs several micro-batches as one batch: each micro-batch draws as if it ran alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from elastic_batch.errors import MisusedTrainer
from elastic_batch.ghost import GhostNorm, is_recomputing
from elastic_batch.randomness import cuda_generator, preserved, reseed, seeded
from elastic_batch.trainer.forward_watch import watching

# Known by name, since there are as many copies of them as there are packages of models.
_RANDOM_CLASSES = frozenset({"StochasticDepth", "DropPath", "DropBlock2d", "DropBlock3d"})
_MARK = 0x656C6173746963  # no micro-batch's seed matters here: nobody is to draw from what it gives


def is_compiled(module: nn.Module) -> bool:
    """Whether calling the module runs compiled code."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def draws_by_row(module: nn.Module) -> bool:
    """Whether a module's only randomness can be drawn for one micro-batch after the other: dropout and its kin."""
    return isinstance(module, _DropoutNd) or any(kind.__name__ in _RANDOM_CLASSES for kind in type(module).__mro__)


def is_drawing(module: nn.Module) -> bool:
    """Whether such a module draws when it is called now."""
    return module.training and getattr(module, "p", getattr(module, "drop_prob", None)) != 0


class PassRandomness:
    """Makes the draws of dropout and the like independent of how many micro-batches run at once.

    Alone, a micro-batch draws everything from the global generators, seeded with its seed. In a pass of several such
    modules are run for one micro-batch after the other, each under its own generator's state; everything else sees the
    whole batch. Modules are changed while a pass runs only, and neither their identity nor the model's state.

    Args:
        model: Modules that it gets later are not known here: their draws are stray.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._random = {name: module for name, module in self._modules.items() if draws_by_row(module)}
        self._buffers = [
            (f"{name}.{key}" if name else key, module._buffers, key)
            for name, module in self._modules.items()
            if not isinstance(module, GhostNorm)
            for key in module._buffers.keys() - module._non_persistent_buffers_set
        ]
        # Hooks would be traced into compiled code.
        self._is_watch_due = not any(is_compiled(module) for module in self._modules.values())

    @contextmanager
    def over(self, seeds: Sequence[int], device: torch.device | None = None) -> Iterator[PassDraws]:
        """Run a pass of `len(seeds)` micro-batches: forward and backward, since checkpointing repeats draws there.

        Args:
            seeds: Of the micro-batches, in the order of their rows in the batch.
            device: The model's.
        """
        draws = PassDraws(seeds, device)
        if len(seeds) == 1:
            with seeded(seeds[0], device):
                yield draws
            return
        with preserved(device), ExitStack() as stack:
            draws.begin(self._buffers)
            for name, module in self._random.items():
                if is_drawing(module):
                    stack.enter_context(_having(module, forward=partial(draws.run, name, module, module.forward)))
            if self._is_watch_due:
                self._is_watch_due = False
                stack.enter_context(watching(self._modules, draws.is_untouched, draws.blame))
            yield draws


class PassDraws:
    """The draws of one pass. Not made by users: `PassRandomness.over` gives it."""

    def __init__(self, seeds: Sequence[int], device: torch.device | None) -> None:
        self._seeds = seeds
        self._device = device
        self._streams: dict[str, _Stream] = {}
        self._buffers: list[_Buffer] = []
        self._blamed: str | None = None

    def begin(self, buffers: Sequence[tuple[str, dict[str, Tensor | None], str]]) -> None:
        """Seed all generators so that any draw from them shows, and note what the model's buffers hold."""
        reseed(_MARK, self._device)
        self._streams["cpu"] = _Stream(torch.default_generator, self._seeds)
        if (generator := cuda_generator(self._device)) is not None:
            self._streams["cuda"] = _Stream(generator, self._seeds)
        self._buffers = [_Buffer(name, holder, key) for name, holder, key in buffers]

    def run(self, name: str, module: nn.Module, original: Callable[..., Any], x: Any, *rest: Any, **named: Any) -> Any:
        """What stands in for a random module's forward."""
        if torch.compiler.is_compiling() or rest or named or not isinstance(x, Tensor) or not x.numel():
            return original(x, *rest, **named)  # a draw in it is a stray one
        if (stream := self._streams.get(x.device.type)) is None:
            self.blame(f"{name}, on a device that the pass does not know,")
            return original(x)
        if not is_recomputing() and not self.is_untouched():
            self.blame(f"something before {name}")
        if x.dim() == 0 or x.size(0) % len(self._seeds):
            self.blame(f"{name}, whose input of shape {tuple(x.shape)} is not {len(self._seeds)} micro-batches,")
            return original(x)
        chunks = x.chunk(len(self._seeds))
        if not getattr(module, "inplace", False):
            return torch.cat(stream.run(original, chunks))
        with _having(module, inplace=False):  # autograd forbids to change the chunks in place, not the whole
            return x.copy_(torch.cat(stream.run(original, chunks)))

    def stray(self) -> str | None:
        """Ask after the forward pass: why its result may differ from that of single micro-batches, or None."""
        if not self._streams:
            return None
        for buffer in self._buffers:
            if buffer.has_changed():
                return f"the forward pass changed the buffer {buffer.name}"
        if not (self.is_untouched() and _python_is_untouched()):
            self.blame("the model or the loss function")
        return self._blamed and f"{self._blamed} drew random numbers in a way that does not follow the micro-batches"

    def blame(self, who: str) -> None:
        """Remember the first that drew outside."""
        self._blamed = self._blamed or who

    def is_untouched(self) -> bool:
        """Whether torch's generators are where the last draw left them."""
        return all(stream.is_untouched() for stream in self._streams.values())


class _Stream:
    """A global generator, and what it would hold for each micro-batch if they ran one by one.

    Between draws it holds a mark: the number of draws so far, as a seed. So any other draw shows, and a forward pass
    that activation checkpointing repeats finds out where it is: checkpointing puts the mark back too.
    """

    def __init__(self, generator: torch.Generator, seeds: Sequence[int]) -> None:
        self._generator = generator
        self._before = [[self._seeded(seed) for seed in seeds]]  # for each call, each micro-batch's state before it
        self._marked = self._seeded(_MARK)

    def is_untouched(self) -> bool:
        return torch.equal(self._generator.get_state(), self._marked)

    def run(self, function: Callable[[Tensor], Tensor], chunks: Sequence[Tensor]) -> list[Tensor]:
        """Call for each micro-batch, under its own state."""
        newest, repeats = len(self._before) - 1, is_recomputing()
        number = self._generator.initial_seed() - _MARK if repeats else newest
        if repeats and not 0 <= number < newest:
            raise MisusedTrainer(
                "activation checkpointing repeats a dropout whose random state it did not keep; "
                "call torch.utils.checkpoint.checkpoint with preserve_rng_state=True, or use one micro-batch per pass"
            )
        outputs, after = [], []
        for state, chunk in zip(self._before[number], chunks, strict=True):
            self._generator.set_state(state)
            outputs.append(function(chunk))
            after.append(self._generator.get_state())
        marked = self._seeded(_MARK + number + 1)
        if not repeats:
            self._before.append(after)
            self._marked = marked
        return outputs

    def _seeded(self, seed: int) -> Tensor:
        return self._generator.manual_seed(seed).get_state()


class _Buffer:
    """A buffer of the model's state, and whether somebody changed or replaced it since."""

    def __init__(self, name: str, holder: dict[str, Tensor | None], key: str) -> None:
        self.name = name
        self._holder, self._key = holder, key
        self._tensor = holder[key]
        self._version = None if self._tensor is None else self._tensor._version

    def has_changed(self) -> bool:
        tensor = self._holder.get(self._key)
        return tensor is not self._tensor or (tensor is not None and tensor._version != self._version)


def _python_is_untouched() -> bool:
    with preserved():
        drawn = random.random(), np.random.random_sample()
        reseed(_MARK)
        return drawn == (random.random(), np.random.random_sample())


@contextmanager
def _having(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Attributes of the instance itself, put back afterwards."""
    before = {name: vars(module)[name] for name in attributes if name in vars(module)}
    vars(module).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(module)[name]
        vars(module).update(before)
