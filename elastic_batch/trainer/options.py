"""Everything that a trainer can be told beyond model, optimizer, data and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

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
        for name, kind in _KINDS.items():
            _require(name, getattr(self, name), kind.fits(getattr(self, name)), kind.rule)
        every = self.checkpoint_every
        is_length = every is None or Duration.parse(every, "checkpoint_every").amount > 0
        _require("checkpoint_every", every, is_length, "must be above 0, or None for one at the end")
        ghost, micro = self.ghost_batch_size, self.micro_batch_size
        divides = ghost is None or micro % ghost == 0
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


class _Kind(NamedTuple):
    """What an option may be."""

    fits: Callable[[Any], bool]
    rule: str

    def or_none(self) -> _Kind:
        """The same, or None."""
        return _Kind(lambda value: value is None or self.fits(value), f"{self.rule}, or None")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _whole(least: int, most: float = math.inf) -> _Kind:
    limit = f"from {least} to {most}" if most < math.inf else f"at least {least}"
    return _Kind(lambda value: _is_whole(value) and least <= value <= most, f"must be a whole number, {limit}")


def _one_of(*words: str) -> _Kind:
    return _Kind(lambda value: value in words, f"must be {', '.join(words[:-1])} or {words[-1]}")


def _are_loggers(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(callable(getattr(each, "log", None)) for each in value)


_FLAG = _Kind(lambda value: isinstance(value, bool), "must be True or False")
_TEXT = _Kind(lambda value: isinstance(value, str), "must be a text")
_PATH = _Kind(lambda value: isinstance(value, str | PathLike), "must be a path")
_FIELDS = _Kind(lambda value: isinstance(value, dict), "must be a dict")
_FUNCTION = _Kind(callable, "must be a function")

_KINDS = {
    "micro_batch_size": _whole(1),
    "ghost_batch_size": _whole(1).or_none(),
    "seed": _whole(0, 2**64 - 1),
    "run_dir": _PATH.or_none(),
    "resume": _PATH._replace(rule="must be auto, never, or a path"),
    "name": _TEXT,
    "job": _FIELDS.or_none(),
    "trajectory": _FIELDS.or_none(),
    "precision": _one_of(*get_args(Precision)),
    "compile": _FLAG,
    "max_grad_norm": _Kind(lambda value: _is_number(value) and value > 0, "must be a number above 0").or_none(),
    "on_non_finite": _one_of("stop", "skip"),
    "momentum": _Kind(lambda value: _is_number(value) and 0 <= value < 1, "must be from 0 to below 1").or_none(),
    "adaptive_optimizer": _FLAG.or_none(),
    "momentum_correction": _FLAG,
    "deterministic": _FLAG,
    "micro_batches_per_pass": _Kind(
        lambda value: value == "auto" or (_is_whole(value) and value >= 1), "must be a whole number from 1 on, or auto"
    ),
    "spares": _whole(0),
    "measure_noise": _FLAG,
    "noise_horizon": _whole(1).or_none(),
    "check_loss": _FLAG,
    "check_every": _whole(0),
    "checkpoint_location": _PATH.or_none(),
    "keep": _whole(1),
    "num_workers": _whole(0),
    "prefetch_factor": _whole(1),
    "collate_fn": _FUNCTION.or_none(),
    "batch_transform": _FUNCTION.or_none(),
    "block_size": _whole(1).or_none(),
    "tokens_per_sample": _whole(1).or_none(),
    "metrics_port": _whole(0, 65535).or_none(),
    "metrics_file": _PATH.or_none(),
    "loggers": _Kind(
        _are_loggers,
        "must be a list of loggers, such as elastic_batch.telemetry.open_loggers(['tensorboard'], run_dir, name=..., "
        "job={}) gives",
    ),
}
"""Option -> what it may be, of all but `checkpoint_every`, a length of training."""


def _require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise InvalidSetting(name, value, rule)


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value) if isinstance(value, PathLike) else getattr(value, "__qualname__", repr(value))
