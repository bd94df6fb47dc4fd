"""Ghost batch norm on the CPU for inputs whose channels are innermost in memory (channels last, [N, C]).

A ghost is a matrix [R, C] here, R = rows * positions. Sums come from native kernels; what is left are multiply-adds
with a coefficient per channel, for which torch's elementwise operations are faster than the native kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_batch.ghost.layout import Gradients, Normalized, groups, num_bytes, num_pieces, sums_of_products


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, num_ghosts: int, eps: float) -> Normalized:
    """As `native.normalize`: statistics, then output = x * scale + offset."""
    output = torch.empty_like(x)
    ghosts, results = _matrices(x, num_ghosts), _matrices(output, num_ghosts)
    moments, invstd = x.new_zeros((num_ghosts, 2, x.size(1))), x.new_empty((num_ghosts, x.size(1)))
    mean, variance = moments.unbind(1)
    zero, biased = x.new_zeros(()), 1 - 1 / ghosts[0].size(0)
    for group in groups(num_ghosts, num_bytes(ghosts[0])):
        for ghost, ghost_mean, ghost_variance in zip(ghosts[group], mean[group], variance[group], strict=True):
            # With momentum 1 the kernel leaves mean and unbiased variance in what it takes for running statistics.
            torch.batch_norm_update_stats(ghost, ghost_mean, ghost_variance, 1.0)
        torch.mul(variance[group], biased, out=invstd[group]).add_(eps).rsqrt_()
        scale = invstd[group] if weight is None else invstd[group] * weight
        offset = torch.addcmul(zero if bias is None else bias, mean[group], scale, value=-1)
        for ghost, result, b, a in _last_first(ghosts[group], results[group], offset, scale):
            torch.addcmul(b, ghost, a, out=result)
    return Normalized(output, moments, invstd)


def gradients(grad: Tensor, x: Tensor, weight: Tensor | None, normalized: Normalized) -> Gradients:
    """As `native.gradients`: sums, then input = (grad + slope * x) * scale + offset."""
    invstd, mean = normalized.invstd, normalized.moments[:, 0]
    num_ghosts, channels = invstd.shape
    output = torch.empty_like(x)
    grads, ghosts, results = (_matrices(tensor, num_ghosts) for tensor in (grad, x, output))
    scale = invstd if weight is None else invstd * weight
    share = -1 / ghosts[0].size(0)
    ghost_bytes = num_bytes(ghosts[0])
    pieces = num_pieces(ghost_bytes)
    sums = []
    for group in groups(num_ghosts, ghost_bytes):
        each = zip(grads[group], ghosts[group], mean[group], invstd[group], strict=True)
        sums.append(torch.stack([row for ghost in each for row in sums_of_products(*ghost)]).view(-1, 2, channels))
        products, totals = (sums[-1] * share).unbind(1)
        slope = products * invstd[group]
        offset = torch.addcmul(totals, slope, mean[group], value=-1) * scale[group]
        for g, v, out, a, b, c in _last_first(grads[group], ghosts[group], results[group], slope, scale[group], offset):
            for piece_grad, piece, result in zip(g.chunk(pieces), v.chunk(pieces), out.chunk(pieces), strict=True):
                torch.addcmul(piece_grad, piece, a, out=result)
                torch.addcmul(c, result, b, out=result)
    return Gradients(output, *torch.cat(sums).sum(0))


def _matrices(x: Tensor, num_ghosts: int) -> tuple[Tensor, ...]:
    """Each ghost as a view [R, C]."""
    channels = x.size(1)
    rows = x.numel() // (num_ghosts * channels)
    return tuple(x.as_strided((num_ghosts, rows, channels), (rows * channels, channels, 1)).unbind())


def _last_first(*of_ghosts: tuple[Tensor, ...] | Tensor) -> list[tuple[Tensor, ...]]:
    """What belongs together, the ghost that was visited last, and is most likely in the cache, first."""
    return list(zip(*of_ghosts, strict=True))[::-1]
