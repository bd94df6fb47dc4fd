"""Memory for large results of ghost batch norm."""

from __future__ import annotations

import pytest
import torch

from elastic_batch.ghost import GhostBatchNorm2d
from elastic_batch.ghost.memory import empty_like


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_room_is_as_torch_would_make_it_whatever_its_size(rows: int, memory_format: torch.memory_format) -> None:
    x = torch.empty(rows, 64, 64, 64).contiguous(memory_format=memory_format)
    room = empty_like(x)
    assert (room.shape, room.stride(), room.dtype) == (x.shape, x.stride(), x.dtype)
    assert torch.equal(room.copy_(x.zero_()), x)


def test_a_result_without_memory_of_its_own_is_left_alone() -> None:
    assert empty_like(torch.empty(64, 64, 64, 64, device="meta")).device.type == "meta"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_large_batches_are_normalised_as_their_ghosts_alone(memory_format: torch.memory_format) -> None:
    x = torch.randn(32, 256, 32, 33).contiguous(memory_format=memory_format)
    norm = GhostBatchNorm2d(256, 16)
    alone = torch.cat([norm(ghost) for ghost in x.chunk(2)])
    torch.testing.assert_close(norm(x), alone, rtol=1e-5, atol=1e-5)
