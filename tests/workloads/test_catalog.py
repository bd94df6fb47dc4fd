"""What is known without data, and what is refused because of it."""

from __future__ import annotations

import pytest

from elastic_batch.errors import InvalidSetting, UnknownName
from elastic_batch.job import DataSettings
from elastic_batch.workloads.catalog import check_data, check_model_name, facts_of


def test_an_unknown_data_set_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownName, match=r"data\.name = 'cifar-10'.*Did you mean 'cifar10'"):
        facts_of("cifar-10")


@pytest.mark.parametrize("name", ["small-resnet", "wrn-10-1", "wrn-28-10", "torchvision:resnet50", "timm:anything"])
def test_models_that_may_exist_pass(name: str) -> None:
    check_model_name(name)


@pytest.mark.parametrize(
    ("name", "nearest"), [("small-resnett", "small-resnet"), ("torchvison:resnet50", "torchvision:resnet50")]
)
def test_an_unknown_model_is_refused_with_the_nearest_name(name: str, nearest: str) -> None:
    with pytest.raises(UnknownName, match=f"Did you mean '{nearest}'"):
        check_model_name(name)


@pytest.mark.parametrize("name", ["wrn-12-1", "wrn-4-1", "wrn-16-0"])
def test_a_wide_resnet_of_an_impossible_depth_is_refused(name: str) -> None:
    with pytest.raises(InvalidSetting, match="6 n"):
        check_model_name(name)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "digits", "augmentation": {"min_crop_area": 0.1}}, "data.augmentation.min_crop_area"),
        ({"name": "digits", "augmentation": {"crop_padding": 8}}, "data.augmentation.crop_padding"),
        ({"name": "digits", "image_size": 16}, "data.image_size"),
        ({"name": "imagenet", "augmentation": {"crop_padding": 4}}, "data.augmentation.crop_padding"),
        ({"target": "a:b", "root": "/data"}, "data.root"),
        ({"target": "a:b", "augmentation": {"horizontal_flip": True}}, "data.augmentation.horizontal_flip"),
    ],
)
def test_options_for_another_kind_of_data_are_refused(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        check_data(DataSettings.model_validate(fields))
    assert caught.value.field == field
