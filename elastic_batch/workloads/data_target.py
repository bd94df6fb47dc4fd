"""Users' own data sets, named by a job's `data.target`."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset

from elastic_batch.errors import InvalidSetting
from elastic_batch.job import DataSettings
from elastic_batch.workloads.data_sets import DataSets
from elastic_batch.workloads.targets import call_target


def load_data_target(settings: DataSettings) -> DataSets:
    """Call the target: it gives `DataSets`, a training set, or a pair of training and test set.

    Raises:
        InvalidSetting: It cannot be called, or gives something else.
    """
    assert settings.target is not None
    found = call_target("data.target", settings.target, settings.args)
    if isinstance(found, DataSets):
        return found
    training, evaluation = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    _check_map_style(settings.target, training)
    if evaluation is not None:
        _check_map_style(settings.target, evaluation)
    return DataSets(training=training, evaluation=evaluation)


def _check_map_style(target: str, data: Any) -> None:
    rule = "must give a map-style data set, or a pair of them (training, test)"
    if isinstance(data, IterableDataset):
        raise InvalidSetting("data.target", target, rule, "An IterableDataset has no order that a seed could fix")
    if isinstance(data, str | tuple) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        gave = f"{len(data)} values" if isinstance(data, tuple) else type(data).__name__
        raise InvalidSetting("data.target", target, f"{rule}; it gave {gave}")
