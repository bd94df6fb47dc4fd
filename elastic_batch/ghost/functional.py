"""Ghost batch norm as a differentiable function, eager and under a compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elastic_batch.ghost.compiled import normalize_op
from elastic_batch.ghost.kernels import gradients, normalize
from elastic_batch.ghost.layout import Normalized, dense


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
    num_ghosts = x.size(0) // rows_per_ghost
    if not torch.compiler.is_compiling():
        output, moments = _GhostBatchNorm.apply(dense(x), weight, bias, num_ghosts, eps)
    elif x.device.type == "cpu":
        output, moments, _ = normalize_op(x, weight, bias, num_ghosts, eps)
    else:
        output, moments = composed(x, weight, bias, rows_per_ghost, eps)
    return output, moments


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
        normalized = normalize(x, weight, bias, num_ghosts, eps)
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
        found = gradients(dense(grad, like=x), x, weight, normalized, needs_input=ctx.needs_input_grad[0])
        of_weight = found.weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
        of_bias = found.bias.to(bias.dtype) if ctx.needs_input_grad[2] else None
        return found.input, of_weight, of_bias, None, None


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
