"""The trainer's view of a model's ghost batch norms: sums over an update in, running statistics out."""

from __future__ import annotations

import weakref
from itertools import accumulate, chain

import torch
from torch import Tensor, nn

from elastic_batch.errors import InvalidSetting
from elastic_batch.ghost.modules import GhostNorm
from elastic_batch.ghost.pending import PendingSums, Place, Slot


class RunningStatistics:
    """Collects what a model's ghost batch norms measure during an update, and merges it when the update commits.

    While it lives the norms do not touch their running statistics themselves. An update is `begin`, any number of
    forward passes, `sums`, a reduction over the workers, `commit`; without `commit` nothing has happened. A norm that
    ran in evaluation mode counts no ghosts and stays as it is, a norm that ran twice counts twice, a forward pass that
    activation checkpointing repeats counts once.

    Sums are laid out norm by norm, in the order of `model.modules()`: number of ghosts, sum of means [C], sum of
    unbiased variances [C]. Norms without running statistics have no part in them.

    Args:
        model: After conversion, on its device. Norms of other models are not touched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = [
            module for module in model.modules() if isinstance(module, GhostNorm) and module.running_mean is not None
        ]
        self._counts: list[int] = []
        self._key = object()  # by which the norms know whose they are; it must not keep `self` alive
        # Without norms the sums are empty, and are still put together with what lies where the model is.
        self._device = next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))
        self._attach()
        weakref.finalize(self, _detach, self._norms, self._key)

    @property
    def numel(self) -> int:
        """Length of `sums()`."""
        return self._pending.numel

    @property
    def samples_per_pass(self) -> int | None:
        """Samples of the forward passes to come; None if every row of a norm's input is a sample.

        Where it is set, a norm whose input has another number of rows (frames of a video, patches of an image) splits
        them into as many ghosts as the samples make.
        """
        return self._pending.samples_per_pass

    @samples_per_pass.setter
    def samples_per_pass(self, num_samples: int | None) -> None:
        self._pending.samples_per_pass = num_samples

    def begin(self) -> None:
        """Forget what was collected: an update begins, or begins again."""
        if any(_is_elsewhere(norm, place, self._device) for norm, place in zip(self._norms, self._places, strict=True)):
            self._attach()  # the model was moved or converted to another type
        elif self._momenta != [norm.momentum for norm in self._norms]:
            self._prepare_commit()
        self._pending.clear()

    def sums(self) -> Tensor:
        """What was collected since `begin`: float64 [numel], a new tensor on the model's device."""
        return self._pending.total()

    def commit(self, sums: Tensor) -> None:
        """Merge the sums of all workers into the running statistics.

        running <- keep * running + (1 - keep) * mean over all ghosts of (mean, unbiased variance), where
        keep = (1 - momentum)^ghosts; with momentum None the mean over all ghosts ever seen. Computed in float64 from
        nothing but the sums and the running statistics, so that workers which agree on these agree on the result.

        Args:
            sums: [numel], the sum of all workers' `sums()`, on any device.
        """
        if self._norms:
            self._merge(sums)

    @torch.no_grad()
    def _merge(self, sums: Tensor) -> None:
        if sums.shape != (self.numel,):
            raise InvalidSetting(
                "sums", tuple(sums.shape), f"must have the shape of this model's sums(), ({self.numel},)"
            )
        sums = sums.to(self._device, torch.float64)
        counts = [round(count) for count in sums.index_select(0, self._counts_at).tolist()]  # one for each norm
        trackers = [tracker for norm in self._norms if (tracker := norm._buffers["num_batches_tracked"]) is not None]
        if self._any_cumulative or counts != self._counts:
            self._counts = counts
            self._of_running, self._of_sums = self._factors(counts, trackers)
        buffers = [buffer for norm in self._norms for buffer in _running(norm)]
        running = torch.cat(buffers).double()
        merged = torch.addcmul(self._of_running * running, self._of_sums, sums.index_select(0, self._values_at))
        torch._foreach_copy_(buffers, merged.split_with_sizes(self._sizes))
        torch._foreach_add_(trackers, counts)

    def close(self) -> None:
        """Give the norms back the care of their running statistics. Also happens when this object is dropped."""
        _detach(self._norms, self._key)

    def _factors(self, counts: list[int], trackers: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What running values and sums are multiplied by, [sum of 2 C] each: the same while `counts` are, mostly."""
        ghosts = self._bases.new_tensor(counts)
        keep = self._bases**ghosts
        if self._any_cumulative:
            tracked = torch.stack(trackers)
            cumulative = tracked.double() / (tracked + ghosts)
            keep = torch.where(self._is_cumulative & (ghosts > 0), cumulative, keep)
        add = (1 - keep) / ghosts.clamp(min=1)  # a norm that saw no ghosts keeps 1 and adds 0
        return keep.index_select(0, self._norm_of), add.index_select(0, self._norm_of)

    def _attach(self) -> None:
        offsets = accumulate((1 + 2 * norm.num_features for norm in self._norms), initial=0)
        self._places = [
            Place(norm.num_features, _running(norm)[0].dtype, offset)
            for norm, offset in zip(self._norms, offsets, strict=False)
        ]
        if self._norms:
            self._device = _running(self._norms[0])[0].device
        self._pending = PendingSums(self._places, self._device)
        for index, (norm, place) in enumerate(zip(self._norms, self._places, strict=True)):
            norm._slot = Slot(self._key, self._pending, index, place.offset)
        self._prepare_commit()

    def _prepare_commit(self) -> None:
        device = self._device
        self._sizes = [place.num_features for place in self._places for _ in range(2)]
        is_value = torch.ones(self.numel, dtype=torch.bool)
        is_value[[place.offset for place in self._places]] = False
        self._values_at = is_value.nonzero().flatten().to(device)
        self._counts_at = (~is_value).nonzero().flatten().to(device)
        repeats = torch.tensor([2 * place.num_features for place in self._places], dtype=torch.long)
        self._norm_of = torch.arange(len(self._norms)).repeat_interleave(repeats).to(device)
        self._momenta = [norm.momentum for norm in self._norms]
        self._any_cumulative = None in self._momenta
        self._is_cumulative = torch.tensor([momentum is None for momentum in self._momenta], device=device)
        bases = [1 - (momentum or 0) for momentum in self._momenta]
        self._bases = torch.tensor(bases, dtype=torch.float64, device=device)
        self._counts = []  # those that the last commit's factors are for


def _running(norm: GhostNorm) -> tuple[Tensor, Tensor]:
    # Looked up anew each time (and past the module's slow attribute access): loading a state may replace buffers.
    mean, variance = norm._buffers["running_mean"], norm._buffers["running_var"]
    assert mean is not None
    assert variance is not None
    return mean, variance


def _is_elsewhere(norm: GhostNorm, place: Place, device: torch.device) -> bool:
    mean = _running(norm)[0]
    return mean.device != device or mean.dtype != place.dtype


def _detach(norms: list[GhostNorm], key: object) -> None:
    for norm in norms:
        if norm._slot is not None and norm._slot.owner is key:
            norm._slot = None
