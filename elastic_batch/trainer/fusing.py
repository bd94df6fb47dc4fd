"""Whether several micro-batches may run as one pass: what can be told from the model before it runs."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from elastic_batch.ghost import GhostNorm
from elastic_batch.trainer.stochastic import draws_by_row, is_compiled, is_drawing


def obstacle_to_fusing(model: nn.Module, micro_batch_size: int) -> str | None:
    """Why a pass of several micro-batches would not equal as many passes of one.

    Draws outside dropout modules show only when the model runs: see `PassDraws.stray`.

    Args:
        model: As it is called (compiled, if so), in training mode.
        micro_batch_size: In samples.

    Returns:
        The reason, the end of a sentence after "because"; None if there is none.
    """
    for name, module in model.named_modules():
        reason = _mixes_micro_batches(module, micro_batch_size) or _draws_inside(module)
        if reason is None and is_compiled(module) and any(map(_is_random, module.modules())):
            reason = "is compiled, with dropout whose draws cannot be kept apart"
        if reason is not None:
            return f"{name or 'the model'} ({type(module).__name__}) {reason}"
    return None


def _mixes_micro_batches(module: nn.Module, micro_batch_size: int) -> str | None:
    if isinstance(module, nn.SyncBatchNorm):
        return "takes its statistics over all workers"
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        ghost = module.ghost_batch_size if isinstance(module, GhostNorm) and module.training else None
        if ghost is None:
            return "takes its statistics over the whole batch"
        if micro_batch_size % ghost:
            return f"has ghost batches of {ghost} samples, which do not divide the micro-batch of {micro_batch_size}"
    if isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
        return "updates its running statistics once a pass"
    return None


def _draws_inside(module: nn.Module) -> str | None:
    is_recurrent = isinstance(module, nn.RNNBase) and module.num_layers > 1
    if (is_recurrent or isinstance(module, nn.MultiheadAttention)) and module.training and module.dropout:
        return "has dropout inside, for the whole batch at once"
    return None


def _is_random(module: nn.Module) -> bool:
    return draws_by_row(module) and is_drawing(module)
