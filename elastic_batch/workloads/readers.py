"""Reading of the built-in data sets, each a pair of images and labels held in memory or a folder of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from elastic_batch.errors import DataMissing, PackageMissing
from elastic_batch.job import DataSettings
from elastic_batch.workloads.augmentation import ImageTransform
from elastic_batch.workloads.catalog import DataSetFacts, facts_of
from elastic_batch.workloads.data_sets import DataSets
from elastic_batch.workloads.idx import find_idx, read_idx
from elastic_batch.workloads.vision import read_image_folder, torchvision_data_set

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def load_data_sets(settings: DataSettings) -> DataSets:
    """Read a built-in data set.

    Raises:
        UnknownName: There is none of this name.
        DataMissing: It is not there; the message says where it was looked for and how to get it.
        PackageMissing: The package that has or reads it is not installed.
    """
    name = settings.name or ""
    return _READERS[name](settings, facts_of(name))


def _in_memory(
    settings: DataSettings, facts: DataSetFacts, training: tuple[Any, Any], evaluation: tuple[Any, Any]
) -> DataSets:
    """Wrap (images [N, C, H, W] of bytes, labels [N]) pairs, each a numpy array."""
    augmentation = settings.augmentation
    return DataSets(
        training=_tensor_data_set(*training),
        evaluation=_tensor_data_set(*evaluation),
        training_transform=ImageTransform(
            mean=facts.mean,
            std=facts.std,
            crop_padding=augmentation.crop_padding,
            horizontal_flip=augmentation.horizontal_flip,
        ),
        evaluation_transform=ImageTransform(mean=facts.mean, std=facts.std),
    )


def _tensor_data_set(images: Any, labels: Any) -> TensorDataset:
    return TensorDataset(
        torch.from_numpy(np.array(images, dtype=np.uint8)), torch.from_numpy(np.array(labels, dtype=np.int64))
    )


def _read_digits(settings: DataSettings, facts: DataSetFacts) -> DataSets:
    """Sort the 1797 scans by label, keeping their order within one, and take every fifth for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise PackageMissing("the data set digits", "scikit-learn", "digits") from error
    scans = load_digits()
    order = np.argsort(scans.target, kind="stable")
    images, labels = scans.images[order][:, None], scans.target[order]
    for_test = np.arange(len(order)) % 5 == 0
    return _in_memory(settings, facts, (images[~for_test], labels[~for_test]), (images[for_test], labels[for_test]))


def _read_fashion_mnist(settings: DataSettings, facts: DataSetFacts) -> DataSets:
    roots = [Path(settings.root)] if settings.root else [Path("data/fashion-mnist"), DEBIAN_FASHION_MNIST]
    folders = [place for root in roots for place in (root, root / "FashionMNIST" / "raw")]
    stems = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    if settings.download and not all(find_idx(stem, folders) for stem in stems):
        torchvision_data_set("FashionMNIST", roots[0], train=True, download=True)
    arrays = []
    for stem in stems:
        path = find_idx(stem, folders)
        if path is None:
            raise DataMissing(
                f"fashion-mnist: {stem} (or {stem}.gz) is in none of {', '.join(map(str, folders))}. Install Debian's "
                "package dataset-fashion-mnist, set data.root to a folder with the usual IDX files, or set "
                "data.download: true where there is a network"
            )
        arrays.append(read_idx(path))
    train_images, train_labels, test_images, test_labels = arrays
    return _in_memory(settings, facts, (train_images[:, None], train_labels), (test_images[:, None], test_labels))


def _read_cifar10(settings: DataSettings, facts: DataSetFacts) -> DataSets:
    root = Path(settings.root or "data/cifar10")
    parts = [torchvision_data_set("CIFAR10", root, train=part, download=settings.download) for part in (True, False)]
    pairs = [(part.data.transpose(0, 3, 1, 2), part.targets) for part in parts]  # [N, H, W, C] -> [N, C, H, W]
    return _in_memory(settings, facts, *pairs)


_READERS: dict[str, Callable[[DataSettings, DataSetFacts], DataSets]] = {
    "digits": _read_digits,
    "fashion-mnist": _read_fashion_mnist,
    "cifar10": _read_cifar10,
    "imagenet": read_image_folder,
}
