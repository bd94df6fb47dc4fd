"""The two update loops that are compared, on the same model and data: the trainer's, and one in plain torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from elastic_batch import Trainer, convert_batch_norm
from elastic_batch.schedule import Duration, MilestoneSchedule
from elastic_batch.workloads.models import wide_resnet

VOCABULARY, CONTEXT, NUM_CLASSES = 256, 64, 10


class TransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward, each around a shortcut."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, states: Tensor) -> Tensor:  # [B, T, width]
        heads = self.queries_keys_values(self.norm1(states)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # [B, heads, T, width / heads]
        states = states + self.output(mixed.transpose(1, 2).flatten(2))
        return states + self.feed_forward(self.norm2(states))  # type: ignore[no-any-return]  # a module's result is Any


class Transformer(nn.Module):
    """A small causal language model: tokens [B, T] -> logits [B * T, vocabulary]."""

    def __init__(self, width: int = 128, num_layers: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.layers = nn.Sequential(*(TransformerLayer(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.layers(self.tokens(tokens) + self.places)
        return self.logits(self.norm(states)).flatten(0, 1)  # type: ignore[no-any-return]  # a module's result is Any


@dataclass(frozen=True, slots=True)
class Workload:
    """A model, its data and the size of a micro-batch."""

    make_model: Callable[[], nn.Module]
    make_data: Callable[[int], TensorDataset]
    micro_batch_size: int


def _images(num_samples: int) -> TensorDataset:
    return TensorDataset(torch.randn(num_samples, 1, 28, 28), torch.randint(NUM_CLASSES, (num_samples,)))


def _texts(num_samples: int) -> TensorDataset:
    return TensorDataset(*torch.randint(VOCABULARY, (2, num_samples, CONTEXT)))


WORKLOADS = {
    "WRN-10-1, 32 images of 28x28": Workload(
        lambda: wide_resnet(10, 1, channels_in=1, num_classes=NUM_CLASSES), _images, 32
    ),
    "transformer, 8 texts of 64 tokens": Workload(Transformer, _texts, 8),
}
_NUM_SAMPLES = 4096


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """The mean cross-entropy of a batch (inputs, labels)."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels.flatten())


def _parts(workload: Workload) -> tuple[nn.Module, torch.optim.Optimizer, TensorDataset]:
    """The same for both loops: weights, optimizer, data."""
    torch.manual_seed(0)
    data = workload.make_data(_NUM_SAMPLES)
    model = workload.make_model()
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), data


def trainer_loop(workload: Workload, *, num_micro_batches: int, **options: Any) -> Generator[float, None, None]:
    """The trainer's loop: each `next` does one update and gives its mean loss; to be closed.

    Args:
        workload: What is trained.
        num_micro_batches: Of one update, over all workers.
        **options: The trainer's.
    """
    model, optimizer, data = _parts(workload)
    schedule = MilestoneSchedule(
        strategy="decay-lr",
        global_batch_size=num_micro_batches * workload.micro_batch_size,
        milestones=(Duration.parse("999999ep"),),
        factor=5,
        max_duration=Duration.parse("1000000ep"),
    )
    size = workload.micro_batch_size
    with Trainer(model, optimizer, data, schedule, micro_batch_size=size, **options) as trainer:
        for update in trainer.updates():
            for batch in update:
                update.backward(loss_of(model, batch))
            update.step()
            yield update.loss


def plain_loop(workload: Workload, *, num_micro_batches: int, compiled: bool = False) -> Generator[float, None, None]:
    """What a script without the trainer does: each `next` does one update and gives its mean loss.

    Batch norms are the trainer's modules, so that the kernels are the same. In a process group the model is wrapped in
    DistributedDataParallel, which reduces in the last backward of an update only.

    Args:
        workload: What is trained.
        num_micro_batches: Of one update, on this worker.
        compiled: Compile the model.
    """
    model, optimizer, data = _parts(workload)
    convert_batch_norm(model, workload.micro_batch_size)
    if compiled:
        model.compile()
    wrapped: nn.Module = model
    if dist.is_initialized():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch have another name for one of them
            # The fastest settings: gradients are reduced where they are accumulated, running statistics stay local.
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    batches = _batches(data, workload.micro_batch_size)
    while True:
        total = torch.zeros(())
        for number in range(num_micro_batches):
            is_last = number + 1 == num_micro_batches
            local = wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not is_last else nullcontext()
            with local:
                loss = loss_of(wrapped, next(batches)) / num_micro_batches
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        yield total.item()


def _batches(data: TensorDataset, size: int) -> Iterator[list[Tensor]]:
    while True:
        order = torch.randperm(len(data))
        for start in range(0, len(data) - size + 1, size):
            index = order[start : start + size]
            yield [tensor.index_select(0, index) for tensor in data.tensors]


def block(loop: Iterator[float], num_updates: int = 1) -> Callable[[], None]:
    """Some updates of a loop, as one piece of work."""

    def work() -> None:
        for _ in range(num_updates):
            next(loop)

    return work
