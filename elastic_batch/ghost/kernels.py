"""Which sequence of kernel calls computes ghost batch norm for an input."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_batch.ghost import native, planes, rows
from elastic_batch.ghost.layout import Gradients, Normalized, channels_are_innermost, num_bytes

# Below this a ghost is done before faster kernels have made up for being more calls.
_LARGE_GHOST_BYTES = 128 * 1024


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, num_ghosts: int, eps: float) -> Normalized:
    """Normalise each ghost of a dense batch [N, C, ...] with its own mean and variance."""
    if channels_are_innermost(x) or not _has_fast_path(x, num_ghosts):
        return native.normalize(x, weight, bias, num_ghosts, eps)
    return planes.normalize(x, weight, bias, num_ghosts, eps)


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, normalized: Normalized, *, needs_input: bool
) -> Gradients:
    """Gradients of `normalize` for `grad` [N, C, ...], which has the memory format of x."""
    if not needs_input or not _has_fast_path(x, normalized.invstd.size(0)):
        return native.gradients(grad, x, weight, normalized, needs_input=needs_input)
    if channels_are_innermost(x):
        return rows.gradients(grad, x, weight, normalized)
    return planes.gradients(grad, x, weight, normalized)


def _has_fast_path(x: Tensor, num_ghosts: int) -> bool:
    # On the CPU the native kernels are not the fastest way for large ghosts. What the others compute is the same.
    is_large = num_bytes(x) >= num_ghosts * _LARGE_GHOST_BYTES
    return is_large and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
