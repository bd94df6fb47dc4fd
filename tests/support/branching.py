"""A model of which a forward may leave parts out."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Branching(nn.Module):
    """Three layers, of which a forward may leave out any."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(3))

    def forward(self, inputs: Tensor, *used: int) -> Tensor:
        for index in used:
            inputs = self.layers[index](inputs)
        loss: Tensor = inputs.square().sum()
        return loss


def inputs(seed: int) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
