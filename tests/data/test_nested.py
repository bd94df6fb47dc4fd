from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from elastic_batch.data.nested import NotDivisibleError, NotJoinableError, cut, duplicate, join, to_device


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


def test_what_is_cut_is_put_together_again() -> None:
    whole = join([batch(1.0), batch(2.0)], 2)[:3]  # nothing that cannot be changed
    first, second = cut(whole, 0, 2, 4), cut(whole, 2, 4, 4)
    assert isinstance(first[0], Pair)
    assert type(second[1]["deep"][1]) is defaultdict
    again = join([first, second], 2)
    assert torch.equal(again[0].inputs, whole[0].inputs)
    assert again[0].names == whole[0].names
    assert again[1]["deep"][1]["ids"] == ("a", "b", "a", "b")
    assert again[1]["deep"][1]["nothing"] is None
    assert torch.equal(again[2]["y"], whole[2]["y"])


def test_a_part_shares_nothing_with_the_batch() -> None:
    whole: Any = UserDict(x=torch.zeros(3), names=["a", "b", "c"])
    part = cut(whole, 0, 2, 3)
    assert type(part) is UserDict
    part["x"] += 1
    part["names"].clear()
    part.pop("names")
    assert whole["x"].tolist() == [0, 0, 0]
    assert whole["names"] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("whole", "reason"),
    [
        (torch.zeros(3, 2), "first axis"),
        (torch.tensor(1.0), "first axis"),
        (torch.eye(2).to_sparse(), "first axis"),
        ({"x": torch.zeros(2), "name": "of all"}, "a str has no samples"),
        ({"x": torch.zeros(2), "count": 2}, "an? int has no samples"),
        (pack_sequence([torch.ones(3), torch.ones(2)]), "a PackedSequence has no samples"),
        ((torch.zeros(2), (32, 32)), "2 items of a tuple may be one for each sample, or not"),
        ([torch.zeros(2, 3), torch.zeros(2, 3)], "2 items of a list may be one for each sample, or not"),
        ([{"boxes": torch.zeros(2, 4)}] * 2, "2 items of a list may be one for each sample, or not"),
    ],
)
def test_what_cannot_be_cut_for_sure_is_refused(whole: Any, reason: str) -> None:
    with pytest.raises(NotDivisibleError, match=reason):
        cut(whole, 0, 1, 2)


def test_fields_are_told_from_samples_by_their_names_or_types() -> None:
    pair = cut((torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)), 0, 1, 2)
    assert [tuple(tensor.shape) for tensor in pair] == [(1, 3), (1,)]
    named = cut(Pair(torch.zeros(2), ["a", "b"]), 0, 1, 2)
    assert named.names == ["a"]


def test_a_duplicate_may_be_changed() -> None:
    whole = batch(1.0)
    double = duplicate(whole)
    double[0].inputs.zero_()
    double[0].names.clear()
    double[1]["deep"][1].pop("x")
    assert whole[0].inputs.sum() == 6
    assert whole[0].names == ["c", "d"]
    assert "x" in whole[1]["deep"][1]
    assert isinstance(duplicate(pack_sequence([torch.ones(3), torch.ones(2)])), PackedSequence)


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
