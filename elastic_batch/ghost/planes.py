"""Ghost batch norm on the CPU for inputs whose channels are planes in memory ([N, C, P], contiguous)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elastic_batch.ghost.layout import Gradients, Normalized, native_forward, num_bytes, num_pieces, sums_of_products
from elastic_batch.ghost.memory import empty_like

# Ghosts of together this size are handled at once: few small operations for small ghosts, and what was read once is
# still in the cache.
_GROUP_BYTES = 8 * 1024**2


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, num_ghosts: int, eps: float) -> Normalized:
    """As `native.normalize`, in half the time: the native statistics are slow here, the backward pass's sums are not.

    Each ghost is shifted by the mean of its first row, which is never further from the ghost's mean than
    sqrt(rows - 1) standard deviations, so the sums of squares of what is left lose no accuracy.
    """
    output, channels = empty_like(x), x.size(1)
    count = x.numel() // (num_ghosts * channels)
    planes = x.view(num_ghosts, -1, channels, count * num_ghosts // x.size(0))  # [k, rows, C, P]
    shifted, results = output.view(planes.shape), output.chunk(num_ghosts)
    shift = planes[:, 0].mean(2)  # [k, C]
    zeros, ones = x.new_zeros(shift.shape), x.new_ones(shift.shape)
    moments, invstd = x.new_empty((num_ghosts, 2, channels)), x.new_empty((num_ghosts, channels))
    for group in _groups(num_ghosts, num_bytes(results[0])):
        torch.sub(planes[group], shift[group, None, :, None], out=shifted[group])
        sums = sums_of_products(results[group], results[group], zeros[group], ones[group])
        squares, offset = sums.double().div_(count).unbind(1)
        variance = torch.addcmul(squares, offset, offset, value=-1).clamp_(min=0)
        torch.add(shift[group], offset, out=moments[group, 0])
        torch.mul(variance, count / (count - 1), out=moments[group, 1])
        torch.rsqrt(variance + eps, out=invstd[group])
        for result, mean, scale in zip(results[group], offset.to(x.dtype), variance.to(x.dtype), strict=True):
            _evaluate(result, mean, scale, weight, bias, eps, result)
    return Normalized(output, moments, invstd)


def gradients(grad: Tensor, x: Tensor, weight: Tensor | None, normalized: Normalized) -> Gradients:
    """As `native.gradients`: sums, then input = slope * (x - mean) + offset + scale * grad."""
    invstd = normalized.invstd
    num_ghosts, channels = invstd.shape
    output = empty_like(x)
    grads, ghosts, results = (tensor.chunk(num_ghosts) for tensor in (grad, x, output))
    means, ones = normalized.moments[:, 0], x.new_ones(channels)
    sums = sums_of_products(grads, ghosts, means, invstd)
    scale = invstd if weight is None else invstd * weight
    slopes, offsets = (sums * (scale * (-num_ghosts * channels / x.numel())).unsqueeze(1)).unbind(1)
    slopes = slopes * invstd
    pieces = num_pieces(num_bytes(ghosts[0]))
    each = zip(grads, ghosts, results, means, slopes, offsets, scale.unsqueeze(-1), strict=True)
    for *whole, mean, slope, offset, factor in each:
        for piece_grad, piece, result in zip(*(tensor.chunk(pieces) for tensor in whole), strict=True):
            _evaluate(piece, mean, ones, slope, offset, 0.0, result)
            result.flatten(2).addcmul_(piece_grad.flatten(2), factor)
    return Gradients(output, *sums.sum(0))


def _groups(num_ghosts: int, ghost_bytes: int) -> Iterator[slice]:
    """Which ghosts to handle at once.

    >>> list(_groups(5, 4 * 1024**2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    size = max(1, _GROUP_BYTES // ghost_bytes)
    for start in range(0, num_ghosts, size):
        yield slice(start, min(start + size, num_ghosts))


def _evaluate(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, result: Tensor
) -> None:
    """(x - mean) / sqrt(variance + eps) * weight + bias into `result`, which may be x."""
    unused = x.new_empty(0)
    results = {"out": result, "save_mean": unused, "save_invstd": unused}
    native_forward(x, weight, bias, mean, variance, False, 0.0, eps, **results)
