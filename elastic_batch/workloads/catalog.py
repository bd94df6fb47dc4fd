"""Facts about the built-in data sets and the names of the built-in models; needs neither torch nor any data."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from elastic_batch.errors import InvalidSetting, UnknownName
from elastic_batch.job import DataSettings, Section


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSetFacts:
    """What is known of a data set before it is read.

    Args:
        summary: A few words for the user.
        num_training_samples: N of the schedule.
        num_test_samples: Samples that `evaluate` uses.
        num_classes: Labels are 0 to num_classes - 1.
        image_shape: (channels, height, width) as the model sees it.
        mean: Per channel over the training set, in the units of the stored pixels.
        std: Standard deviation per channel, same units.
        takes: Which fields of a job's `data` say where the set is, or fetch it.
        in_memory: Whether the whole set is held as one tensor, so that augmentation runs on whole batches.
    """

    summary: str
    num_training_samples: int
    num_test_samples: int
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    takes: tuple[str, ...] = ("root",)
    in_memory: bool = True


DATA_SETS = {
    "digits": DataSetFacts(
        summary="scanned handwritten digits, shipped with scikit-learn",
        num_training_samples=1437,
        num_test_samples=360,
        num_classes=10,
        image_shape=(1, 8, 8),
        mean=(4.884,),
        std=(6.017,),
        takes=(),
    ),
    "fashion-mnist": DataSetFacts(
        summary="grey photographs of clothes (Xiao et al. 2017)",
        num_training_samples=60_000,
        num_test_samples=10_000,
        num_classes=10,
        image_shape=(1, 28, 28),
        mean=(72.940,),
        std=(90.021,),
        takes=("root", "download"),
    ),
    "cifar10": DataSetFacts(
        summary="colour photographs of ten kinds of things (Krizhevsky 2009)",
        num_training_samples=50_000,
        num_test_samples=10_000,
        num_classes=10,
        image_shape=(3, 32, 32),
        mean=(125.307, 122.950, 113.865),
        std=(62.993, 62.089, 66.705),
        takes=("root", "download"),
    ),
    "imagenet": DataSetFacts(
        summary="a folder of images, train/CLASS/* and val/CLASS/* (ILSVRC 2012)",
        num_training_samples=1_281_167,
        num_test_samples=50_000,
        num_classes=1000,
        image_shape=(3, 224, 224),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        in_memory=False,
    ),
}
"""Name in a job file -> facts."""

MODELS = {
    "small-resnet": "a small residual net for grey images of 8x8 to 28x28 (args: width, blocks)",
    "wrn-D-K": "wide residual net of depth D = 6 n + 4 and width K (Zagoruyko & Komodakis 2016), as in wrn-16-4",
    "torchvision:NAME": "any classifier of torchvision, as in torchvision:resnet50",
    "timm:NAME": "any classifier of timm, as in timm:inception_resnet_v2 (pip install 'elastic-batch[timm]')",
}
"""Name in a job file -> a few words."""

_WIDE_RESNET = re.compile(r"wrn-(\d+)-(\d+)")


def facts_of(name: str) -> DataSetFacts:
    """Look up a built-in data set.

    Raises:
        UnknownName: No data set is called so; the message has the nearest name.

    >>> facts_of("cifar10").num_training_samples
    50000
    """
    if name not in DATA_SETS:
        raise UnknownName("data.name", name, DATA_SETS)
    return DATA_SETS[name]


def check_data(settings: DataSettings) -> None:
    """Refuse, before anything is read, settings that do not suit the data set they name.

    Raises:
        UnknownName: There is no such data set.
        InvalidSetting: An option is for another data set, or too large; or the set has another number of samples.
    """
    options = settings.augmentation
    if settings.name is None:
        _refuse_options(settings, "data", "root", "download", "image_size", why="is for built-in data sets; use args")
        _refuse_options(options, "data.augmentation", *type(options).model_fields, why="is for built-in data sets")
        return
    facts = facts_of(settings.name)
    _refuse_options(settings, "data", "args", why="is for a target of your own")
    for name in ("root", "download"):
        if name not in facts.takes:
            _refuse_options(settings, "data", name, why=f"{settings.name} has no use for it")
    if facts.in_memory:
        if settings.num_samples not in (None, facts.num_training_samples):
            rule = f"{settings.name} has {facts.num_training_samples} training samples"
            raise InvalidSetting("data.num_samples", settings.num_samples, rule, "Leave it out")
        _refuse_options(settings, "data", "image_size", why="is for image folders")
        _refuse_options(options, "data.augmentation", "min_crop_area", why="is for image folders; use crop_padding")
    else:
        _refuse_options(
            options, "data.augmentation", "crop_padding", why="is for data sets in memory; use min_crop_area"
        )
    smallest = min(facts.image_shape[1:])
    if options.crop_padding >= smallest:
        rule = f"must be below the image's height and width, {smallest}"
        raise InvalidSetting("data.augmentation.crop_padding", options.crop_padding, rule)


def _refuse_options(section: Section, path: str, *names: str, why: str) -> None:
    for name in names:
        if getattr(section, name) != type(section).model_fields[name].default:
            raise InvalidSetting(f"{path}.{name}", getattr(section, name), why)


def wide_resnet_shape(name: str) -> tuple[int, int] | None:
    """Read depth and width from a name such as `wrn-16-4`; None if it is no such name.

    Raises:
        InvalidSetting: The depth is not 6 n + 4.

    >>> wide_resnet_shape("wrn-16-4")
    (16, 4)
    """
    match = _WIDE_RESNET.fullmatch(name)
    if match is None:
        return None
    depth, width = int(match[1]), int(match[2])
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise InvalidSetting(
            "model.name",
            name,
            "a wide residual net has a depth of 6 n + 4 and a width of at least 1",
            "Known from the literature: wrn-10-1, wrn-16-4, wrn-28-10",
        )
    return depth, width


def check_model_name(name: str) -> None:
    """Refuse a model's name that no builder knows; names behind `torchvision:` and `timm:` are checked when built.

    Raises:
        UnknownName: With the nearest known name.
        InvalidSetting: A wide residual net of an impossible depth.
    """
    source, colon, rest = name.partition(":")
    if name == "small-resnet" or wide_resnet_shape(name) or (colon and rest and source in ("torchvision", "timm")):
        return
    raise UnknownName("model.name", name, [*MODELS, *_common_names()])


def _common_names() -> Iterable[str]:
    return ("wrn-10-1", "wrn-16-4", "wrn-28-10", "torchvision:resnet50", "timm:inception_resnet_v2")
