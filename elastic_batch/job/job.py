"""The job file's model: everything that a training run is, except where and on how many workers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, WithJsonSchema, model_validator

from elastic_batch.errors import InvalidSetting
from elastic_batch.job.complaints import explain
from elastic_batch.job.settings import (
    CheckpointSettings,
    DataSettings,
    EvaluationSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    Section,
)
from elastic_batch.schedule import AnySchedule, ConvertSchedule, MilestoneSchedule, Schedule, ScheduleContext

_DEVICE_PATTERN = r"^(auto|cpu|cuda(:\d+)?)$"


def _check_device(value: str) -> str:
    if not re.match(_DEVICE_PATTERN, value):
        raise ValueError("must be auto, cpu, cuda or cuda:N, as in cuda:1")
    return value


Device = Annotated[str, AfterValidator(_check_device), WithJsonSchema({"type": "string", "pattern": _DEVICE_PATTERN})]


class Job(Section):
    """A training run: what is trained, on what, how, for how long."""

    name: str = Field(min_length=1)
    """What the run is called in pictures and logs."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Decides the initial weights, the order of samples, augmentation and dropout."""
    data: DataSettings
    """What is trained on."""
    model: ModelSettings
    """What is trained."""
    loss: LossSettings = LossSettings()
    """What is minimised."""
    optimizer: OptimizerSettings
    """How gradients become steps; its learning rate and momentum are those at the start."""
    schedule: AnySchedule
    """Global batch, learning rate and momentum over the length of training."""
    micro_batch_size: int = Field(gt=0)
    """Samples of one unit of work; never changes, whatever the global batch and the number of workers."""
    ghost_batch_size: int | None = Field(default=None, gt=0)
    """Samples that share batch-norm statistics; divides micro_batch_size; null: micro_batch_size."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Number format of the forward and backward pass."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Clip the gradient of an update to this norm; null: never."""
    momentum_correction: bool = True
    """When the momentum changes, scale the velocity so that the averaged gradient is kept."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What to do when the loss or gradient of an update is not finite."""
    deterministic: bool = False
    """Use only deterministic kernels."""
    compile: bool = False
    """Compile the model with torch.compile."""
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    """Layout of image tensors."""
    micro_batches_per_pass: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Micro-batches that a worker runs as one pass; `auto` finds the fastest that cannot change the result."""
    num_workers: int = Field(default=0, ge=0)
    """Data-loading processes of each worker; 0: load in the worker itself."""
    num_threads: int | None = Field(default=None, gt=0)
    """CPU threads of each worker; null: as many as torch takes. Small nets are fastest on one."""
    spares: int = Field(default=0, ge=0)
    """Workers beyond the number of micro-batches that stay in step without work."""
    device: Device = "auto"
    """`auto` takes the GPU of this worker's local rank where there is one."""
    metrics_port: int | None = Field(default=None, ge=0, lt=65536)
    """Serve Prometheus metrics there; null: nowhere."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where metrics go besides the run directory."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """When and where the state is saved."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """When the test set is evaluated."""

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Check the fields of a job.

        Raises:
            InvalidSetting: Names the first wrong field, its value, the rule, and what to do.
        """
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            raise explain(error, cls) from None

    @model_validator(mode="after")
    def _check(self) -> Self:
        ghost, micro = self.ghost_batch_size, self.micro_batch_size
        if ghost is not None and micro % ghost:
            raise InvalidSetting("ghost_batch_size", ghost, f"must divide micro_batch_size = {micro}")
        for field, every in (("checkpoint.every", self.checkpoint.every), ("evaluation.every", self.evaluation.every)):
            if every is not None and every.amount == 0:
                raise InvalidSetting(field, str(every), "must be above 0")
        return self

    def build_schedule(self, num_samples: int) -> Schedule:
        """Resolve the schedule for a training set of N samples.

        Raises:
            InvalidSetting: A setting does not fit N, the micro-batch or the optimizer.
        """
        context = ScheduleContext(
            num_samples=num_samples,
            micro_batch_size=self.micro_batch_size,
            learning_rate=self.optimizer.learning_rate,
            momentum=self.optimizer.momentum,
            adaptive_optimizer=self.optimizer.adaptive,
            tokens_per_sample=self.data.tokens_per_sample,
        )
        return self.schedule.build(context)

    def with_plain_decay(self) -> Job | None:
        """The same job with its first batch throughout and a decaying learning rate: what it is compared with.

        None for schedules that give batches directly (steps, ramp, adaptive): no decay corresponds to them.
        """
        schedule = self.schedule
        if isinstance(schedule, MilestoneSchedule):
            changes: dict[str, Any] = {"strategy": "decay-lr", "raised": None}
        elif isinstance(schedule, ConvertSchedule):
            changes = {"max_global_batch_size": schedule.global_batch_size, "raised": None}
        else:
            return None
        return self.model_copy(update={"schedule": schedule.model_copy(update=changes)})

    def dump(self) -> dict[str, Any]:
        """The job as resolved, every default written out, as plain values that a file can hold."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> dict[str, Any]:
        """What alters the trajectory, as plain values; workers, paths, logging and intervals may change in a run.

        The length of training stays out where nothing before its end depends on it, so that a run can be prolonged.
        """
        known = self.model_dump(mode="json", include=set(TRAJECTORY))
        for machine in ("root", "download", "num_samples"):
            del known["data"][machine]
        known["ghost_batch_size"] = self.ghost_batch_size or self.micro_batch_size
        if not _length_matters(known["schedule"]):
            del known["schedule"]["max_duration"]
        return known


TRAJECTORY = (
    "seed",
    "data",
    "model",
    "loss",
    "optimizer",
    "schedule",
    "micro_batch_size",
    "ghost_batch_size",
    "precision",
    "max_grad_norm",
    "momentum_correction",
    "on_non_finite",
)
"""Fields that alter the trajectory."""
_LENGTH_FREE_SHAPES = {"constant", "multi-step", "step", "exponential", "cosine-restarts", "inverse-sqrt", "table"}


def _length_matters(schedule: Mapping[str, Any]) -> bool:
    """Whether a longer `max_duration` would change what happens before the old end."""
    shape = schedule.get("shape")
    return (shape is not None and shape["name"] not in _LENGTH_FREE_SHAPES) or _has_parts_of_the_whole(schedule)


def _has_parts_of_the_whole(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_parts_of_the_whole(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_parts_of_the_whole(item) for item in value)
    return isinstance(value, str) and value.endswith("dur")
