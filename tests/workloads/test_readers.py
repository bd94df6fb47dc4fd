"""The built-in data sets: contents, places, and what is said when one is missing."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from elastic_batch.errors import DataMissing, PackageMissing
from elastic_batch.job import DataSettings
from elastic_batch.workloads import readers, vision
from elastic_batch.workloads.readers import load_data_sets

STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def settings(**fields: object) -> DataSettings:
    return DataSettings.model_validate(fields)


def write_idx_files(folder: Path) -> None:
    folder.mkdir(parents=True)
    for stem, count in zip(STEMS, (6, 6, 4, 4), strict=True):
        shape = (count, 28, 28) if "images" in stem else (count,)
        header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
        values = np.full(shape, 7, dtype=np.uint8) if "images" in stem else np.arange(count, dtype=np.uint8)
        (folder / stem).write_bytes(header + values.tobytes())


def test_the_digits_split_is_fixed_and_has_every_class_in_proportion() -> None:
    data = load_data_sets(settings(name="digits"))
    assert isinstance(data.training, TensorDataset)
    assert isinstance(data.evaluation, TensorDataset)
    images, labels = data.training.tensors
    assert (images.shape, images.dtype, labels.dtype) == ((1437, 1, 8, 8), torch.uint8, torch.int64)
    test_counts = torch.bincount(data.evaluation.tensors[1])
    assert len(data.evaluation) == 360
    assert test_counts.tolist() == [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]
    assert int(images.sum()) == 449_914


def test_normalised_digits_have_mean_0_and_deviation_1() -> None:
    data = load_data_sets(settings(name="digits"))
    assert data.evaluation_transform is not None
    images, _ = data.evaluation_transform(data.training[:])
    assert images.mean().item() == pytest.approx(0, abs=0.01)
    assert images.std().item() == pytest.approx(1, abs=0.01)


def test_only_training_images_are_augmented() -> None:
    data = load_data_sets(settings(name="digits", augmentation={"crop_padding": 1}))
    assert data.training_transform is not None
    assert data.evaluation_transform is not None
    batch = data.training[:32]
    plain, changed = data.evaluation_transform(batch)[0], data.training_transform(batch)[0]
    assert torch.equal(plain, data.evaluation_transform(batch)[0])
    assert not torch.equal(plain, changed)


@pytest.mark.parametrize("layout", [".", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_from_any_folder_with_the_usual_files(tmp_path: Path, layout: str) -> None:
    write_idx_files(tmp_path / "given" / layout)
    data = load_data_sets(settings(name="fashion-mnist", root=str(tmp_path / "given")))
    assert isinstance(data.training, TensorDataset)
    assert data.training.tensors[0].shape == (6, 1, 28, 28)
    assert data.training.tensors[1].tolist() == list(range(6))


def test_missing_fashion_mnist_says_where_it_was_looked_for_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataMissing, match=rf"{tmp_path}.*dataset-fashion-mnist.*data\.root.*data\.download"):
        load_data_sets(settings(name="fashion-mnist", root=str(tmp_path)))
    monkeypatch.setattr(readers, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataMissing, match=rf"data/fashion-mnist.*{tmp_path}/debian"):
        load_data_sets(settings(name="fashion-mnist"))


def test_missing_cifar10_says_where_it_was_looked_for_and_how_to_get_it(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(DataMissing, match=rf"{tmp_path}.*cifar-10-batches-py.*data\.download: true") as caught:
        load_data_sets(settings(name="cifar10", root=str(tmp_path)))
    assert "download=True" not in str(caught.value)


def test_cifar10_becomes_channels_first_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(root: Path, *, train: bool, download: bool) -> SimpleNamespace:
        assert (root, download) == (tmp_path, False)
        count = 5 if train else 2
        return SimpleNamespace(data=np.zeros((count, 32, 32, 3), dtype=np.uint8), targets=[1] * count)

    torchvision = SimpleNamespace(datasets=SimpleNamespace(CIFAR10=fake))
    monkeypatch.setattr(vision, "import_torchvision", lambda _: torchvision)
    data = load_data_sets(settings(name="cifar10", root=str(tmp_path)))
    assert isinstance(data.training, TensorDataset)
    assert data.training.tensors[0].shape == (5, 3, 32, 32)


def test_a_download_is_made_under_a_lock_and_only_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def fake(root: Path, *, train: bool, download: bool) -> SimpleNamespace:
        assert (root / ".download.lock").is_file()
        fetched.append((train, download))
        return SimpleNamespace(data=np.zeros((1, 32, 32, 3), dtype=np.uint8), targets=[1])

    monkeypatch.setattr(vision, "import_torchvision", lambda _: SimpleNamespace(datasets=SimpleNamespace(CIFAR10=fake)))
    load_data_sets(settings(name="cifar10", root=str(tmp_path / "new"), download=True))
    assert fetched == [(True, True), (False, True)]


def write_image_folder(root: Path) -> None:
    for part in ("train", "val"):
        for index, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            Image.new("RGB", (40, 30), (index * 255, 0, 0)).save(root / part / name / "one.png")


def test_an_image_folder_gives_normalised_crops_of_the_asked_size(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    write_image_folder(tmp_path)
    augmentation = {"min_crop_area": 0.5, "horizontal_flip": True}
    data = load_data_sets(settings(name="imagenet", root=str(tmp_path), image_size=16, augmentation=augmentation))
    assert data.evaluation is not None
    for part in (data.training, data.evaluation):
        image, label = part[1]
        assert (image.shape, label) == ((3, 16, 16), 1)
        assert image[0, 0, 0].item() == pytest.approx((1 - 0.485) / 0.229, rel=1e-3)


def test_a_missing_image_folder_says_which_folders_are_needed(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DataMissing, match=rf"no folder {tmp_path}/val\. Set data\.root.*train/CLASS"):
        load_data_sets(settings(name="imagenet", root=str(tmp_path)))


@pytest.mark.parametrize(
    ("package", "name", "extra"), [("sklearn.datasets", "digits", "digits"), ("torchvision", "cifar10", "vision")]
)
def test_a_missing_package_names_the_extra_that_has_it(
    monkeypatch: pytest.MonkeyPatch, package: str, name: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PackageMissing, match=rf"pip install 'elastic-batch\[{extra}\]'"):
        load_data_sets(settings(name=name))
