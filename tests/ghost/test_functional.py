"""The function itself: every path against torch's batch norm on each ghost alone, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from elastic_batch.ghost import kernels, native
from elastic_batch.ghost.functional import composed, ghost_batch_norm
from elastic_batch.ghost.layout import native_backward

EPS = 1e-5
SHAPES = [(8, 5), (8, 5, 7), (8, 5, 4, 3), (8, 5, 1, 1), (8, 1, 3, 3), (8, 3, 2, 3, 2)]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Results(NamedTuple):
    output: Tensor
    of_input: Tensor
    of_weight: Tensor | None
    of_bias: Tensor | None
    moments: Tensor


@pytest.fixture(params=["native kernels", "kernels for large ghosts"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    large = 0 if "large" in request.param else 1 << 40
    monkeypatch.setattr(kernels, "_LARGE_GHOST_BYTES", large)


def leaf(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values.detach().to(dtype).requires_grad_()


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, grad: Tensor, num_ghosts: int) -> Results:
    x64, weight64, bias64 = (leaf(tensor, torch.float64) for tensor in (x, weight, bias))
    assert x64 is not None
    ghosts = x64.chunk(num_ghosts)
    output = torch.cat([F.batch_norm(ghost, None, None, weight64, bias64, True, 0.0, EPS) for ghost in ghosts])
    output.backward(grad.double())
    pooled = [0, *range(2, x.dim())]
    moments = torch.stack([torch.stack((ghost.mean(pooled), ghost.var(pooled))) for ghost in ghosts]).detach()
    assert x64.grad is not None
    of_weight, of_bias = (None if tensor is None else tensor.grad for tensor in (weight64, bias64))
    return Results(output.detach(), x64.grad, of_weight, of_bias, moments)


def ours(x: Tensor, weight: Tensor | None, bias: Tensor | None, grad: Tensor, num_ghosts: int) -> Results:
    x_leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    weight_leaf, bias_leaf = (None if t is None else t.detach().clone().requires_grad_() for t in (weight, bias))
    output, moments = ghost_batch_norm(x_leaf, weight_leaf, bias_leaf, x.size(0) // num_ghosts, EPS)
    output.backward(grad)
    assert x_leaf.grad is not None
    of_weight, of_bias = (None if t is None else t.grad for t in (weight_leaf, bias_leaf))
    return Results(output.detach(), x_leaf.grad, of_weight, of_bias, moments)


def assert_close(found: Results, expected: Results, tolerance: float) -> None:
    for name, a, b in zip(Results._fields, found, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("num_ghosts", [1, 2, 4])
def test_each_ghost_is_normalised_as_if_alone(
    shape: tuple[int, ...], channels_last: bool, affine: bool, num_ghosts: int
) -> None:
    x = torch.randn(shape, dtype=torch.float64) * 2 + 3
    if channels_last and x.dim() in FORMATS:
        x = x.contiguous(memory_format=FORMATS[x.dim()])
    weight, bias = torch.rand(2, shape[1], dtype=torch.float64).unbind() if affine else (None, None)
    grad = torch.randn(shape, dtype=torch.float64)  # contiguous, whatever the input is
    found = ours(x, weight, bias, grad, num_ghosts)
    assert_close(found, reference(x, weight, bias, grad, num_ghosts), 1e-10)
    if channels_last and x.dim() in FORMATS:
        assert found.output.is_contiguous(memory_format=FORMATS[x.dim()])


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str
)
@pytest.mark.parametrize("half_parameters", [False, True], ids=["float32 parameters", "parameters like the input"])
def test_lower_precision_stays_close_to_float64(
    channels_last: bool, dtype: torch.dtype, tolerance: float, half_parameters: bool
) -> None:
    x = torch.randn(16, 6, 5, 4).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.rand(2, 6) + 0.5).to(dtype if half_parameters else torch.float32).unbind()
    grad = torch.randn(x.shape).to(dtype)
    found = ours(x, weight, bias, grad, 2)
    assert found.output.dtype == dtype
    assert found.moments.dtype == torch.float32
    loose = tolerance * 8  # sums over a ghost
    expected = reference(x, weight, bias, grad, 2)
    torch.testing.assert_close(found.output.double(), expected.output, rtol=tolerance, atol=tolerance)
    assert_close(found, expected, loose)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_a_mean_far_from_zero_costs_no_more_accuracy_than_in_torch(channels_last: bool) -> None:
    x = torch.randn(32, 4, 16, 16) + 1000
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    exact = reference(x, None, None, torch.zeros_like(x), 2).output
    output, _ = ghost_batch_norm(x, None, None, 16, EPS)
    plain = torch.cat([F.batch_norm(ghost, None, None, None, None, True, 0.0, EPS) for ghost in x.chunk(2)])
    assert (output - exact).abs().max() <= (plain - exact).abs().max() * 1.5 + 1e-4


def test_a_ghost_of_equal_values_becomes_the_bias() -> None:
    x = torch.full((8, 3, 64, 64), 7.25)
    output, moments = ghost_batch_norm(x, torch.ones(3), torch.full((3,), 0.5), 4, EPS)
    torch.testing.assert_close(output, torch.full_like(x, 0.5))
    torch.testing.assert_close(moments, torch.tensor([7.25, 0.0]).view(1, 2, 1).expand(2, 2, 3))


def test_an_input_in_no_dense_format_is_accepted() -> None:
    x = torch.randn(4, 6, 3, 8, dtype=torch.float64).permute(3, 1, 2, 0)  # [8, 6, 3, 4]
    grad = torch.randn(8, 6, 3, 4, dtype=torch.float64)
    found = ours(x, None, None, grad, 2)
    assert_close(found, reference(x, None, None, grad, 2), 1e-10)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_first_and_second_derivatives_pass_gradcheck(channels_last: bool) -> None:
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(2, 3, dtype=torch.float64).unbind()
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ghost_batch_norm(x, weight, bias, 2, EPS)[0]

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.usefixtures("_kernels")
def test_only_the_gradients_that_are_asked_for_are_made() -> None:
    x, weight, bias = torch.randn(8, 3, 4, 4), torch.rand(3, requires_grad=True), torch.rand(3)
    output, _ = ghost_batch_norm(x, weight, bias, 4, EPS)
    output.square().sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert bias.grad is None
    plain = F.batch_norm(x[:4], None, None, weight, bias, True, 0.0, EPS)
    torch.testing.assert_close(output[:4], plain)


@pytest.mark.parametrize("needs_input", [True, False])
def test_the_native_kernels_get_a_weight_for_every_gradient_of_one(
    needs_input: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def watch(*arguments: Any) -> Any:
        asked.append((arguments[2], arguments[-1]))
        return native_backward(*arguments)

    monkeypatch.setattr(native, "native_backward", watch)
    x = torch.randn(8, 3)
    native.gradients(torch.ones(8, 3), x, None, native.normalize(x, None, None, 2, EPS), needs_input=needs_input)
    assert len(asked) == 2
    assert all(weight is not None or not mask[1] for weight, mask in asked)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.2), (torch.float16, 3e-2)]
)
def test_each_ghost_is_normalised_as_if_alone_on_cuda(
    shape: tuple[int, ...], channels_last: bool, affine: bool, dtype: torch.dtype, tolerance: float
) -> None:
    x = torch.randn(shape, device="cuda").to(dtype)
    if channels_last and x.dim() in FORMATS:
        x = x.contiguous(memory_format=FORMATS[x.dim()])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.rand(2, shape[1], device="cuda", dtype=wide).unbind() if affine else (None, None)
    grad = torch.randn(shape, device="cuda").to(dtype)
    assert_close(ours(x, weight, bias, grad, 2), reference(x, weight, bias, grad, 2), tolerance)


def test_the_composed_form_computes_the_same() -> None:
    x, weight, bias = torch.randn(8, 3, 4, 4), torch.rand(3), torch.rand(3)
    for found, expected in zip(
        composed(x, weight, bias, 2, EPS), ghost_batch_norm(x, weight, bias, 2, EPS), strict=True
    ):
        torch.testing.assert_close(found, expected)
