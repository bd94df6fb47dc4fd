"""What carries collectives: one protocol, one file for each engine."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from elastic_batch.engines.distributed import DistributedEngine
from elastic_batch.engines.launchers import LaunchedWorld, launched_world
from elastic_batch.engines.protocol import Departure, Engine, FixedWorld, Handle, Membership, Stage, Standing, Wishes
from elastic_batch.engines.solo import SoloEngine

__all__ = [
    "Departure",
    "DistributedEngine",
    "Engine",
    "FixedWorld",
    "Handle",
    "LaunchedWorld",
    "Membership",
    "SoloEngine",
    "Stage",
    "Standing",
    "Wishes",
    "open_membership",
]


def open_membership(device: torch.device, environ: Mapping[str, str] = os.environ) -> Membership:
    """The world that this process was started in: torchrun's or Slurm's, or itself alone.

    Args:
        device: Where the model lives; it chooses the backend.
        environ: Where a launcher describes the world.

    Raises:
        WorldBroken: The other workers did not come.
    """
    world = launched_world(environ)
    if world is not None or torch.distributed.is_initialized():
        return FixedWorld(DistributedEngine.join(world, device))
    return FixedWorld(SoloEngine())
