"""What carries collectives: one protocol, one file for each engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module

import torch

from elastic_batch.engines.distributed import DistributedEngine
from elastic_batch.engines.formation import Formation
from elastic_batch.engines.protocol import Departure, Engine, FixedWorld, Handle, Membership, Stage, Standing, Wishes
from elastic_batch.engines.solo import SoloEngine
from elastic_batch.launchers import LaunchedWorld, launched_world

__all__ = [
    "Departure",
    "DistributedEngine",
    "Engine",
    "FixedWorld",
    "Formation",
    "Handle",
    "LaunchedWorld",
    "Membership",
    "SoloEngine",
    "Stage",
    "Standing",
    "Wishes",
    "open_membership",
]

_ELASTIC = {"ELASTIC_BATCH_COORDINATOR", "ELASTIC_BATCH_RUN_DIR"}
"""Variables that name a coordinator."""


def open_membership(device: torch.device, environ: Mapping[str, str] = os.environ) -> Membership:
    """The membership that this process was started for: a coordinator's, torchrun's, Slurm's, or itself alone.

    Args:
        device: Where the model lives; it chooses the backend.
        environ: Where a coordinator is named, or a launcher describes the world.

    Raises:
        InvalidSetting: The coordinator is named, but not how to reach it.
        WorldBroken: The other workers did not come.
    """
    if not _ELASTIC.isdisjoint(environ):
        # By name, because a session stands on the engines; a fixed world does not load it.
        session: Membership = import_module("elastic_batch.worker").join(device, environ)
        return session
    world = launched_world(environ)
    if world is not None or torch.distributed.is_initialized():
        return FixedWorld(DistributedEngine.join(world, device))
    return FixedWorld(SoloEngine())
