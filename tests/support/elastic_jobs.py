"""Jobs that elastic worlds train in tests: real digits and masked sequences, every sample carrying its own number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from support.jobs import MaskedTokens, TokenModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from elastic_batch.schedule import StepsSchedule

SEED = 17
MICRO_BATCH = 8


class NumberedDigits(Dataset[Any]):
    """The first 640 of scikit-learn's scanned digits, moved a little at random: (image, digit, number)."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = torch.tensor(digits.images[:640] / 16, dtype=torch.float64).unsqueeze(1)
        self.labels = torch.tensor(digits.target[:640])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image = self.images[index] + 0.05 * torch.randn(1, 8, 8, dtype=torch.float64)
        return image.roll(int(torch.randint(-1, 2, ())), 2), self.labels[index], index


class NumberedTokens(MaskedTokens):
    """Masked sequences with their numbers."""

    def __init__(self) -> None:
        super().__init__(torch.float64)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "index": index}


def digit_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    ).double()


class LargeModel(nn.Module):
    """100 million parameters, of which an update uses few: what matters is how long they take to hand over."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.EmbeddingBag(1_000_000, 100, dtype=torch.float32)
        self.read_out = nn.Linear(100, 10)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.read_out(self.embedding((images.flatten(1) * 1000).long().clamp(0)))
        return scores


def digit_loss(model: nn.Module, batch: Any) -> Tensor:
    images, labels, _ = batch
    return F.cross_entropy(model(images), labels)


def token_loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    scores = model(batch["tokens"])
    losses = F.cross_entropy(scores.flatten(0, 1), batch["tokens"].roll(-1, 1).flatten(), reduction="none")
    mask = batch["mask"].flatten()
    return (losses * mask).sum(), mask.sum()


@dataclass(frozen=True)
class ElasticJob:
    """A job by its parts, made anew in every process.

    Attributes:
        dataset: Makes the training set.
        model: Makes the model, with its first weights.
        loss_fn: Of (model, batch).
        numbers: The samples' numbers in a batch.
        phases: Position -> global batch, as in `steps`.
        end: Length in samples.
    """

    dataset: Callable[[], Dataset[Any]]
    model: Callable[[], nn.Module]
    loss_fn: Callable[[nn.Module, Any], Any]
    numbers: Callable[[Any], Tensor]
    phases: str
    end: int

    def count(self, _: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """A measure for evaluations: the mean of the samples' numbers, known beforehand."""
        numbers = self.numbers(batch).double()
        return numbers.sum(), torch.tensor(float(len(numbers)))

    @property
    def schedule(self) -> StepsSchedule:
        first = int(self.phases.partition(" ")[0].partition(":")[2])
        return StepsSchedule.of(
            strategy="steps", global_batch_size=first, points=self.phases, max_duration=f"{self.end}sp"
        )

    def make(self) -> tuple[nn.Module, torch.optim.Optimizer, Dataset[Any]]:
        """Model, optimizer, training set."""
        model = self.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)
        return model, optimizer, self.dataset()


def _digit_numbers(batch: Any) -> Tensor:
    numbers: Tensor = batch[2]
    return numbers


def _token_numbers(batch: Any) -> Tensor:
    numbers: Tensor = batch["index"]
    return numbers


@cache
def elastic_jobs() -> dict[str, ElasticJob]:
    """By name."""
    return {
        "digits": ElasticJob(NumberedDigits, digit_model, digit_loss, _digit_numbers, "0:16 640sp:32", 640 + 1280),
        "endless": ElasticJob(NumberedDigits, digit_model, digit_loss, _digit_numbers, "0:32", 10**9),
        "large": ElasticJob(NumberedDigits, LargeModel, digit_loss, _digit_numbers, "0:32", 10**9),
        "tokens": ElasticJob(
            NumberedTokens, lambda: TokenModel(torch.float64), token_loss, _token_numbers, "0:16 400sp:24", 400 + 800
        ),
    }
