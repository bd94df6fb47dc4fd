"""A model's own buffers, kept from forward passes that are no part of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from elastic_batch.ghost import GhostNorm


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Put back what passes change in the model's buffers: counts, averages, power iterations.

    Those of ghost norms are not looked at: what they measure waits for a commit.
    """
    kept = [
        (module._buffers, key, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        if not isinstance(module, GhostNorm)
        for key, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for holder, key, buffer, copy in kept:
                holder[key] = buffer  # the model may have put another one in its place
                if buffer is not None and copy is not None and _has_changed(buffer, copy):
                    buffer.copy_(copy)


def _has_changed(buffer: Tensor, copy: Tensor) -> bool:
    # Looked at closely: `buffer.data` changes without a new version, and an expanded tensor cannot be written to.
    return buffer.layout != torch.strided or not torch.equal(buffer, copy)
