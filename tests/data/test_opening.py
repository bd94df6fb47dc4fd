from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from elastic_batch.data import count_samples, open_source
from elastic_batch.errors import InvalidSetting
from elastic_batch.stream import SampleStream


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 1


class WithoutLength(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


class WithoutItems:
    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Endless(), "Endless.*map-style.*write them to files"),
        (WithoutLength(), "WithoutLength.*map-style.*wrap"),
        (WithoutItems(), "WithoutItems.*map-style.*wrap"),
        ([], "list.*at least one sample"),
        (TensorDataset(torch.zeros(0, 3)), "TensorDataset.*at least one sample"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused_with_the_way_out(dataset: Any, words: str) -> None:
    with pytest.raises(InvalidSetting, match=words):
        open_source(dataset, stream=SampleStream(3, 0), micro_batch_size=1, device="cpu")
    with pytest.raises(InvalidSetting, match="train_set = "):
        count_samples(dataset, "train_set")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"prefetch_factor": 0}, "prefetch_factor"),
        ({"keep_on_device": True}, "keep_on_device"),
        ({"stream": SampleStream(4, 0)}, "num_samples"),
    ],
)
def test_a_setting_outside_its_range_is_refused(settings: dict[str, Any], field: str) -> None:
    usable: dict[str, Any] = {"stream": SampleStream(3, 0), "micro_batch_size": 1, "device": "cpu"}
    with pytest.raises(InvalidSetting, match=field):
        open_source([1, 2, 3], **(usable | settings))


def test_nothing_runs_before_the_start_and_closing_twice_is_fine() -> None:
    source = open_source([1, 2, 3], stream=SampleStream(3, 0), micro_batch_size=1, device="cpu", num_workers=2)
    with pytest.raises(RuntimeError, match=r"call start\(\)"):
        source.next()
    source.close()
    source.close()
