"""What is read through torchvision: its downloadable data sets, and folders of images."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from elastic_batch.errors import DataMissing, PackageMissing
from elastic_batch.job import DataSettings
from elastic_batch.workloads.catalog import DataSetFacts
from elastic_batch.workloads.data_sets import DataSets


def import_torchvision(what: str) -> Any:
    """Import torchvision, which `what` needs.

    Raises:
        PackageMissing: It is not installed.
    """
    try:
        import torchvision
    except ImportError as error:
        raise PackageMissing(what, "torchvision", "vision") from error
    return torchvision


def torchvision_data_set(name: str, root: Path, **options: Any) -> Any:
    """Open a data set of torchvision by its class's name, fetching it only once on a host if it may be fetched.

    Raises:
        DataMissing: It is not there, not whole, or could not be fetched.
    """
    datasets = import_torchvision(f"torchvision's {name}").datasets
    try:
        with _one_at_a_time(root) if options.get("download") else nullcontext():
            return getattr(datasets, name)(root, **options)
    except (RuntimeError, OSError) as error:
        found = str(error).partition(". You can use download=True")[0]  # an argument of torchvision's, none of a job's
        raise DataMissing(
            f"{name} is not whole in {root.absolute()} ({found}). Set data.root to the folder that holds it as "
            "torchvision lays it out (cifar-10-batches-py for CIFAR-10), or set data.download: true where there is a "
            "network"
        ) from error


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Let one process of this host download while the others wait."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".download.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_image_folder(settings: DataSettings, facts: DataSetFacts) -> DataSets:
    """Open `train/CLASS/*` and `val/CLASS/*`; data workers decode, crop and flip.

    Raises:
        DataMissing: One of the folders is not there.
    """
    root = Path(settings.root or "data/imagenet")
    missing = [part for part in ("train", "val") if not (root / part).is_dir()]
    if missing:
        places = " nor ".join(str((root / part).absolute()) for part in missing)
        raise DataMissing(
            f"imagenet: there is no folder {places}. Set data.root to a folder with train/CLASS/*.JPEG and "
            "val/CLASS/*.JPEG; ILSVRC 2012 is had from image-net.org"
        )
    size = settings.image_size or facts.image_shape[1]
    vision = import_torchvision("a folder of images")
    folder = vision.datasets.ImageFolder
    return DataSets(
        training=folder(root / "train", _folder_transform(vision.transforms, settings, facts, size)),
        evaluation=folder(root / "val", _centre_crop(vision.transforms, facts, size)),
    )


def _folder_transform(transforms: Any, settings: DataSettings, facts: DataSetFacts, size: int) -> Any:
    augmentation = settings.augmentation
    if augmentation.min_crop_area is None:
        steps = [transforms.Resize(round(size / 0.875)), transforms.CenterCrop(size)]
    else:
        steps = [transforms.RandomResizedCrop(size, scale=(augmentation.min_crop_area, 1.0))]
    if augmentation.horizontal_flip:
        steps.append(transforms.RandomHorizontalFlip())
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(facts.mean, facts.std)])


def _centre_crop(transforms: Any, facts: DataSetFacts, size: int) -> Any:
    # The middle 87.5 % of the shorter side (256 to 224), as everybody measures ImageNet.
    return transforms.Compose([
        transforms.Resize(round(size / 0.875)),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(facts.mean, facts.std),
    ])  # fmt: skip
