"""The sections of a job file other than `schedule`: data, model, loss, optimizer, checkpoints, evaluation."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema, model_validator

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule import Duration
from elastic_batch.schedule.settings import Settings

_TARGET_PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"


def _check_target(value: str) -> str:
    if not re.match(_TARGET_PATTERN, value):
        raise ValueError("must be package.module:attribute, as in torchvision.models:resnet18")
    return value


Target = Annotated[str, AfterValidator(_check_target), WithJsonSchema({"type": "string", "pattern": _TARGET_PATTERN})]


class Section(Settings):
    """Base of the sections other than `schedule`: no number in them is infinite."""

    model_config = ConfigDict(allow_inf_nan=False)


def _require_one(section: str, name: str | None, target: str | None) -> None:
    if (name is None) == (target is None):
        raise InvalidSetting("name", name, f"{section} needs either a name or a target, and not both")


class Augmentation(Section):
    """Random changes of training images; the default is none."""

    crop_padding: int = Field(default=0, ge=0)
    """Data sets in memory: pixels of reflected border, of which a crop of the first size is taken at random."""
    horizontal_flip: bool = False
    """Mirror every other image, at random."""
    min_crop_area: float | None = Field(default=None, gt=0, le=1)
    """Image folders: crop a random part of at least this share of the area and scale it to `image_size`."""


class DataSettings(Section):
    """What is trained on."""

    name: str | None = None
    """A built-in data set: digits, fashion-mnist, cifar10, imagenet."""
    target: Target | None = None
    """Your own: `package.module:attribute`, called with `args`; gives a training set or (training set, test set)."""
    args: dict[str, Any] = {}
    """Keyword arguments of the target."""
    root: str | None = None
    """Folder that holds the data set; null: the places that the message of a missing data set lists."""
    download: bool = False
    """Let torchvision fetch the data set where it is missing."""
    num_samples: int | None = Field(default=None, gt=0)
    """Training samples. Known for built-in sets; with a target it lets `plan` work without loading the data."""
    image_size: int | None = Field(default=None, gt=0)
    """Image folders: height and width that the model sees, in pixels; null: 224."""
    tokens_per_sample: int | None = Field(default=None, gt=0)
    """Needed where a duration is given in tokens."""
    block_size: int | None = Field(default=None, gt=0)
    """Shuffle blocks of this many neighbouring samples instead of single ones, so that slow storage reads in order."""
    augmentation: Augmentation = Augmentation()
    """Random changes of training images."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_one("data", self.name, self.target)
        return self


class ModelSettings(Section):
    """What is trained."""

    name: str | None = None
    """small-resnet, wrn-DEPTH-WIDTH, torchvision:NAME or timm:NAME."""
    target: Target | None = None
    """Your own: `package.module:attribute`, called with `args`; gives a torch.nn.Module."""
    args: dict[str, Any] = {}
    """Keyword arguments of the model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_one("model", self.name, self.target)
        return self


class LossSettings(Section):
    """What is minimised: a mean over the samples of a micro-batch, or a (sum, weight) pair."""

    name: Literal["cross-entropy", "mse"] | None = None
    """A built-in loss; cross-entropy where there is no target either."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Of cross-entropy: the share of probability spread over all classes."""
    target: Target | None = None
    """Your own: `package.module:attribute`, called with `args`; gives a function."""
    args: dict[str, Any] = {}
    """Keyword arguments of the target."""
    takes: Literal["outputs, targets", "model, batch"] = "outputs, targets"
    """What the target's function is called with."""

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("name") is None and fields.get("target") is None:
            return {**fields, "name": "cross-entropy"}
        return fields

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_one("loss", self.name, self.target)
        if self.target is None:
            for field in ("args", "takes"):
                if getattr(self, field) != type(self).model_fields[field].default:
                    raise InvalidSetting(field, getattr(self, field), "is for a target of your own")
        if self.label_smoothing and self.name != "cross-entropy":
            raise InvalidSetting("label_smoothing", self.label_smoothing, "only cross-entropy has it")
        return self


class _OptimizerSection(Section):
    learning_rate: float = Field(gt=0)
    """At the start of training; the schedule does the rest."""
    weight_decay: float = Field(default=0.0, ge=0)
    """L2 penalty of the optimizer (decoupled in adamw)."""
    decay_norms_and_biases: bool = True
    """Whether weight_decay also falls on biases and on the scales of norms."""


class SGDSettings(_OptimizerSection):
    """Stochastic gradient descent, torch.optim.SGD."""

    name: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Share of the velocity that an update keeps."""
    nesterov: bool = False
    """Look ahead along the velocity; needs momentum."""

    @property
    def adaptive(self) -> bool:
        """Whether steps are divided by a second moment."""
        return False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise InvalidSetting("nesterov", True, "needs a momentum above 0")
        return self


class _AdamSection(_OptimizerSection):
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""

    @property
    def momentum(self) -> float:
        """0: the noise scale of an adaptive optimizer is computed with m = 0."""
        return 0.0

    @property
    def adaptive(self) -> bool:
        """Whether steps are divided by a second moment."""
        return True


class AdamSettings(_AdamSection):
    """torch.optim.Adam."""

    name: Literal["adam"]


class AdamWSettings(_AdamSection):
    """torch.optim.AdamW."""

    name: Literal["adamw"]


class TargetOptimizerSettings(Section):
    """Your own optimizer, called as `target(parameters, lr=learning_rate, **args)`."""

    target: Target
    """`package.module:attribute` of a torch.optim.Optimizer."""
    args: dict[str, Any] = {}
    """Further keyword arguments; a momentum of SGD's kind belongs here and into `momentum`."""
    learning_rate: float = Field(gt=0)
    """At the start of training."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """What the schedule's noise scale takes for momentum."""
    adaptive: bool = False
    """Whether it divides by a running second moment, as Adam does (the conversion rules differ)."""


def _optimizer_tag(value: Any) -> str | None:
    fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return "custom" if "target" in fields else fields.get("name", "sgd")


OptimizerSettings = Annotated[
    Annotated[SGDSettings, Tag("sgd")]
    | Annotated[AdamSettings, Tag("adam")]
    | Annotated[AdamWSettings, Tag("adamw")]
    | Annotated[TargetOptimizerSettings, Tag("custom")],
    Discriminator(_optimizer_tag),
]


class CheckpointSettings(Section):
    """When and where the state is saved."""

    every: Duration = Duration.parse("1ep")
    """How often, as a length of training (1ep, 500e3sp)."""
    keep: int = Field(default=3, ge=1)
    """How many stay; the oldest goes first."""
    location: str | None = None
    """A directory that every worker sees, or an object store (s3://...); null: the run directory."""


class EvaluationSettings(Section):
    """When the test set is evaluated; always at the end."""

    every: Duration | None = Duration.parse("1ep")
    """How often, as a length of training; null: only at the end."""
    batch_size: int = Field(default=500, gt=0)
    """Samples of one forward pass of a worker."""
