"""Ghost batch norm by the native training kernels, for every device and type: a call for each ghost."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_batch.ghost.layout import Gradients, Normalized, native_backward, native_forward
from elastic_batch.ghost.memory import empty_like


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, num_ghosts: int, eps: float) -> Normalized:
    """Normalise each ghost of a dense batch [N, C, ...] with its own mean and variance."""
    output = empty_like(x)
    weight, bias = _wide(weight, x), _wide(bias, x)
    # With momentum 1 the kernel leaves a ghost's mean and unbiased variance in what it takes for running statistics.
    moments = x.new_zeros((num_ghosts, 2, x.size(1)), dtype=_wide_dtype(x))
    means, invstd = x.new_empty((2, num_ghosts, x.size(1)), dtype=moments.dtype)
    cut = (x.chunk(num_ghosts), output.chunk(num_ghosts), moments[:, 0], moments[:, 1], means, invstd)
    for ghost, out, mean, variance, save_mean, save_invstd in zip(*cut, strict=True):
        results = {"out": out, "save_mean": save_mean, "save_invstd": save_invstd}
        native_forward(ghost, weight, bias, mean, variance, True, 1.0, eps, **results)
    return Normalized(output, moments, invstd)


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, normalized: Normalized, *, needs_input: bool
) -> Gradients:
    """Gradients of `normalize` for `grad` [N, C, ...], which has the memory format of x."""
    num_ghosts = normalized.invstd.size(0)
    # Without a weight the kernels for GPUs cannot give its gradient.
    weight = x.new_ones(x.size(1), dtype=_wide_dtype(x)) if weight is None else _wide(weight, x)
    output = empty_like(x) if needs_input else None
    mask = [needs_input, True, True]
    sums = []
    for i, (ghost_grad, ghost, mean, invstd) in enumerate(
        zip(grad.chunk(num_ghosts), x.chunk(num_ghosts), normalized.moments[:, 0], normalized.invstd, strict=True)
    ):
        of_ghost, *of_parameters = native_backward(ghost_grad, ghost, weight, None, None, mean, invstd, True, 0.0, mask)
        sums.append(torch.stack(of_parameters))
        if output is not None:
            output.chunk(num_ghosts)[i].copy_(of_ghost)
    return Gradients(output, *torch.stack(sums).sum(0))


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    # The kernels take half-precision inputs with float32 parameters, or all in half precision; the former is exacter.
    return None if parameter is None else parameter.to(_wide_dtype(x))
