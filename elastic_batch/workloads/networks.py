"""From the `model` section of a job to a torch module."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from elastic_batch.errors import InvalidSetting, PackageMissing, UnknownName
from elastic_batch.job import ModelSettings
from elastic_batch.workloads.catalog import DataSetFacts, check_model_name, wide_resnet_shape
from elastic_batch.workloads.models import small_resnet, wide_resnet
from elastic_batch.workloads.targets import call_target, call_with_args
from elastic_batch.workloads.vision import import_torchvision


def build_model(settings: ModelSettings, facts: DataSetFacts | None) -> nn.Module:
    """Make the model with freshly drawn weights, from torch's global generator.

    Args:
        settings: Which one, and its arguments; they win over what follows from the data set.
        facts: Of the data set, where it is built in: channels of the images, number of classes.

    Raises:
        UnknownName: No such model.
        InvalidSetting: The target cannot be had, or gives something else, or the model refuses its arguments.
        PackageMissing: The package that has the model is not installed.
    """
    if settings.target is not None:
        found = call_target("model.target", settings.target, settings.args)
        if not isinstance(found, nn.Module):
            rule = f"must give a torch.nn.Module; it gave {type(found).__name__}"
            raise InvalidSetting("model.target", settings.target, rule)
        return found
    name = settings.name or ""
    check_model_name(name)
    source, _, model_name = name.partition(":")
    classes = {"num_classes": facts.num_classes} if facts else {}
    channels = facts.image_shape[0] if facts else None
    if source == "torchvision":
        return _torchvision_model(model_name, {**classes, **settings.args})
    if source == "timm":
        return _timm_model(model_name, {**classes, **({"in_chans": channels} if channels else {}), **settings.args})
    sizes = {**classes, **({"channels_in": channels} if channels else {})}
    shape = wide_resnet_shape(name)
    if shape is None:
        return cast(nn.Module, call_with_args("model.args", small_resnet, settings.args, **sizes))
    return cast(nn.Module, call_with_args("model.args", wide_resnet, settings.args, *shape, **sizes))


def _torchvision_model(name: str, options: dict[str, Any]) -> nn.Module:
    models = import_torchvision(f"torchvision:{name}").models
    known = models.list_models(module=models)
    if name not in known:
        raise UnknownName("model.name", f"torchvision:{name}", [f"torchvision:{one}" for one in known])
    return cast(nn.Module, call_with_args("model.args", models.get_model_builder(name), options))


def _timm_model(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise PackageMissing(f"timm:{name}", "timm", "timm") from error
    if not timm.is_model(name):
        raise UnknownName("model.name", f"timm:{name}", [f"timm:{one}" for one in timm.list_models()])
    return cast(nn.Module, call_with_args("model.args", timm.create_model, options, name))
