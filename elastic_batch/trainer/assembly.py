"""What a trainer is put together from: checks of what it is given, and the parts that options describe."""

from __future__ import annotations

import hashlib
import logging
import os
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import Dataset

from elastic_batch.data import BatchSource, count_samples, open_source
from elastic_batch.errors import InvalidSetting
from elastic_batch.ghost import convert_batch_norm
from elastic_batch.noise import NoiseScaleEstimator
from elastic_batch.schedule import Schedule
from elastic_batch.stream import SampleStream
from elastic_batch.trainer.options import TrainerOptions
from elastic_batch.trainer.steering import SteeredOptimizer

logger = logging.getLogger(__name__)


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model that reduces gradients itself.

    Raises:
        InvalidSetting: It does.
    """
    if isinstance(model, DistributedDataParallel | DataParallel):
        raise InvalidSetting(
            "model",
            type(model).__name__,
            "must be the bare model: the trainer reduces gradients itself",
            "Pass model.module",
        )


def require_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The model's parameters, which are all there.

    Raises:
        InvalidSetting: It has none, or lazy ones that no forward pass has given a shape.
    """
    parameters = list(model.parameters())
    kind = type(model).__name__
    if not parameters:
        raise InvalidSetting("model", kind, "must have parameters")
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in parameters):
        raise InvalidSetting("model", kind, "has lazy parameters without a shape", "Run a batch through it before")
    return parameters


def require_trained_inside(model: nn.Module, optimizer: SteeredOptimizer) -> None:
    """Refuse an optimizer that trains nothing, or parameters that are not the model's: no checkpoint would have them.

    Raises:
        InvalidSetting: It does.
    """
    if not optimizer.parameters:
        rule = "must train some of its parameters; all that the optimizer has are frozen"
        raise InvalidSetting("model", type(model).__name__, rule, "Set requires_grad before the trainer is made")
    own = set(model.parameters())
    if outside := [tuple(parameter.shape) for parameter in optimizer.parameters if parameter not in own]:
        rule = f"must train parameters of the model only; {len(outside)} are not in it, of shape {outside[0]} for one"
        remedy = "Put whatever is trained, a loss with parameters of its own included, into one module"
        raise InvalidSetting("optimizer", type(optimizer.optimizer).__name__, rule, remedy)


def require_schedule(schedule: object) -> None:
    """Refuse what is not a schedule's specification, a bare `torch.optim.lr_scheduler` above all.

    Raises:
        InvalidSetting: It is not.
    """
    if not hasattr(schedule, "build"):
        raise InvalidSetting(
            "schedule",
            type(schedule).__name__,
            "must be what from_lr_scheduler gives, or a specification of elastic_batch.schedule",
            "Convert a torch scheduler with from_lr_scheduler(scheduler, per=..., max_duration=..., ...)",
        )


def make_deterministic() -> None:
    """Ask torch for algorithms that repeat a result to the bit; for the whole process."""
    # cuBLAS reads this when it is first used; without it some of its kernels add in any order.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def convert_norms(model: nn.Module, options: TrainerOptions) -> None:
    """Turn the model's batch norms into ghost batch norms, in place, and say so."""
    ghost_batch_size = options.ghost_batch_size or options.micro_batch_size
    if count := convert_batch_norm(model, ghost_batch_size):
        logger.info("%d batch norms became ghost batch norms of %d samples", count, ghost_batch_size)


def open_training_source(dataset: Dataset[Any], options: TrainerOptions, device: torch.device) -> BatchSource:
    """Batches of the training set in the order of the job's stream."""
    return open_source(
        dataset,
        stream=SampleStream(count_samples(dataset, "train_set"), options.seed, block_size=options.block_size),
        micro_batch_size=options.micro_batch_size,
        device=device,
        collate_fn=options.collate_fn,
        num_workers=options.num_workers,
        prefetch_factor=options.prefetch_factor,
        batch_transform=options.batch_transform,
    )


def make_estimator(options: TrainerOptions, schedule: Schedule) -> NoiseScaleEstimator | None:
    """The estimator of the measured noise scale, if it is wanted."""
    if not options.measure_noise:
        return None
    default_horizon = max(schedule.num_samples // 10, 50 * schedule.at(0).global_batch_size)
    return NoiseScaleEstimator(options.noise_horizon or default_horizon)


def fingerprint(
    options: TrainerOptions, schedule: Schedule, optimizer: SteeredOptimizer, model: nn.Module
) -> dict[str, Any]:
    """What alters the trajectory, in plain values."""
    settings = (
        "micro_batch_size",
        "seed",
        "precision",
        "max_grad_norm",
        "on_non_finite",
        "momentum_correction",
        "block_size",
    )
    names = {parameter: name.replace("_orig_mod.", "") for name, parameter in model.named_parameters()}
    groups = [
        {name: value for name, value in group.items() if name not in ("params", "lr") and _is_plain(value)}
        | {"parameters": _in_few_words([names.get(parameter, "") for parameter in group["params"]])}
        for group in optimizer.optimizer.param_groups
    ]
    for group, ratio in zip(groups, optimizer.ratios, strict=True):
        group |= {"learning_rate_ratio": ratio} if ratio != 1 else {}
    return {
        "schedule": {
            "rule": schedule.rule,
            "learning_rate": schedule.base_learning_rate,
            "so_far": schedule.digest(schedule.end),
        },
        "end": schedule.end,
        "num_samples": schedule.num_samples,
        "optimizer": {"name": type(optimizer.optimizer).__name__, "groups": groups},
        "ghost_batch_size": options.ghost_batch_size or options.micro_batch_size,
        **{name: getattr(options, name) for name in settings},
        **({"job": options.trajectory} if options.trajectory else {}),
    }


def _in_few_words(names: list[str]) -> str:
    """How many parameters, the first one's name, and a digest of all in their order."""
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    return f"{len(names)} from {names[0]} on ({digest})" if names else "none"


def _is_plain(value: object) -> bool:
    plain = (bool, int, float, str, type(None))
    return isinstance(value, plain) or (
        isinstance(value, tuple | list) and all(isinstance(item, plain) for item in value)
    )
