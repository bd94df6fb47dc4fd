from __future__ import annotations

from collections import OrderedDict, defaultdict
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from elastic_batch.data.nested import NotJoinableError, join, to_device


class Pair(NamedTuple):
    inputs: torch.Tensor
    names: list[str]


def batch(value: float) -> Any:
    tensor = torch.full((2, 3), value)
    mapping: Any = defaultdict(list, {"x": tensor, "ids": ("a", "b"), "nothing": None})
    return [
        Pair(tensor, ["c", "d"]),
        {"deep": (tensor, mapping)},
        OrderedDict(y=tensor[:, 0]),
        MappingProxyType({"z": tensor}),
    ]


def test_nested_batches_are_joined_leaf_by_leaf_and_keep_their_types() -> None:
    pair, deep, ordered, proxy = join([batch(1.0), batch(2.0)], 2)
    expected = torch.cat([torch.full((2, 3), 1.0), torch.full((2, 3), 2.0)])
    assert isinstance(pair, Pair)
    assert pair.names == ["c", "d", "c", "d"]
    tensor, mapping = deep["deep"]
    assert type(mapping) is defaultdict
    assert mapping.default_factory is list
    assert mapping["ids"] == ("a", "b", "a", "b")
    assert mapping["nothing"] is None
    assert type(ordered) is OrderedDict
    assert torch.equal(ordered["y"], expected[:, 0])
    for joined in (pair.inputs, tensor, mapping["x"], proxy["z"]):
        assert torch.equal(joined, expected)


def test_one_batch_is_returned_as_it_is() -> None:
    single = [object()]
    assert join([single], 7) is single


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), "shapes"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), "types differ"),
        (torch.zeros(5, 3), torch.zeros(5, 3), "2 samples as first axis"),
        (torch.tensor(1.0), torch.tensor(1.0), "2 samples as first axis"),
        (torch.zeros(2), [1, 2], "different types"),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}, "keys"),
        ([torch.zeros(2)], [torch.zeros(2), torch.zeros(2)], "lengths"),
        (0.5, 0.5, "float"),
        ([torch.zeros(3, 4), torch.zeros(3, 5)], [torch.zeros(3, 4), torch.zeros(3, 5)], "first axis"),
    ],
)
def test_what_has_no_common_batch_is_refused_with_the_reason(left: Any, right: Any, reason: str) -> None:
    with pytest.raises(NotJoinableError, match=reason):
        join([left, right], 2)


def test_moving_reaches_every_tensor_and_objects_with_a_method_of_their_own() -> None:
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    pair, deep, ordered, proxy, moved = to_device([*batch(1.0), packed], torch.device("meta"))
    assert isinstance(moved, PackedSequence)
    for tensor in (pair.inputs, deep["deep"][0], deep["deep"][1]["x"], ordered["y"], proxy["z"], moved.data):
        assert tensor.device.type == "meta"
    assert moved.batch_sizes.device.type == "cpu"
    assert pair.names == ["c", "d"]


class Plain:
    """A batch whose `to` takes a device and nothing else."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Plain:
        return Plain(self.x.to(device))


class Eager(Plain):
    """A batch whose `to` need not wait."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Plain:
        assert non_blocking
        return super().to(device)


@pytest.mark.parametrize("kind", [Plain, Eager])
def test_an_object_is_moved_by_its_own_method_whatever_that_takes(kind: type[Plain]) -> None:
    assert to_device({"graph": kind(torch.ones(2))}, torch.device("meta"))["graph"].x.device.type == "meta"
