"""Gradients of ghost batch norm on the CPU where channels are innermost in memory (channels last, [N, C])."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_batch.ghost.layout import Gradients, Normalized, num_bytes, num_pieces, sums_of_products
from elastic_batch.ghost.memory import empty_like


def gradients(grad: Tensor, x: Tensor, weight: Tensor | None, normalized: Normalized) -> Gradients:
    """As `native.gradients`, without a copy of any gradient: sums, then input = (slope * x + offset) + scale * grad.

    A ghost is a matrix [R, C] here, R = rows * positions. The multiply-adds have a coefficient per channel; torch's
    elementwise operations are faster at them than the native kernel.
    """
    invstd, mean = normalized.invstd, normalized.moments[:, 0]
    num_ghosts, channels = invstd.shape
    output = empty_like(x)
    count = x.numel() // (num_ghosts * channels)
    size, stride = (num_ghosts, count, channels), (count * channels, channels, 1)
    grads, ghosts, results = (tensor.as_strided(size, stride) for tensor in (grad, x, output))
    sums = sums_of_products(grads, ghosts, mean, invstd)
    scale = invstd if weight is None else invstd * weight
    slopes, shares = (sums * (scale / -count).unsqueeze(1)).unbind(1)
    slopes = slopes * invstd
    offsets = torch.addcmul(shares, slopes, mean, value=-1)
    pieces = num_pieces(num_bytes(x) // num_ghosts)
    for *whole, slope, offset, factor in zip(grads, ghosts, results, slopes, offsets, scale, strict=True):
        for piece_grad, piece, result in zip(*(matrix.chunk(pieces) for matrix in whole), strict=True):
            # Each step reads one large matrix, the second besides what the first has left in the cache.
            torch.addcmul(offset, piece, slope, out=result)
            torch.addcmul(result, piece_grad, factor, out=result)
    return Gradients(output, *sums.sum(0))
