"""Small jobs with everything in them that could depend on the cluster: augmentation, dropout, batch norm, masked
losses."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

NUM_SAMPLES = 400
MICRO_BATCH = 4
GHOST = 2
FIRST_BATCH = 16
SECOND_BATCH = 32
MILESTONE = 50 * FIRST_BATCH
END = MILESTONE + 50 * SECOND_BATCH
LEARNING_RATE = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-3
SEED = 11


class NoisyImages(Dataset[Any]):
    """Fixed images, augmented by draws from all three global generators."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(NUM_SAMPLES, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(0, 5, (NUM_SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index] + 0.1 * torch.randn(3, 6, 6, dtype=torch.float64).to(self.images.dtype)
        if random.random() < 0.5:
            image = image.flip(2)
        return image * float(np.random.uniform(0.9, 1.1)), self.labels[index]


class MaskedTokens(Dataset[Any]):
    """Fixed sequences, of which a varying number of tokens counts; some sequences have none."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(2)
        self.tokens = torch.randint(0, 20, (NUM_SAMPLES, 7), generator=generator)
        lengths = torch.randint(0, 7, (NUM_SAMPLES, 1), generator=generator)
        self.masks = torch.arange(7) < lengths

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[index], "mask": self.masks[index]}


def add_noise(batch: Any) -> Any:
    """An augmentation of a whole micro-batch."""
    images, labels = batch
    return images + 0.05 * torch.randn_like(images), labels


def image_loss(model: nn.Module, batch: Any) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def token_loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    scores = model(batch["tokens"])
    losses = F.cross_entropy(scores.flatten(0, 1), batch["tokens"].roll(-1, 1).flatten(), reduction="none")
    mask = batch["mask"].flatten()
    return (losses * mask).sum(), mask.sum()


def image_model(dtype: torch.dtype, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        activation(),
        nn.Dropout(0.2),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8, momentum=0.2),
        activation(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(32, 5),
    ).to(dtype)


class TokenModel(nn.Module):
    """Embedding, a residual layer with dropout, a read-out; one parameter is used by some sequences only, one by
    none."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.embedding = nn.Embedding(20, 12)
        self.norm = nn.LayerNorm(12)
        self.dropout = nn.Dropout(0.1)
        self.hidden = nn.Linear(12, 12)
        self.read_out = nn.Linear(12, 20)
        self.rare = nn.Parameter(torch.zeros(12))
        self.unused = nn.Parameter(torch.ones(3))
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        if bool((tokens[:, 0] == 3).any()):
            hidden = hidden + self.rare
        hidden = hidden + self.dropout(torch.tanh(self.hidden(self.norm(hidden))))
        scores: Tensor = self.read_out(hidden)
        return scores


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )


@dataclass(frozen=True)
class SmallJob:
    """A job by its parts; each is made anew in every process."""

    dataset: Callable[[torch.dtype], Dataset[Any]]
    model: Callable[[torch.dtype], nn.Module]
    loss_fn: Callable[[nn.Module, Any], Any]
    batch_transform: Callable[[Any], Any] | None = None
    dtype: torch.dtype = torch.float64


IMAGES = SmallJob(NoisyImages, image_model, image_loss, add_noise)
TOKENS = SmallJob(MaskedTokens, TokenModel, token_loss)

# Without kinks: rounding to bfloat16 moves some ReLU's input across 0, and with it this model's gradient by 2.6 % even
# in a plain autocast step of torch.
SMOOTH_IMAGES = SmallJob(NoisyImages, lambda dtype: image_model(dtype, nn.GELU), image_loss, add_noise, torch.float32)
