"""What the kernels of ghost batch norm share: results, memory formats, cutting, the native kernels themselves.

Shapes: N rows of the batch, C channels, k ghosts of N / k rows, P positions of a row (1 for a 2-d input).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# The overloads themselves: finding them anew costs more than some of the calls.
native_forward = torch.ops.aten.native_batch_norm.out
native_backward = torch.ops.aten.native_batch_norm_backward.default

# The backward passes write their result in two steps, piece by piece.
_PIECE_BYTES = 1024**2
Ghosts = Iterable[Tensor]
"""One tensor for each ghost."""
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Normalized(NamedTuple):
    """Result of a forward pass; the statistics are float32, or float64 for float64 inputs."""

    output: Tensor
    moments: Tensor  # [k, 2, C]: mean and unbiased variance
    invstd: Tensor  # [k, C]: 1 / sqrt(biased variance + eps)


class Gradients(NamedTuple):
    """Result of a backward pass."""

    input: Tensor | None
    weight: Tensor  # [C]
    bias: Tensor  # [C]


def dense(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The tensor, copied if need be so that rows follow each other in memory: contiguous or channels last.

    Args:
        tensor: [N, C, ...].
        like: A dense tensor whose memory format is wanted; without it the tensor's own, where it has one.
    """
    channels_last = _CHANNELS_LAST.get(tensor.dim())
    if channels_last is not None and (tensor if like is None else like).is_contiguous(memory_format=channels_last):
        return tensor.contiguous(memory_format=channels_last)
    return tensor.contiguous()


def channels_are_innermost(x: Tensor) -> bool:
    """Whether the channels of one position are neighbours in memory."""
    channels_last = _CHANNELS_LAST.get(x.dim())
    return x.dim() == 2 or (channels_last is not None and x.is_contiguous(memory_format=channels_last))


def sums_of_products(grads: Ghosts, ghosts: Ghosts, means: Ghosts, invstds: Ghosts) -> Tensor:
    """[k, 2, C]: each ghost's sum of grad * (x - mean) * invstd, and that of grad, by the native backward pass."""
    mask = [False, True, True]  # no gradient of the input
    found = []
    for grad, x, mean, invstd in zip(grads, ghosts, means, invstds, strict=True):
        found += native_backward(grad, x, None, None, None, mean, invstd, True, 0.0, mask)[1:]
    return torch.stack(found).view(-1, 2, found[0].size(0))


def num_bytes(tensor: Tensor) -> int:
    """Size in memory."""
    return tensor.numel() * tensor.element_size()


def num_pieces(ghost_bytes: int) -> int:
    """Into how many pieces to cut a ghost, so that the second step of writing a piece finds it in the cache."""
    return max(1, ghost_bytes // _PIECE_BYTES)
