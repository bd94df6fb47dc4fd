"""Buffers are as before, whoever changed them and however."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elastic_batch.ghost import convert_batch_norm
from elastic_batch.trainer.buffers import preserved_buffers


class Net(nn.Module):
    """A model with every kind of buffer."""

    count: torch.Tensor
    queue: torch.Tensor
    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("queue", torch.arange(4.0), persistent=False)
        self.register_buffer("mask", torch.ones(3).expand(2, 3))
        self.register_buffer("edges", torch.eye(2).to_sparse())
        self.register_buffer("late", None)


def test_buffers_come_back_as_they_were_and_as_the_same_tensors() -> None:
    model = Net()
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    with preserved_buffers(model):
        model.count += 3
        model.queue.data.mul_(2)
        model.mask = torch.zeros(2, 3)
        model.late = torch.ones(1)
        model.norm(torch.randn(4, 2))
        assert model.norm.num_batches_tracked == 1
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    for name, (buffer, value) in before.items():
        assert after[name] is buffer
        assert torch.equal(buffer.to_dense(), value.to_dense())


def test_buffers_come_back_after_an_error() -> None:
    model = Net()

    def fail() -> None:
        model.count += 3
        raise RuntimeError("no pass")

    with pytest.raises(RuntimeError, match="no pass"), preserved_buffers(model):
        fail()
    assert model.count == 0


def test_the_statistics_of_ghost_norms_are_not_its_business() -> None:
    model = Net()
    convert_batch_norm(model, 2)
    tracked = model.norm.num_batches_tracked
    assert tracked is not None
    with preserved_buffers(model):
        tracked.fill_(7)
    assert tracked == 7
