"""Residual nets that the recipes train, of plain torch modules (the trainer makes their norms ghost norms)."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


class PreActivationBlock(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice, around a shortcut (He et al. 2016, "Identity Mappings", figure 1b).

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output; where they differ from the input's, the shortcut is a 1x1 convolution of
            the activated input.
        stride: Of the first convolution and of the shortcut.
        dropout: Probability of dropping a feature between the convolutions (Zagoruyko & Komodakis 2016), 0 to 1.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        activated = F.relu(self.norm1(features))
        carried = features if self.shortcut is None else self.shortcut(activated)
        residual = self.conv1(activated)
        residual = self.conv2(self.dropout(F.relu(self.norm2(residual))))
        return cast(Tensor, carried + residual)


class ResidualNet(nn.Module):
    """Stem, stages of pre-activation blocks, norm, ReLU, global average, linear classifier.

    Args:
        stem_channels: Channels of the first 3x3 convolution.
        stage_channels: Channels of each stage; every stage but the first halves height and width.
        blocks_per_stage: Residual blocks in each stage.
        channels_in: Channels of the images.
        num_classes: Width of the output.
        dropout: Inside the blocks, 0 to 1.

    Raises:
        ValueError: A width or number is below 1.
    """

    def __init__(
        self,
        *,
        stem_channels: int,
        stage_channels: tuple[int, ...],
        blocks_per_stage: int,
        channels_in: int,
        num_classes: int,
        dropout: float = 0.0,
    ) -> None:
        if min(stem_channels, *stage_channels, blocks_per_stage, channels_in, num_classes) < 1:
            raise ValueError("widths, blocks, channels and classes must be at least 1")
        super().__init__()
        self.stem = nn.Conv2d(channels_in, stem_channels, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = stem_channels
        for stage, width in enumerate(stage_channels):
            for block in range(blocks_per_stage):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(PreActivationBlock(channels, width, stride, dropout))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, channels_in, H, W] to logits [B, num_classes]."""
        return self.head(self.blocks(self.stem(images)))

    def head(self, features: Tensor) -> Tensor:
        """Map the last block's features [B, C, H, W] to logits [B, num_classes]."""
        return cast(Tensor, self.classifier(F.relu(self.norm(features)).mean((2, 3))))

    def _initialise(self) -> None:
        # He et al. 2015 over the outgoing connections, as the wide residual net's authors do; the classifier from zero
        # bias, so that the first loss is that of a coin with num_classes sides.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)


def wide_resnet(depth: int, width: int, *, channels_in: int, num_classes: int, dropout: float = 0.0) -> ResidualNet:
    """Build WRN-depth-width of Zagoruyko & Komodakis 2016 (table 1): three stages of 16, 32 and 64 times `width`.

    Args:
        depth: 6 n + 4, with n blocks per stage.
        width: The widening factor k, at least 1.
        channels_in: Channels of the images.
        num_classes: Width of the output.
        dropout: Between the convolutions of a block, 0 to 1.

    >>> sum(weight.numel() for weight in wide_resnet(16, 4, channels_in=3, num_classes=10).parameters())
    2748890
    """
    return ResidualNet(
        stem_channels=16,
        stage_channels=(16 * width, 32 * width, 64 * width),
        blocks_per_stage=(depth - 4) // 6,
        channels_in=channels_in,
        num_classes=num_classes,
        dropout=dropout,
    )


def small_resnet(*, channels_in: int, num_classes: int, width: int = 16, blocks: int = 1) -> ResidualNet:
    """Build a residual net of two stages for grey images of 8x8 to 28x28 pixels.

    Args:
        channels_in: Channels of the images.
        num_classes: Width of the output.
        width: Channels of the first stage; the second has twice as many.
        blocks: Residual blocks in each stage.
    """
    return ResidualNet(
        stem_channels=width,
        stage_channels=(width, 2 * width),
        blocks_per_stage=blocks,
        channels_in=channels_in,
        num_classes=num_classes,
    )
