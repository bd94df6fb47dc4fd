"""Augmentation of whole batches of images, on their device: shift, flip, normalise.

Legend of shapes: B images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class ImageTransform:
    """Turns a batch `(images, *rest)` of stored pixels into what a model takes: shifted, flipped, normalised.

    The offsets come from torch's global CPU generator, which the data layer seeds for every micro-batch, so that a
    micro-batch looks the same on any worker and on any kind of device.

    Args:
        mean: Per channel, in the units of the stored pixels.
        std: Per channel, same units, above 0.
        crop_padding: Pixels of reflected border; a crop of the first size is taken at a random place. 0: no shift.
        horizontal_flip: Whether every other image, at random, is mirrored.

    >>> transform = ImageTransform(mean=(4.0,), std=(2.0,))
    >>> images, labels = transform((torch.full((1, 1, 2, 2), 8, dtype=torch.uint8), torch.tensor([3])))
    >>> images.flatten().tolist(), labels.tolist()
    ([2.0, 2.0, 2.0, 2.0], [3])
    """

    def __init__(
        self, *, mean: Sequence[float], std: Sequence[float], crop_padding: int = 0, horizontal_flip: bool = False
    ) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.crop_padding = crop_padding
        self.horizontal_flip = horizontal_flip

    def __call__(self, batch: Sequence[Any]) -> tuple[Any, ...]:
        images, *rest = batch
        if self.crop_padding or self.horizontal_flip:
            images = _gather_pixels(images, *self._draw_coordinates(images))
        return (self._normalise(images), *rest)

    def _normalise(self, images: Tensor) -> Tensor:
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return (images.float() - self.mean) / self.std

    def _draw_coordinates(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Source row of each output row [B, H] and source column of each output column [B, W]."""
        count, _, height, width = images.shape
        pad = self.crop_padding
        offsets = torch.randint(-pad, pad + 1, (count, 2)) if pad else torch.zeros(count, 2, dtype=torch.long)
        rows = _reflect(torch.arange(height) + offsets[:, :1], height)
        columns = _reflect(torch.arange(width) + offsets[:, 1:], width)
        if self.horizontal_flip:
            mirrored = torch.rand(count, 1) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        return rows.to(images.device, non_blocking=True), columns.to(images.device, non_blocking=True)


class LayoutTransform:
    """Lays the images of a batch out in memory as the model wants them, after another transform.

    Args:
        layout: torch.channels_last, say.
        transform: Applied first; None: nothing is.
    """

    def __init__(self, layout: torch.memory_format, transform: Callable[[Any], Any] | None = None) -> None:
        self.layout = layout
        self.transform = transform

    def __call__(self, batch: Any) -> Any:
        images, *rest = self.transform(batch) if self.transform else batch
        assert isinstance(images, Tensor)
        return (images.contiguous(memory_format=self.layout), *rest)


def _reflect(coordinates: Tensor, size: int) -> Tensor:
    """Fold coordinates outside [0, size) back inside, without repeating the border (as reflect padding does)."""
    coordinates = coordinates.abs()
    return torch.where(coordinates >= size, 2 * (size - 1) - coordinates, coordinates)


def _gather_pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pad, crop and flip in one gather; works on any dtype, where reflect padding knows floats only."""
    count, channels, height, width = images.shape
    flat = rows.unsqueeze(2) * width + columns.unsqueeze(1)  # [B, H, W] -> place in a flattened image
    index = flat.view(count, 1, height * width).expand(count, channels, height * width)
    return images.flatten(2).gather(2, index).view(count, channels, height, width)
