"""Shift, flip and normalisation of whole batches, against plain padding and cropping of single images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_batch.workloads.augmentation import ImageTransform, LayoutTransform


def unscaled(*, crop_padding: int = 0, horizontal_flip: bool = False) -> ImageTransform:
    """A transform that leaves the pixels' values as they are."""
    return ImageTransform(mean=(0.0, 0.0), std=(1.0, 1.0), crop_padding=crop_padding, horizontal_flip=horizontal_flip)


def images(count: int = 64, height: int = 6, width: int = 7) -> Tensor:
    return torch.randint(0, 256, (count, 2, height, width), dtype=torch.uint8)


def crops(image: Tensor, pad: int, flips: bool) -> list[Tensor]:
    """Every result that padding, cropping and flipping one image may have."""
    _, height, width = image.shape
    padded = F.pad(image[None].float(), (pad,) * 4, mode="reflect")[0] if pad else image.float()
    found = [
        padded[:, top : top + height, left : left + width] for top in range(2 * pad + 1) for left in range(2 * pad + 1)
    ]
    return found + [one.flip(2) for one in found] if flips else found


@pytest.mark.parametrize(("pad", "flips"), [(0, True), (2, False), (2, True)])
def test_each_image_becomes_one_of_its_reflected_crops(pad: int, flips: bool) -> None:
    batch = images()
    changed, labels = unscaled(crop_padding=pad, horizontal_flip=flips)((batch, torch.arange(64)))
    for before, after in zip(batch, changed, strict=True):
        assert any(torch.equal(after, crop) for crop in crops(before, pad, flips))
    assert torch.equal(labels, torch.arange(64))


def test_all_shifts_and_both_flips_occur() -> None:
    image = images(1)
    transform = unscaled(crop_padding=1, horizontal_flip=True)
    changed, _ = transform((image.expand(600, -1, -1, -1), None))
    assert len({tuple(one.flatten().tolist()) for one in changed}) == 18


def test_images_of_one_batch_are_changed_independently() -> None:
    changed, _ = unscaled(crop_padding=2)((images(1).expand(50, -1, -1, -1), None))
    assert len({tuple(one.flatten().tolist()) for one in changed}) > 10


def test_the_draws_come_from_the_global_generator() -> None:
    batch, transform = (images(), None), unscaled(crop_padding=2, horizontal_flip=True)
    torch.manual_seed(3)
    first = transform(batch)[0]
    torch.manual_seed(3)
    assert torch.equal(transform(batch)[0], first)
    assert not torch.equal(transform(batch)[0], first)


def test_without_augmentation_nothing_is_drawn() -> None:
    batch, before = images(), torch.get_rng_state()
    unscaled()((batch, None))
    assert torch.equal(torch.get_rng_state(), before)


def test_channels_are_normalised_by_their_own_mean_and_deviation() -> None:
    batch = torch.tensor([10, 20], dtype=torch.uint8).view(1, 2, 1, 1)
    changed, _ = ImageTransform(mean=(5.0, 10.0), std=(5.0, 2.0))((batch, None))
    assert changed.flatten().tolist() == [1.0, 5.0]


def test_a_layout_is_laid_after_the_other_transform() -> None:
    images_out, labels = LayoutTransform(torch.channels_last, unscaled())((images(), torch.arange(64)))
    assert images_out.is_contiguous(memory_format=torch.channels_last)
    assert images_out.dtype is torch.float32
    assert torch.equal(labels, torch.arange(64))
