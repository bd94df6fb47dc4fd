"""What updates work with; it outlives them, and the worlds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from elastic_batch.data import BatchSource
from elastic_batch.engines import Engine, Standing
from elastic_batch.ghost import RunningStatistics
from elastic_batch.gradients import GradientSums
from elastic_batch.noise import NoiseScaleEstimator
from elastic_batch.trainer.first_batches import FirstBatches
from elastic_batch.trainer.header import Tally
from elastic_batch.trainer.precision import Autocast, LossScaler
from elastic_batch.trainer.seeding import PassSeeds
from elastic_batch.trainer.steering import SteeredOptimizer
from elastic_batch.trainer.stochastic import PassRandomness


@dataclass(kw_only=True)
class Machinery:
    """Everything that an update of one worker needs."""

    model: nn.Module
    device: torch.device
    seed: int
    seeds: PassSeeds
    autocast: Autocast
    max_grad_norm: float | None
    on_non_finite: Literal["stop", "skip"]
    engine: Engine
    source: BatchSource
    gradients: GradientSums
    tally: Tally
    statistics: RunningStatistics
    first_batches: FirstBatches
    randomness: PassRandomness
    optimizer: SteeredOptimizer
    scaler: LossScaler
    estimator: NoiseScaleEstimator | None
    standing: Standing
    secure: Callable[[], str | None]
    """Saves the state as it is, where that is this worker's; gives the name of the newest checkpoint that is good."""
    is_whole: bool = True
    """False while parameters change: a state that a failure leaves behind then belongs to no position."""
