"""The residual nets: sizes, shapes, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elastic_batch.workloads.models import PreActivationBlock, small_resnet, wide_resnet


@pytest.mark.parametrize(("depth", "width", "parameters"), [(10, 1, 77_850), (16, 4, 2_748_890), (28, 10, 36_479_194)])
def test_wide_resnets_have_the_published_number_of_parameters(depth: int, width: int, parameters: int) -> None:
    with torch.device("meta"):
        model = wide_resnet(depth, width, channels_in=3, num_classes=10)
    assert sum(weight.numel() for weight in model.parameters()) == parameters


def test_a_wide_resnet_has_as_many_convolutions_as_its_depth_says() -> None:
    model = wide_resnet(16, 4, channels_in=3, num_classes=10)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 16


@pytest.mark.parametrize("size", [8, 28])
def test_the_small_resnet_takes_grey_images_of_8_to_28_pixels(size: int) -> None:
    model = small_resnet(channels_in=1, num_classes=10, width=4)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 10)


def test_every_parameter_gets_a_gradient() -> None:
    model = wide_resnet(10, 1, channels_in=3, num_classes=5)
    model(torch.randn(4, 3, 16, 16)).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_block_of_equal_width_carries_its_input_unchanged() -> None:
    block = PreActivationBlock(4, 4).eval()
    nn.init.zeros_(block.conv2.weight)
    features = torch.randn(1, 4, 5, 5)
    assert torch.equal(block(features), features)


def test_dropout_sits_inside_the_blocks_only_when_asked_for() -> None:
    def dropouts(probability: float) -> int:
        model = wide_resnet(10, 1, channels_in=3, num_classes=10, dropout=probability)
        return sum(isinstance(module, nn.Dropout) for module in model.modules())

    assert (dropouts(0.0), dropouts(0.3)) == (0, 3)


def test_the_first_loss_is_near_that_of_guessing() -> None:
    torch.manual_seed(0)
    model = wide_resnet(10, 1, channels_in=1, num_classes=10)
    loss = nn.functional.cross_entropy(model(torch.randn(64, 1, 28, 28)), torch.randint(10, (64,)))
    assert 1.8 < loss.item() < 3.2
