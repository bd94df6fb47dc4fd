"""Batch norms that split a training batch into ghost batches; everything else is torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from elastic_batch.errors import InvalidSetting
from elastic_batch.ghost.functional import ghost_batch_norm
from elastic_batch.ghost.pending import Slot
from elastic_batch.ghost.statistics import collect_op, is_recomputing, merge, merge_op


class GhostNorm(_BatchNorm):
    """What the ghost batch norms have in common; use `GhostBatchNorm1d`, `2d` or `3d`.

    In training a batch is split into contiguous runs of `ghost_batch_size` samples, each normalised with its own mean
    and variance. Evaluation is that of torch's class, to the bit. Parameters and buffers have torch's names, so states
    can be loaded both ways. Running statistics are updated once a forward pass, as if ghost after ghost had kept
    `1 - momentum` of them, with the mean over the pass's ghosts; a `RunningStatistics` of the model takes this over.

    Args:
        num_features: C of the input [N, C, ...].
        ghost_batch_size: Samples that share statistics; must divide N in training.
        **settings: Those of torch's class: eps, momentum, affine, track_running_stats, device, dtype.

    Raises:
        InvalidSetting: In the forward pass: the batch is not a whole number of ghosts, or a ghost has only one value
            per channel.
    """

    _slot: Slot | None = None

    def __init__(self, num_features: int, ghost_batch_size: int, **settings: Any) -> None:
        super().__init__(num_features, **settings)
        self.ghost_batch_size = check_ghost_batch_size(ghost_batch_size)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model, or one that is saved, has no part in the update that the original is in.
        return {name: value for name, value in self.__dict__.items() if name != "_slot"}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_batch_size={self.ghost_batch_size}"  # type: ignore[no-untyped-call]  # torch's

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)  # type: ignore[no-untyped-call]  # torch's
        rows = self._rows_per_ghost(x)
        if rows == x.size(0) and not torch.compiler.is_compiling():
            return self._forward_whole(x)
        output, moments = ghost_batch_norm(x, self.weight, self.bias, rows, self.eps)
        self._record(moments)
        return output

    def _rows_per_ghost(self, x: Tensor) -> int:
        num_rows, ghost = x.size(0), self.ghost_batch_size
        num_samples = None if self._slot is None else self._slot.pending.samples_per_pass
        if num_samples is None:
            num_samples = num_rows
        if num_rows == 0 or num_samples % ghost:
            raise InvalidSetting(
                "ghost_batch_size",
                ghost,
                f"must divide the batch, which has {num_samples} samples",
                "Choose a size that divides it, or call model.eval() where nothing is trained",
            )
        # A norm with another number of rows than samples (frames, patches) has as many ghosts as the samples make.
        rows = ghost if num_rows == num_samples else _divide_rows(num_rows, num_samples // ghost, ghost)
        if rows * (x.numel() // (num_rows * x.size(1))) == 1:
            raise InvalidSetting(
                "ghost_batch_size",
                ghost,
                f"must give more than one value per channel; an input of shape {tuple(x.shape)} gives one",
                "Take larger ghosts, or call model.eval() where nothing is trained",
            )
        return rows

    def _forward_whole(self, x: Tensor) -> Tensor:
        """One ghost: torch's own path, running statistics included."""
        if not self.track_running_stats or self.running_mean is None:
            return super().forward(x)
        if is_recomputing():
            # Checkpointing wants the same tensors saved as before, so there must be running statistics.
            mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_mean)
        elif self._slot is not None:
            mean, variance = self._slot.pending.land(self._slot.index)
        else:
            return super().forward(x)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, True, 1.0, self.eps)

    def _record(self, moments: Tensor) -> None:
        mean, variance, num_tracked = self.running_mean, self.running_var, self.num_batches_tracked
        if not self.track_running_stats or mean is None or variance is None or num_tracked is None:
            return
        slot, compiling = self._slot, torch.compiler.is_compiling()
        if slot is None:
            (merge_op if compiling else merge)(mean, variance, num_tracked, self.momentum, moments)
        elif compiling:
            collect_op(slot.sums, slot.offset, moments)
        elif not is_recomputing():
            slot.pending.add(slot.index, moments)


def _divide_rows(num_rows: int, num_ghosts: int, ghost_batch_size: int) -> int:
    if num_rows % num_ghosts:
        raise InvalidSetting(
            "ghost_batch_size",
            ghost_batch_size,
            f"makes {num_ghosts} ghosts of the batch, into which a norm's {num_rows} rows cannot be divided",
            "Make the number of rows per sample constant, or use one ghost per pass (pass width 1, size = micro-batch)",
        )
    return num_rows // num_ghosts


def check_ghost_batch_size(ghost_batch_size: int) -> int:
    """The number itself, or InvalidSetting."""
    if not isinstance(ghost_batch_size, int) or ghost_batch_size < 1:
        raise InvalidSetting("ghost_batch_size", ghost_batch_size, "must be a number of samples, at least 1")
    return ghost_batch_size


class GhostBatchNorm1d(GhostNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` in ghost batches, for [N, C] and [N, C, L]. See `GhostNorm`."""


class GhostBatchNorm2d(GhostNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` in ghost batches, for [N, C, H, W], contiguous or channels last. See `GhostNorm`."""


class GhostBatchNorm3d(GhostNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` in ghost batches, for [N, C, D, H, W], contiguous or channels last. See `GhostNorm`."""


class GhostBatchNormAct2d(GhostNorm, nn.BatchNorm2d):
    """timm's `BatchNormAct2d` in ghost batches: norm, then its `drop` and `act`. Made by `convert_batch_norm` only."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return]  # a module's result is Any
