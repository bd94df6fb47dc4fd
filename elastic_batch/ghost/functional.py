"""Ghost batch norm as a differentiable function, in an eager form and in one that a compiler can fuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elastic_batch.ghost import native, planes, rows
from elastic_batch.ghost.layout import Gradients, Normalized, channels_are_innermost, dense, num_bytes

_LARGE_GHOST_BYTES = 128 * 1024


def ghost_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rows_per_ghost: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalise each contiguous run of `rows_per_ghost` rows with its own mean and variance.

    Source: Hoffer, Hubara and Soudry (2017), algorithm 1.

    Args:
        x: [N, C, ...].
        weight, bias: [C], or None.
        rows_per_ghost: Divides N; a ghost has more than one value per channel.
        eps: Added to the variance.

    Returns:
        The normalised batch, and [k, 2, C]: mean and unbiased variance of each ghost, without gradients.
    """
    if torch.compiler.is_compiling():
        return composed(x, weight, bias, rows_per_ghost, eps)
    output, statistics = _GhostBatchNorm.apply(dense(x), weight, bias, x.size(0) // rows_per_ghost, eps)
    return output, statistics


def composed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rows_per_ghost: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`ghost_batch_norm` from differentiable tensor operations: slow in eager mode, fused by a compiler."""
    ghosts = x.view(-1, rows_per_ghost, *x.shape[1:])  # [k, g, C, ...]
    exact = ghosts if x.dtype == torch.float64 else ghosts.float()
    pooled = [1, *range(3, ghosts.dim())]
    variance, mean = torch.var_mean(exact, dim=pooled, correction=0, keepdim=True)  # [k, 1, C, 1, ...]
    shape = [-1] + [1] * (x.dim() - 2)
    normalized = (exact - mean) * (variance + eps).rsqrt()
    if weight is not None:
        normalized = normalized * weight.view(shape)
    if bias is not None:
        normalized = normalized + bias.view(shape)
    count = exact.numel() // mean.numel()
    unbiased = variance * (count / (count - 1))
    statistics = torch.stack((mean.flatten(1), unbiased.flatten(1)), dim=1)
    return normalized.to(x.dtype).flatten(0, 1), statistics.detach()


class _GhostBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, num_ghosts: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        normalized = _normalize(x, weight, bias, num_ghosts, eps)
        ctx.save_for_backward(x, weight, bias, *normalized[1:])
        ctx.eps = eps
        ctx.mark_non_differentiable(normalized.moments)
        ctx.set_materialize_grads(False)
        return normalized.output, normalized.moments

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        x, weight, bias, *statistics = ctx.saved_tensors
        normalized = Normalized(x, *statistics)  # the output is not needed
        if torch.is_grad_enabled():  # create_graph=True: a gradient that can be differentiated again
            return _differentiable_gradients(ctx, grad, (x, weight, bias), x.size(0) // normalized.invstd.size(0))
        found = _gradients(dense(grad, like=x), x, weight, normalized, needs_input=ctx.needs_input_grad[0])
        of_weight = found.weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
        of_bias = found.bias.to(bias.dtype) if ctx.needs_input_grad[2] else None
        return found.input, of_weight, of_bias, None, None


def _has_fast_path(x: Tensor, num_ghosts: int) -> bool:
    # On the CPU the native kernels are not the fastest way for large ghosts. What the others compute is the same.
    is_large = num_bytes(x) >= num_ghosts * _LARGE_GHOST_BYTES
    return is_large and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, num_ghosts: int, eps: float) -> Normalized:
    if channels_are_innermost(x) or not _has_fast_path(x, num_ghosts):
        return native.normalize(x, weight, bias, num_ghosts, eps)
    return planes.normalize(x, weight, bias, num_ghosts, eps)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, normalized: Normalized, *, needs_input: bool
) -> Gradients:
    if not needs_input or not _has_fast_path(x, normalized.invstd.size(0)):
        return native.gradients(grad, x, weight, normalized, needs_input=needs_input)
    if channels_are_innermost(x):
        return rows.gradients(grad, x, weight, normalized)
    return planes.gradients(grad, x, weight, normalized)


def _differentiable_gradients(
    ctx: Any, grad: Tensor, inputs: tuple[Tensor | None, ...], rows_per_ghost: int
) -> tuple[Tensor | None, ...]:
    x, weight, bias = inputs
    assert x is not None
    output, _ = composed(x, weight, bias, rows_per_ghost, ctx.eps)
    wanted = [
        tensor for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed and tensor is not None
    ]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None
