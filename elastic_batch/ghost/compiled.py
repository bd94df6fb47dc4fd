"""Ghost batch norm as an operator that a compiler leaves as it is: on the CPU it is faster than what compilers make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elastic_batch.ghost.kernels import gradients, normalize
from elastic_batch.ghost.layout import Normalized, dense


def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_ghosts: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    output, moments, invstd = normalize(dense(x), weight, bias, num_ghosts, eps)
    return output, moments, invstd


def _describe(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_ghosts: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    moments = x.new_empty((num_ghosts, 2, x.size(1)), dtype=dtype)
    return torch.empty_like(dense(x)), moments, x.new_empty((num_ghosts, x.size(1)), dtype=dtype)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, moments: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    of_input, of_weight, of_bias = gradients(
        dense(grad, like=x), x, weight, Normalized(x, moments, invstd), needs_input=True
    )
    assert of_input is not None
    return of_input, of_weight.clone(), of_bias.clone()  # results of an operator must not share memory


def _describe_gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, moments: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(dense(x)), invstd.new_empty(x.size(1)), invstd.new_empty(x.size(1))


normalize_op = torch.library.custom_op(
    "elastic_batch::normalize_ghosts",
    _normalize,
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, SymInt num_ghosts, float eps) -> (Tensor, Tensor, Tensor)",
)
_gradients_op = torch.library.custom_op(
    "elastic_batch::ghost_gradients",
    _gradients,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor? weight, Tensor moments, Tensor invstd) -> (Tensor, Tensor, Tensor)",
)
normalize_op.register_fake(_describe)
_gradients_op.register_fake(_describe_gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, *_ = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, moments, invstd = ctx.saved_tensors
    of_input, of_weight, of_bias = _gradients_op(grad, x, weight, moments, invstd)
    return (
        of_input,
        None if weight is None else of_weight.to(weight.dtype),
        None if bias is None else of_bias.to(bias.dtype),
        None,
        None,
    )


normalize_op.register_autograd(_backward, setup_context=_save)
