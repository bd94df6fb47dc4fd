"""Gradients of ghost batch norm on the CPU where channels are innermost in memory (channels last, [N, C])."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_batch.ghost.layout import Gradients, Normalized, groups, num_bytes, num_pieces, sums_of_products
from elastic_batch.ghost.memory import empty_like


def gradients(grad: Tensor, x: Tensor, weight: Tensor | None, normalized: Normalized) -> Gradients:
    """As `native.gradients`, without a copy of any gradient: sums, then input = (grad + slope * x) * scale + offset.

    A ghost is a matrix [R, C] here, R = rows * positions. The multiply-adds have a coefficient per channel; torch's
    elementwise operations are faster at them than the native kernel.
    """
    invstd, mean = normalized.invstd, normalized.moments[:, 0]
    num_ghosts, channels = invstd.shape
    output = empty_like(x)
    grads, ghosts, results = (_matrices(tensor, num_ghosts) for tensor in (grad, x, output))
    share = -1 / ghosts.size(1)
    scale = invstd if weight is None else invstd * weight
    slope_share = invstd * share
    ghost_bytes = num_bytes(x) // num_ghosts
    pieces = num_pieces(ghost_bytes)
    sums = []
    for group in groups(num_ghosts, ghost_bytes):
        each = zip(grads[group], ghosts[group], mean[group], invstd[group], strict=True)
        sums.append(torch.stack([row for ghost in each for row in sums_of_products(*ghost)]).view(-1, 2, channels))
        products, totals = sums[-1].unbind(1)
        slopes = products * slope_share[group]
        offsets = torch.addcmul(totals * share, slopes, mean[group], value=-1).mul_(scale[group])
        here = zip(grads[group], ghosts[group], results[group], slopes, scale[group], offsets, strict=True)
        for *whole, slope, factor, offset in reversed(list(here)):  # what was visited last is still in the cache
            for piece_grad, piece, result in zip(*(matrix.chunk(pieces) for matrix in whole), strict=True):
                torch.addcmul(piece_grad, piece, slope, out=result)
                torch.addcmul(offset, result, factor, out=result)
    return Gradients(output, *torch.cat(sums).sum(0))


def _matrices(x: Tensor, num_ghosts: int) -> Tensor:
    """The ghosts as a view [k, R, C]."""
    channels = x.size(1)
    rows = x.numel() // (num_ghosts * channels)
    return x.as_strided((num_ghosts, rows, channels), (rows * channels, channels, 1))
