"""What becomes of the statistics of ghosts: added to sums, or merged into running statistics."""

from __future__ import annotations

import torch
from torch import Tensor


def is_recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass, as activation checkpointing does."""
    return int(torch._C._current_graph_task_id()) != -1


def keep_factor(momentum: float | None, num_tracked: Tensor | None, num_ghosts: int) -> float | Tensor:
    """What running statistics keep of their value when the mean over `num_ghosts` ghosts is merged into them.

    (1 - momentum)^ghosts, so that the horizon is a number of samples, whatever the batch; with momentum None the share
    that makes them the mean over all ghosts ever seen.

    >>> keep_factor(0.1, None, 2)
    0.81
    """
    if momentum is not None:
        return (1 - momentum) ** num_ghosts
    return 0.0 if num_tracked is None else num_tracked.double() / (num_tracked + num_ghosts)


def merge(
    running_mean: Tensor, running_var: Tensor, num_tracked: Tensor, momentum: float | None, moments: Tensor
) -> None:
    """Merge the moments [k, 2, C] of k ghosts into running statistics at once, unless they are recomputed."""
    if is_recomputing():
        return
    num_ghosts = moments.size(0)
    keep = keep_factor(momentum, num_tracked, num_ghosts)
    mean, variance = moments.mean(0)
    for running, fresh in ((running_mean, mean), (running_var, variance)):
        running.mul_(keep).add_(fresh * (1 - keep))
    num_tracked.add_(num_ghosts)


def collect(sums: Tensor, offset: int, moments: Tensor) -> None:
    """Add the moments [k, 2, C] of k ghosts to sums [count, means, variances] from `offset` on, likewise."""
    if is_recomputing():
        return
    total = moments.flatten(1).sum(0, dtype=sums.dtype)
    sums[offset].add_(moments.size(0))
    sums[offset + 1 : offset + 1 + total.numel()].add_(total)


# As operators that a compiler leaves as they are: whether this is a recomputation shows at run time only.
merge_op = torch.library.custom_op(
    "elastic_batch::merge_moments",
    merge,
    mutates_args=("running_mean", "running_var", "num_tracked"),
    schema="(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) num_tracked, float? momentum, "
    "Tensor moments) -> ()",
)
collect_op = torch.library.custom_op(
    "elastic_batch::collect_moments",
    collect,
    mutates_args=("sums",),
    schema="(Tensor(a!) sums, SymInt offset, Tensor moments) -> ()",
)
