"""Training written plainly: one process, one backward for each micro-batch, no code of the package for gradients.

Only the order of samples and the seeds of their random draws come from the package, since they define the job.
"""

from __future__ import annotations

from typing import Any

import torch
from support import jobs
from support.jobs import SmallJob
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from elastic_batch.randomness import seeded
from elastic_batch.stream import SampleStream, micro_batch_seed


class PlainGhostNorm(nn.BatchNorm2d):
    """Normalises each run of samples on its own; keeps their statistics for the end of the update."""

    def __init__(self, like: nn.BatchNorm2d) -> None:
        super().__init__(like.num_features, eps=like.eps, momentum=like.momentum)
        self.to(like.running_mean.dtype if like.running_mean is not None else None)
        self.means: list[Tensor] = []
        self.variances: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        outputs = []
        for ghost in images.split(jobs.GHOST):
            self.means.append(ghost.detach().mean(dim=(0, 2, 3)))
            self.variances.append(ghost.detach().var(dim=(0, 2, 3), unbiased=True))
            outputs.append(F.batch_norm(ghost, None, None, self.weight, self.bias, training=True, eps=self.eps))
        return torch.cat(outputs)

    @torch.no_grad()
    def end_update(self) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        keep = (1 - self.momentum) ** len(self.means)
        self.running_mean.mul_(keep).add_((1 - keep) * torch.stack(self.means).mean(dim=0))
        self.running_var.mul_(keep).add_((1 - keep) * torch.stack(self.variances).mean(dim=0))
        self.num_batches_tracked.add_(len(self.means))
        self.means, self.variances = [], []


def train_plainly(
    job: SmallJob, num_updates: int = 100, *, perturb_seed: int | None = None, max_grad_norm: float | None = None
) -> dict[str, Any]:
    """The state after `num_updates` updates of `job`.

    Args:
        job: What to train.
        num_updates: How far.
        perturb_seed: Move each initial weight by one unit in the last place, up or down at random.
        max_grad_norm: Clip to this norm.
    """
    dataset: Any = job.dataset(job.dtype)
    model = job.model(job.dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(name, PlainGhostNorm(module))
    if perturb_seed is not None:
        _perturb(model, perturb_seed)
    optimizer = jobs.sgd(model)
    stream = SampleStream(jobs.NUM_SAMPLES, jobs.SEED)
    position = 0
    for _ in range(num_updates):
        batch_size = jobs.FIRST_BATCH if position < jobs.MILESTONE else jobs.SECOND_BATCH
        optimizer.zero_grad()
        total_weight = 0.0
        for start in range(position, position + batch_size, jobs.MICRO_BATCH):
            with seeded(micro_batch_seed(jobs.SEED, start, "data")):
                indices = stream.indices(start, start + jobs.MICRO_BATCH).tolist()
                batch = default_collate([dataset[index] for index in indices])
            if job.batch_transform is not None:
                with seeded(micro_batch_seed(jobs.SEED, start, "batch_transform")):
                    batch = job.batch_transform(batch)
            with seeded(micro_batch_seed(jobs.SEED, start, "forward")):
                loss = job.loss_fn(model, batch)
            loss_sum, weight = loss if isinstance(loss, tuple) else (loss * jobs.MICRO_BATCH, jobs.MICRO_BATCH)
            loss_sum.backward()
            total_weight += float(weight)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= total_weight
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        for module in model.modules():
            if isinstance(module, PlainGhostNorm):
                module.end_update()
        position += batch_size
    return state_of(model, optimizer)


def _perturb(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            target = torch.where(up, torch.inf, -torch.inf).to(parameter.dtype)
            parameter.copy_(torch.nextafter(parameter, target))


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that training changed, as tensors by name: parameters and buffers, optimizer buffers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for parameter, buffers in optimizer.state.items():
        for key, value in buffers.items():
            if isinstance(value, Tensor):
                state[f"{names[id(parameter)]}.{key}"] = value.detach().clone()
    return state


def largest_difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest, over tensors, of norm of difference over norm."""
    assert found.keys() == expected.keys()
    return max(_difference(found[name], expected[name]) for name in expected)


def _difference(found: Tensor, expected: Tensor) -> float:
    norm = float(expected.double().norm())
    difference = float((found.double() - expected.double()).norm())
    return difference / norm if norm > 0 else difference
