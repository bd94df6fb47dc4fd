"""Models by name and by target."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from elastic_batch.errors import InvalidSetting, PackageMissing, UnknownName
from elastic_batch.job import ModelSettings
from elastic_batch.workloads.catalog import DATA_SETS
from elastic_batch.workloads.networks import build_model


def settings(**fields: object) -> ModelSettings:
    return ModelSettings.model_validate(fields)


@pytest.mark.parametrize(
    ("name", "args", "data"),
    [
        ("small-resnet", {"width": 2}, "digits"),
        ("wrn-10-1", {"dropout": 0.1}, "fashion-mnist"),
        ("wrn-16-2", {}, "cifar10"),
    ],
)
def test_channels_and_classes_follow_from_the_data_set(name: str, args: dict[str, object], data: str) -> None:
    facts = DATA_SETS[data]
    model = build_model(settings(name=name, args=args), facts)
    assert model(torch.randn(2, *facts.image_shape)).shape == (2, facts.num_classes)


def test_arguments_win_over_what_follows_from_the_data_set() -> None:
    model = build_model(settings(name="wrn-10-1", args={"num_classes": 3}), DATA_SETS["cifar10"])
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"model\.args = .*must be at least 1"):
        build_model(settings(name="small-resnet", args={"width": -3}), DATA_SETS["digits"])


def test_a_target_that_gives_no_model_is_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"must give a torch\.nn\.Module; it gave Fraction"):
        build_model(settings(target="fractions:Fraction"), None)


def test_torchvisions_models_are_had_by_name() -> None:
    pytest.importorskip("torchvision")
    model = build_model(settings(name="torchvision:squeezenet1_1"), DATA_SETS["cifar10"])
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)
    with pytest.raises(UnknownName, match="Did you mean 'torchvision:resnet50'"):
        build_model(settings(name="torchvision:resnet51"), None)


def test_timms_models_are_had_by_name() -> None:
    pytest.importorskip("timm")
    model = build_model(settings(name="timm:test_resnet"), DATA_SETS["fashion-mnist"])
    assert model.eval()(torch.randn(1, 1, 64, 64)).shape == (1, 10)
    with pytest.raises(UnknownName, match="Did you mean 'timm:inception_resnet_v2'"):
        build_model(settings(name="timm:inception_resnet_v3"), None)


def test_a_missing_package_names_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(PackageMissing, match=r"pip install 'elastic-batch\[timm\]'"):
        build_model(settings(name="timm:resnet50"), None)


def test_a_users_model_is_called_with_its_arguments() -> None:
    model = build_model(settings(target="torch.nn:Linear", args={"in_features": 3, "out_features": 2}), None)
    assert isinstance(model, nn.Linear)


def test_arguments_that_a_model_does_not_take_are_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"model\.args.*small_resnet refuses them.*colour"):
        build_model(settings(name="small-resnet", args={"colour": 1}), DATA_SETS["digits"])


def test_equal_seeds_draw_equal_weights() -> None:
    def first_weight(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return next(build_model(settings(name="small-resnet"), DATA_SETS["digits"]).parameters())

    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))
