"""What may be in a checkpoint, and copies of it."""

from __future__ import annotations

import enum
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_batch.checkpoint import CheckpointInfo, CheckpointStore, check_state, snapshot
from elastic_batch.checkpoint.state import HostMemory, Snapshot, compact
from elastic_batch.errors import UnsavableState


class Rule(enum.IntEnum):
    LINEAR = 1


class Pair(NamedTuple):
    left: int
    right: int


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("state", "path", "found"),
    [
        ({"a": {"b": [0, object()]}}, "state['a']['b'][1]", "of type builtins.object"),
        ({"a": lambda: 0}, "state['a']", "of type builtins.function"),
        ({"a": (1, Rule.LINEAR)}, "state['a'][1]", "Rule"),
        ({"a": Pair(1, 2)}, "state['a']", "Pair"),
        ({"a": Text("x")}, "state['a']", "Text"),
        ({"a": defaultdict(int)}, "state['a']", "of type collections.defaultdict"),
        ({"a": b""}, "state['a']", "of type builtins.bytes"),
        ({"a": np.zeros(3)}, "state['a']", "of type numpy.ndarray"),
        ({"a": {Rule.LINEAR: 1}}, "a key of state['a']", "Rule"),
        ({"a": {(1, 2): 1}}, "a key of state['a']", "(1, 2), of type builtins.tuple"),
        ({"a": torch.empty(2, device="meta")}, "state['a']", "a tensor on the meta device"),
        ({"a": torch.eye(2).to_sparse()}, "state['a']", "the layout torch.sparse_coo"),
        ({"a": torch.nn.Linear(1, 1)}, "state['a']", "of type torch.nn.modules.linear.Linear"),
        ({"a": torch.nn.UninitializedParameter()}, "state['a']", "UninitializedParameter"),
    ],
)
def test_a_value_that_only_code_could_restore_is_named_with_its_place(state: Any, path: str, found: str) -> None:
    for use in (check_state, snapshot, compact):
        with pytest.raises(UnsavableState) as refused:
            use(state)
        assert refused.value.path == path
        assert found in refused.value.found


def test_a_container_that_holds_itself_is_refused() -> None:
    state: dict[str, Any] = {"a": []}
    state["a"].append(state)
    with pytest.raises(UnsavableState, match="holds itself"):
        check_state(state)
    shared = [1]
    check_state({"a": shared, "b": shared})


tensors = st.sampled_from(
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(10)[3:7],
        torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.tensor([1 + 2j, 3j]).conj(),
        torch.empty(0, 3),
        torch.tensor([True, False]),
        torch.nn.Parameter(torch.ones(2)),
    ]
)
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.sampled_from([torch.float32, torch.Size([1, 2]), torch.device("cpu")]),
    tensors,
)
keys = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.integers(-5, 5))
states = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=8,
)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and not isinstance(left, torch.Size):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and (left == right or left != left)  # NaN differs from itself


@settings(max_examples=60, deadline=None)
@given(state=st.dictionaries(keys, states, max_size=4))
def test_whatever_is_accepted_comes_back_the_same_without_running_code(
    state: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = CheckpointStore(tmp_path_factory.mktemp("states"))
    for copy in (state, snapshot(state)):
        manifest = store.save(copy, CheckpointInfo(position=1, update=1))
        assert same(store.load(manifest.name).state, state)


def test_a_snapshot_does_not_follow_the_state() -> None:
    state: dict[str, Any] = {"weight": torch.ones(3), "list": [torch.ones(1)], "count": 1}
    copy = snapshot(state)
    state["weight"].zero_()
    state["list"][0].zero_()
    state["list"].append(2)
    assert copy["weight"].tolist() == [1, 1, 1]
    assert [tensor.tolist() for tensor in copy["list"]] == [[1.0]]


def test_a_snapshot_has_no_history_and_keeps_ties_strides_and_layer_versions() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).to(memory_format=torch.channels_last)
    model[1].weight = model[0].weight
    state: dict[str, Any] = {
        "model": model.state_dict(keep_vars=True),
        "image": torch.ones(1, 2, 3, 3).to(memory_format=torch.channels_last),
    }
    copy = snapshot(state)
    assert not copy["model"]["0.weight"].requires_grad
    assert copy["model"]["0.weight"].data_ptr() == copy["model"]["1.weight"].data_ptr()
    assert copy["model"]["0.weight"].data_ptr() != state["model"]["0.weight"].data_ptr()
    assert copy["image"].stride() == state["image"].stride()
    assert copy["model"]._metadata == state["model"]._metadata


def test_a_slice_of_a_large_buffer_is_written_without_the_rest(tmp_path: Path) -> None:
    buffer = torch.zeros(1_000_000)
    manifest = CheckpointStore(tmp_path).save({"slice": buffer[5:9]}, CheckpointInfo(position=1, update=1))
    assert manifest.num_bytes < 10_000


def test_released_memory_is_used_again_by_the_next_snapshot_and_only_then() -> None:
    memory = HostMemory()
    state: dict[str, Any] = {
        "weight": torch.ones(3, 4).t(),
        "rows": torch.arange(20.0).reshape(4, 5)[:, 1:3],
        "step": 1,
    }
    first = Snapshot(state, memory)
    second = Snapshot(state, memory)
    places = {tensor.data_ptr() for tensor in (first.state["weight"], first.state["rows"])}
    assert not places & {second.state["weight"].data_ptr(), second.state["rows"].data_ptr()}
    first.release()
    state["weight"].zero_()
    third = Snapshot(state, memory)
    assert {third.state["weight"].data_ptr(), third.state["rows"].data_ptr()} == places
    assert torch.equal(third.state["rows"], state["rows"])
    assert third.state["weight"].sum() == 0
    assert second.state["weight"].sum() == 12


@pytest.mark.gpu
def test_a_snapshot_of_a_device_is_complete_when_it_returns() -> None:
    weight = torch.ones(1 << 22, device="cuda")
    for value in range(5):
        weight.fill_(value)
        copy = snapshot({"weight": weight})["weight"]
        weight.fill_(-1)
        assert copy.device.type == "cpu"
        assert bool((copy == value).all())
