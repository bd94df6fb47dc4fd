"""Everything that a trainer can be told beyond model, optimizer, data and schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, get_args

from elastic_batch.errors import InvalidSetting, UnknownName
from elastic_batch.schedule import Duration
from elastic_batch.trainer.precision import Precision

if TYPE_CHECKING:
    from elastic_batch.telemetry import Logger

Resume = Literal["auto", "never"]


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """The keyword arguments of `Trainer`.

    Raises:
        InvalidSetting: A value is outside its range.
    """

    micro_batch_size: int
    """Samples of a micro-batch, the unit of work; the per-worker batch. At least 1."""
    ghost_batch_size: int | None = None
    """Samples that share batch-norm statistics; divides `micro_batch_size`. None: the micro-batch."""
    seed: int = 0
    """Fixes the order of samples and every random draw of training."""
    run_dir: str | PathLike[str] | None = None
    """Where the run's records and checkpoints go. None: nowhere."""
    resume: Resume | str | PathLike[str] = "never"
    """`never` starts fresh and refuses a used run directory; `auto` goes on where the run directory's newest good
    checkpoint stands, or starts fresh if there is none; a path names a checkpoint or a run directory."""
    name: str = "run"
    """What records and metrics call the run."""
    job: dict[str, Any] | None = None
    """The job as resolved, for the run directory; None: these options."""
    trajectory: dict[str, Any] | None = None
    """What else alters the trajectory (data, model, loss), in plain values; a run is resumed only where it is equal."""
    precision: Precision = "float32"
    """`float32` computes in the model's own format; `bf16` and `fp16` run the forward under autocast."""
    compile: bool = False
    """Compile the model with torch.compile."""
    max_grad_norm: float | None = None
    """Clip the divided gradient to this norm. None: do not clip."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: end the run with an error, or drop the update on every
    worker."""
    momentum: float | None = None
    """What the noise scale takes for momentum, from 0 to below 1. None: the optimizer's own, 0 where it has none."""
    adaptive_optimizer: bool | None = None
    """Whether steps are divided by a running second moment: conversion rules differ. None: so in the Adam family."""
    momentum_correction: bool = True
    """Scale SGD's velocity when the momentum changes, so that the averaged gradient is kept."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms: the same world then repeats a run to the bit."""
    micro_batches_per_pass: int | Literal["auto"] = 1
    """Micro-batches of one forward and backward where the trainer owns the step. `auto` measures speed and memory."""
    spares: int = 0
    """Workers beyond the number of micro-batches that stay in the world, in step, without work."""
    measure_noise: bool = True
    """Estimate the gradient noise scale from norms of the update."""
    noise_horizon: int | None = None
    """Samples over which the measured noise scale is smoothed. None: a tenth of an epoch, at least 50 first batches."""
    check_loss: bool = True
    """Compare the gradient over the first micro-batch with those over its halves: a mean over samples is required."""
    check_every: int = 500
    """Updates between comparisons of the workers' parameters. 0: never."""
    checkpoint_every: str | None = "1ep"
    """Length of training between checkpoints, with a unit (`1ep`, `1e5sp`). None: only at the end."""
    checkpoint_location: str | PathLike[str] | None = None
    """A directory that every worker sees, or an fsspec URL. None: `checkpoints` in the run directory."""
    keep: int = 3
    """Newest checkpoints that stay."""
    num_workers: int = 0
    """Processes that load data for this worker. 0: the training process loads."""
    prefetch_factor: int = 2
    """Batches that each data process loads ahead."""
    collate_fn: Callable[[list[Any]], Any] | None = None
    """Makes a batch of a list of samples. None: torch's default."""
    batch_transform: Callable[[Any], Any] | None = None
    """Augmentation of a micro-batch on the device, drawing from torch's global generator."""
    block_size: int | None = None
    """Samples that stay neighbours in the order of training, for slow storage. None: all are shuffled."""
    tokens_per_sample: int | None = None
    """Tokens of a sample, needed where lengths are given in tokens."""
    metrics_port: int | None = None
    """Port on which the lead worker serves Prometheus metrics. None: no server."""
    metrics_file: str | PathLike[str] | None = None
    """File, ending in `.prom`, that the lead worker keeps up to date for node_exporter. None: no file."""
    loggers: Sequence[Logger] = ()
    """Further receivers of the run's records, on the lead worker."""

    def __post_init__(self) -> None:
        for name, least in (
            ("micro_batch_size", 1),
            ("spares", 0),
            ("check_every", 0),
            ("keep", 1),
            ("num_workers", 0),
            ("prefetch_factor", 1),
        ):
            _require(name, getattr(self, name), getattr(self, name) >= least, f"must be at least {least}")
        _require("precision", self.precision, self.precision in get_args(Precision), "must be float32, bf16 or fp16")
        _require("on_non_finite", self.on_non_finite, self.on_non_finite in ("stop", "skip"), "must be stop or skip")
        norm = self.max_grad_norm
        _require("max_grad_norm", norm, norm is None or norm > 0, "must be above 0, or None not to clip")
        every = self.checkpoint_every
        is_length = every is None or Duration.parse(every, "checkpoint_every").amount > 0
        _require("checkpoint_every", every, is_length, "must be above 0, or None for one at the end")
        momentum = self.momentum
        _require("momentum", momentum, momentum is None or 0 <= momentum < 1, "must be from 0 to below 1")
        width = self.micro_batches_per_pass
        is_width = width == "auto" or (isinstance(width, int) and width >= 1)
        _require("micro_batches_per_pass", width, is_width, "must be a whole number from 1 on, or auto")
        ghost, micro = self.ghost_batch_size, self.micro_batch_size
        divides = ghost is None or (ghost >= 1 and micro % ghost == 0)
        _require("ghost_batch_size", ghost, divides, f"must divide micro_batch_size = {micro}")

    def as_plain_values(self) -> dict[str, Any]:
        """The options that a file can hold, for a run directory's record of the job."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "job"}
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def of(cls, **given: Any) -> TrainerOptions:
        """Options from keyword arguments.

        Raises:
            UnknownName: An argument is unknown; the message has the nearest known one.
            InvalidSetting: A value is outside its range, or `micro_batch_size` is missing.
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise UnknownName("Trainer argument", name, known)
        if "micro_batch_size" not in given:
            raise InvalidSetting("micro_batch_size", None, "must be given: samples of one unit of work", "Try 32")
        return cls(**given)


def _require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise InvalidSetting(name, value, rule)


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value) if isinstance(value, PathLike) else getattr(value, "__qualname__", repr(value))
