"""World after world in the same processes, on each kind of device and with each backend that this machine has."""

from __future__ import annotations

import pytest
import torch
from support.many_worlds import Worlds, hold_on_through

MIB = 1 << 20


def _several_gpus() -> bool:
    return torch.cuda.is_available() and torch.cuda.device_count() >= 2


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "worlds",
    [
        pytest.param(Worlds("gloo", ("cpu", "cpu"), 40), id="gloo on the CPU"),
        pytest.param(Worlds("nccl", ("cuda:0",), 200), id="NCCL alone", marks=pytest.mark.gpu),
        pytest.param(Worlds("gloo", ("cuda:0", "cuda:0"), 200), id="gloo, two on one GPU", marks=pytest.mark.gpu),
        pytest.param(
            Worlds("nccl", ("cuda:0", "cuda:1"), 200),
            id="NCCL on two GPUs",
            marks=pytest.mark.skipif(not _several_gpus(), reason="needs two CUDA devices"),
        ),
    ],
)
def test_many_worlds_leave_nothing_behind(worlds: Worlds) -> None:
    for early, late in hold_on_through(worlds):
        assert late.threads <= early.threads
        assert late.descriptors <= early.descriptors
        assert late.memory <= early.memory + 16 * MIB
