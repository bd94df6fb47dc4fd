"""Users' own data sets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from elastic_batch.errors import InvalidSetting
from elastic_batch.job import DataSettings
from elastic_batch.workloads import data_target
from elastic_batch.workloads.data_sets import DataSets
from elastic_batch.workloads.data_target import load_data_target

TRAINING, TEST = TensorDataset(torch.zeros(8, 2)), TensorDataset(torch.zeros(4, 2))
SETTINGS = DataSettings(target="mine:data")


class Endless(IterableDataset[Any]):
    """A stream."""

    def __iter__(self) -> Iterator[int]:
        return iter(())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (TRAINING, (TRAINING, None)),
        ((TRAINING, TEST), (TRAINING, TEST)),
        ((TRAINING, None), (TRAINING, None)),
        (DataSets(training=TRAINING, evaluation=TEST), (TRAINING, TEST)),
    ],
)
def test_a_target_gives_a_training_set_or_a_pair(
    monkeypatch: pytest.MonkeyPatch, given: Any, expected: tuple[Any, Any]
) -> None:
    monkeypatch.setattr(data_target, "call_target", lambda *_: given)
    found = load_data_target(SETTINGS)
    assert (found.training, found.evaluation) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Endless(), "IterableDataset"),
        (3, "it gave int"),
        (None, "it gave NoneType"),
        ("digits", "it gave str"),
        ((TRAINING, 3), "int"),
        ((TRAINING, TEST, TEST), "it gave 3 values"),
    ],
)
def test_what_has_no_order_by_index_is_refused(monkeypatch: pytest.MonkeyPatch, given: Any, words: str) -> None:
    monkeypatch.setattr(data_target, "call_target", lambda *_: given)
    with pytest.raises(InvalidSetting, match=f"map-style.*{words}"):
        load_data_target(SETTINGS)
